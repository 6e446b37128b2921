"""Servers and connections for tests of pgdbpool's interface that need no PostgreSQL.

The stand-ins can do exactly what pgdbpool asks of the driver, so that anything more is an error of the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest

from shmpool.pgdbpool import Connection


def entry(host: str = "h1", **keys: Any) -> dict[str, Any]:
    """Return an entry of `db`."""
    return {"host": host, "name": "app", "user": "me", "pass": "secret"} | keys


def config_of(*entries: dict[str, Any], kind: str = "threaded", **keys: Any) -> dict[str, Any]:
    """Return a configuration with one group "g" of three connections; `keys` are the group's."""
    return {"type": kind, "db": list(entries) or entry(), "groups": {"g": {"connection_count": 3, "timeout": 5} | keys}}


class Cursor:
    """A cursor that has only what pgdbpool uses, and notes each statement at its server."""

    def __init__(self, conn: StandIn) -> None:
        self._conn = conn

    def execute(self, statement: str, params: Any = None) -> None:
        """Note a statement."""
        self._conn.run(statement)

    def callproc(self, name: str, *params: Any) -> None:
        """Note a call."""
        self._conn.run(f"call {name}")

    def fetchone(self) -> list[str]:
        """Return a row."""
        return ["answer"]


class StandIn:
    """A connection that has only what pgdbpool uses."""

    closed: int

    def __init__(self, servers: Servers, keywords: dict[str, Any]) -> None:
        self.servers = servers
        self.keywords = keywords
        self.host = keywords["host"]
        self.statements: list[str] = []

    def run(self, statement: str) -> None:
        """Note a statement, or fail as the servers are told to."""
        self.statements.append(statement)
        self.servers.statements.append(statement)
        if self.servers.failure is not None:
            raise self.servers.failure

    def cursor(self, cursor_factory: Any) -> Cursor:
        """Return a cursor."""
        return Cursor(self)

    def commit(self) -> None:
        """Note a commit."""
        self.run("commit")


class Full(StandIn):
    """One with a transaction's other end, a known end of its own, and isolation levels."""

    closed = 0

    def rollback(self) -> None:
        """Note a rollback."""
        self.run("rollback")

    def close(self) -> None:
        """End it."""
        self.closed = 1

    def set_isolation_level(self, level: int) -> None:
        """Note the level."""
        self.statements.append(f"isolation level {level}")


class Servers:
    """What `psycopg2.connect` leads to: servers by host name, each of which may be down."""

    kind: type[StandIn] = StandIn

    def __init__(self) -> None:
        self.made: list[StandIn] = []
        self.attempts: list[str] = []  # hosts
        self.down: dict[str, str] = {}  # host -> what the driver says
        self.statements: list[str] = []
        self.failure: Exception | None = None  # how every statement fails

    def connect(
        self,
        *,
        dbname: str,
        user: str,
        host: str,
        password: str,
        sslmode: str,
        connect_timeout: int,
    ) -> StandIn:
        """Take the keywords that pgdbpool passes, and no other."""
        keywords = {
            "dbname": dbname,
            "user": user,
            "host": host,
            "password": password,
            "sslmode": sslmode,
            "connect_timeout": connect_timeout,
        }
        self.attempts.append(host)
        if host in self.down:
            raise psycopg2.OperationalError(self.down[host])
        self.made.append(self.kind(self, keywords))
        return self.made[-1]


@contextmanager
def forgotten() -> Iterator[None]:
    """Leave `Connection` without any connections afterwards."""
    try:
        yield
    finally:
        current, Connection._current = Connection._current, None
        if current is not None and not current.is_inherited:
            current.close()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """Stand-in servers in place of the driver's connect."""
    made = Servers()
    monkeypatch.setattr(psycopg2, "connect", made.connect)
    with forgotten():
        yield made
