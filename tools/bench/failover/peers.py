"""The pools that are compared, each as a knowledgeable user would set it up for several servers.

All run single connections through the same steps: checkout, one statement, checkin.  Where a pool leaves the choice
of a server to libpq, it is given all of them in one connection string.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

CONNECTIONS: Final = 4  # of each worker
TIMEOUT_S: Final = 5  # for a connection
QUERY_TIMEOUT_S: Final = 1.0
CONNECT: Final = "user=postgres dbname=postgres connect_timeout=2 tcp_user_timeout=2000"
NEEDS: Final = {
    "shmpool": ("shmpool",),
    "psycopg_pool": ("psycopg", "psycopg_pool"),
    "SQLAlchemy": ("sqlalchemy", "psycopg2"),
    "pgdbpool": ("pgdbpool", "psycopg2"),
}
ATTRIBUTES: Final = {"read": "any", "write": "read-write"}
SETTINGS: Final = {
    "shmpool": (
        f"target replica / primary, query_timeout 1s, all else, [probe] among it, at its defaults; endpoints: {CONNECT}"
    ),
    "psycopg_pool": (
        f"psycopg 3, ConnectionPool(min_size=4, max_size=4, timeout=5, check=check_connection), {CONNECT}, "
        "host=<all> load_balance_hosts=random target_session_attrs=any / read-write"
    ),
    "SQLAlchemy": (
        "QueuePool, psycopg2, pool_size=4, max_overflow=0, pool_timeout=5, pool_pre_ping=True, AUTOCOMMIT, "
        "the same connection string as psycopg_pool"
    ),
    "pgdbpool": (
        "threaded, connection_count 4, autocommit, connect_timeout 2, query_timeout 1000 (on the server); read: "
        "its own list of hosts; write, where that list would hold standbys: host=<all>, PGTARGETSESSIONATTRS=read-write"
    ),
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where the servers are, and the name of the shmpool in front of them."""

    hosts: Sequence[str]
    port: int
    pool: str
    group: str  # read or write

    def conninfo(self) -> str:
        """Return a connection string with all hosts, for libpq to choose."""
        choice = f"target_session_attrs={ATTRIBUTES[self.group]} load_balance_hosts=random"
        return f"host={','.join(self.hosts)} port={self.port} {CONNECT} {choice}"


class Peer(Protocol):
    """What the load does with a pool."""

    def checkout(self) -> Any:
        """Return a connection, or whatever stands for one."""

    def identify(self, conn: Any) -> tuple[str, int]:
        """Return the server's host and the pid of the session, without asking the server."""

    def execute(self, conn: Any, statement: str) -> None:
        """Run a statement to its end."""

    def checkin(self, conn: Any) -> None:
        """Give it back."""


class Shmpool:
    """Ours."""

    def __init__(self, site: Site) -> None:
        import shmpool

        self._pool, self._group = shmpool.Pool(site.pool), site.group

    def checkout(self) -> Any:
        return self._pool.checkout(self._group)

    def identify(self, conn: Any) -> tuple[str, int]:
        return conn.info.host, conn.get_backend_pid()

    def execute(self, conn: Any, statement: str) -> None:
        with conn.cursor() as cursor:
            cursor.execute(statement)

    def checkin(self, conn: Any) -> None:
        self._pool.checkin(conn)


class PsycopgPool:
    """psycopg 3 and its pool, with a check of each connection at checkout."""

    def __init__(self, site: Site) -> None:
        from psycopg_pool import ConnectionPool

        self._pool = ConnectionPool(
            site.conninfo(),
            min_size=CONNECTIONS,
            max_size=CONNECTIONS,
            timeout=TIMEOUT_S,
            kwargs={"autocommit": True},
            check=ConnectionPool.check_connection,
            open=True,
        )
        self._pool.wait()

    def checkout(self) -> Any:
        return self._pool.getconn()

    def identify(self, conn: Any) -> tuple[str, int]:
        return conn.info.host, conn.info.backend_pid

    def execute(self, conn: Any, statement: str) -> None:
        conn.execute(statement)

    def checkin(self, conn: Any) -> None:
        self._pool.putconn(conn)


class Sqlalchemy:
    """SQLAlchemy's QueuePool on psycopg2, with a ping at checkout."""

    def __init__(self, site: Site) -> None:
        import psycopg2
        import sqlalchemy

        self._engine = sqlalchemy.create_engine(
            "postgresql+psycopg2://",
            creator=lambda: psycopg2.connect(site.conninfo()),
            poolclass=sqlalchemy.QueuePool,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=TIMEOUT_S,
            pool_pre_ping=True,
            isolation_level="AUTOCOMMIT",
        )

    def checkout(self) -> Any:
        return self._engine.connect()

    def identify(self, conn: Any) -> tuple[str, int]:
        driver = conn.connection.driver_connection
        return driver.info.host, driver.info.backend_pid

    def execute(self, conn: Any, statement: str) -> None:
        conn.exec_driver_sql(statement)

    def checkin(self, conn: Any) -> None:
        conn.close()


class Pgdbpool:
    """pgdbpool, which looks at a connection before each statement."""

    def __init__(self, site: Site) -> None:
        from pgdbpool import pool

        hosts = list(site.hosts)
        if site.group == "write":
            os.environ["PGTARGETSESSIONATTRS"] = ATTRIBUTES["write"]
            hosts = [",".join(hosts)]
        os.environ["PGPORT"] = str(site.port)  # it has no setting for it
        common = {"name": "postgres", "user": "postgres", "pass": None, "connect_timeout": 2}
        timeout_ms = int(QUERY_TIMEOUT_S * 1000)
        databases = [{"host": host, "query_timeout": timeout_ms, **common} for host in hosts]
        groups = {site.group: {"connection_count": CONNECTIONS, "autocommit": True}}
        pool.Connection.init({"type": "threaded", "db": databases, "groups": groups})
        self._module, self._group = pool, site.group

    def checkout(self) -> Any:
        return self._module.Handler(self._group)

    def identify(self, conn: Any) -> tuple[str, int]:
        driver = self._module.Connection.get_connection(conn._connection)[0]  # a reconnect puts another one there
        return driver.info.host, driver.info.backend_pid

    def execute(self, conn: Any, statement: str) -> None:
        conn.query(statement)

    def checkin(self, conn: Any) -> None:
        conn.__exit__(None, None, None)


PEERS: Final[Mapping[str, Callable[[Site], Peer]]] = {
    "shmpool": Shmpool,
    "psycopg_pool": PsycopgPool,
    "SQLAlchemy": Sqlalchemy,
    "pgdbpool": Pgdbpool,
}


def missing(name: str) -> list[str]:
    """Return the packages that a pool needs and that are not installed."""
    return [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]


def sqlstate(error: BaseException | None) -> str:
    """Return the SQLSTATE of an error or of what caused it, or nothing."""
    while error is not None:
        for attribute in ("sqlstate", "pgcode"):
            with contextlib.suppress(AttributeError):
                if code := getattr(error, attribute):
                    return str(code)
        error = error.__cause__ or error.__context__
    return ""
