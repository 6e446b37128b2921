"""The peers as an application uses them: each lends something that runs one statement and returns its first row.

Imported in Gunicorn's workers, each of which makes one of these.  Peers with a pool in each process get the worker's
share of the connections; shmpool and PgBouncer share all of them between the workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg2

import shmpool

GROUP = "bench"  # of connections, where a peer has groups
TIMEOUT_S = 5.0  # longest wait for a connection, wherever a peer lets that be said

Row = tuple[Any, ...]
Ask = Callable[[str, tuple[int, ...]], Row]


@dataclass(frozen=True, slots=True)
class Share:
    """What a worker is told about its part.

    Args:
        conninfo: of the server, or of PgBouncer; for shmpool the name of the pool.
        connections: how many a pool of this process alone may have.
        threads: how many threads use them.
        autocommit: each statement by itself; else a request is one transaction.
    """

    conninfo: str
    connections: int
    threads: int
    autocommit: bool


class Peer(Protocol):
    """What every peer can do."""

    def lend(self) -> AbstractContextManager[Ask]:
        """Lend a connection for a request; without autocommit it is committed at the end."""


def _asking(cursor: Any) -> Ask:
    def ask(sql: str, parameters: tuple[int, ...]) -> Row:
        cursor.execute(sql, parameters)
        row: Row = cursor.fetchone()
        return row

    return ask


class Raw:
    """One psycopg2 connection for each thread, for ever.  To PgBouncer: what its clients do."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._own = threading.local()

    @contextmanager
    def lend(self) -> Iterator[Ask]:
        """Lend the thread's connection."""
        try:
            conn = self._own.connection
        except AttributeError:
            conn = self._own.connection = psycopg2.connect(self._share.conninfo)
            conn.autocommit = self._share.autocommit
        with conn.cursor() as cursor:
            yield _asking(cursor)
        if not self._share.autocommit:
            conn.commit()


class Shmpool:
    """The host's pool."""

    def __init__(self, share: Share) -> None:
        self._pool = shmpool.Pool(share.conninfo)

    @contextmanager
    def lend(self) -> Iterator[Ask]:
        """Lend one of the host's connections."""
        with self._pool.connection(GROUP) as conn, conn.cursor() as cursor:
            yield _asking(cursor)


class PsycopgPool:
    """psycopg_pool, and so psycopg 3 as the driver: it prepares statements at the server by itself."""

    def __init__(self, share: Share) -> None:
        from psycopg_pool import ConnectionPool

        self._pool = ConnectionPool(
            share.conninfo,
            min_size=share.connections,
            max_size=share.connections,
            timeout=TIMEOUT_S,
            kwargs={"autocommit": share.autocommit},
            open=True,
        )

    @contextmanager
    def lend(self) -> Iterator[Ask]:
        """Lend one of the process's connections."""
        with self._pool.connection() as conn, conn.cursor() as cursor:
            yield _asking(cursor)


class SqlAlchemy:
    """SQLAlchemy's QueuePool by itself, over psycopg2."""

    def __init__(self, share: Share) -> None:
        from sqlalchemy.pool import QueuePool

        def connect() -> Any:
            conn = psycopg2.connect(share.conninfo)
            conn.autocommit = share.autocommit
            return conn

        self._autocommit = share.autocommit
        self._pool = QueuePool(connect, pool_size=share.connections, max_overflow=0, timeout=TIMEOUT_S)

    @contextmanager
    def lend(self) -> Iterator[Ask]:
        """Lend one of the process's connections."""
        conn = self._pool.connect()
        try:
            cursor = conn.cursor()
            yield _asking(cursor)
            cursor.close()
            if not self._autocommit:
                conn.commit()
        finally:
            conn.close()


class Pgdbpool:
    """pgdbpool 1.0: it asks the server for the time before each statement."""

    def __init__(self, share: Share) -> None:
        from pgdbpool import pool as dbpool

        told = psycopg2.extensions.parse_dsn(share.conninfo)
        os.environ["PGPORT"] = told["port"]  # it takes none
        dbpool.Connection.init(
            {
                "type": "threaded" if share.threads > 1 else "non-threaded",
                "db": {"host": told["host"], "name": told["dbname"], "user": told["user"], "pass": ""},
                "groups": {GROUP: {"connection_count": share.connections, "autocommit": share.autocommit}},
            }
        )
        self._handler: Callable[[str], Any] = dbpool.Handler

    @contextmanager
    def lend(self) -> Iterator[Ask]:
        """Lend one of the process's connections; it commits by itself."""
        with self._handler(GROUP) as db:

            def ask(sql: str, parameters: tuple[int, ...]) -> Row:
                row: Row = db.query(sql, parameters).fetchone()
                return row

            yield ask


PEERS: dict[str, Callable[[Share], Peer]] = {
    "raw": Raw,
    "raw-unbounded": Raw,
    "shmpool": Shmpool,
    "pgbouncer": Raw,
    "pgbouncer-unix": Raw,
    "psycopg_pool": PsycopgPool,
    "sqlalchemy": SqlAlchemy,
    "pgdbpool": Pgdbpool,
}
