"""Connections without a server: the sweep opens thousands, each after an interruption or a kill.

Only the driver is replaced.  The socket is real (one end of a pair), so that the pool's own polling, duplicating,
reading to the end and closing run as they are.
"""

from __future__ import annotations

import socket
import weakref
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import STATUS_READY, TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS

from shmpool import connection
from shmpool.connection import Connection


class Server:
    """What the stand-in connections lead to: it knows its sessions, and how many it may have."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.sessions: weakref.WeakSet[StandIn] = weakref.WeakSet()
        self.failures: list[Exception] = []  # the next attempts to connect end with these

    def connect(self, dsn: str, **kwargs: Any) -> StandIn:
        """Do as `psycopg2.connect`; more sessions than the caps allow are an error of the pool."""
        if self.failures:
            raise self.failures.pop()
        assert len(self.open()) < self.cap, "more sessions than permits"
        made = StandIn()
        self.sessions.add(made)
        return made

    def open(self) -> list[StandIn]:
        """Return the sessions that have not ended."""
        return [session for session in self.sessions if not session.closed]


class StandIn(Connection):
    """A connection that was never connected: what the pool asks of the driver, and no more."""

    closed: Any = 0
    status: Any = STATUS_READY
    encoding: Any = "UTF8"
    autocommit: Any = False
    cursor_factory: Any = None
    notices: Any = ()

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._in_transaction = False
        self.marks = []
        self.opened_at = 0.0
        self.is_cut = False
        self.opened_encoding = self.encoding
        self.notices = []

    def __del__(self) -> None:
        self.end(self)

    def begin(self) -> None:
        """Leave a transaction open."""
        self._in_transaction = True

    def commit(self) -> None:
        """End the transaction."""
        self._in_transaction = False

    rollback = commit

    def get_transaction_status(self) -> int:
        """As libpq's."""
        return TRANSACTION_STATUS_INTRANS if self._in_transaction else TRANSACTION_STATUS_IDLE

    def isexecuting(self) -> bool:
        """Nothing runs here."""
        return False

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set."""

    def fileno(self) -> int:
        """Return a socket that can be polled and duplicated."""
        return self._near.fileno()

    def get_backend_pid(self) -> int:
        """Return a process that nobody has."""
        return 2**22 + 1

    def get_parameter_status(self, parameter: str) -> str:
        """Say what a primary says."""
        return "off"

    def hang_up(self) -> None:
        """End the session from the server's side."""
        self._far.close()

    @staticmethod
    def end(conn: StandIn) -> None:
        """Do as `psycopg2.extensions.connection.close`."""
        conn.closed = 1
        for name in ("_near", "_far"):  # both or none, unless it was interrupted when it was made
            if hasattr(conn, name):
                getattr(conn, name).close()


class Driver:
    """What `shmpool.connection` takes from psycopg2's connection class after it has derived its own."""

    close = staticmethod(StandIn.end)


def replace_driver(monkeypatch: pytest.MonkeyPatch, cap: int) -> Server:
    """Let every connection of this process be a stand-in."""
    server = Server(cap)
    monkeypatch.setattr(psycopg2, "connect", server.connect)
    monkeypatch.setattr(connection, "connection", Driver)
    return server
