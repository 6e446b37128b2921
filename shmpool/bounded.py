"""Connections whose queries are bounded in time on this side (`query_timeout`).

The classes here are laid over the application's own, in groups that have the setting and in no other.  They note since
when a call waits for the server; when that is too long, the thread of watch.py shuts down a duplicate of the socket's
descriptor, which ends the wait inside libpq at once, over TLS as well.  What the call raises then is QueryTimeout, or
TransactionOutcomeUnknown because of it (losses.py).

What counts is the time of one call: `execute`, one round of `executemany`, one fetch from a named cursor, a commit.
In a COPY it begins anew with each piece that moves, and stands still while the application's file is read or written.
Large objects are not bounded, nor are cursor factories that are not classes.

Guarantees: a connection that was cut is closed at checkin; none is cut whose call has ended.
Threads.  The watching thread reads `asked_at` and libpq's transaction status; both are single loads, without a lock.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, cast

from psycopg2 import InterfaceError
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, connection, cursor

from shmpool.clock import monotonic
from shmpool.connection import Connection
from shmpool.losses import (
    ASKING_OF_NAMED,
    SESSION_PROPERTIES,
    TellingCursor,
    TellingNamedCursor,
    laid_over,
)
from shmpool.pool_errors import QueryTimeout
from shmpool.watch import watch

_NEVER: Final = float("inf")
_ASKING: Final = (
    "commit",
    "rollback",
    "reset",
    "set_session",
    "set_isolation_level",
    "set_client_encoding",
    "tpc_begin",
    "tpc_commit",
    "tpc_prepare",
    "tpc_recover",
    "tpc_rollback",
)


def _ask(conn: BoundedConnection, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Make a call that waits for the server, and note since when."""
    before, conn.asked_at = conn.asked_at, monotonic()
    try:
        return call(*args, **kwargs)
    finally:
        conn.asked_at = before


def _asking(kind: type, name: str) -> Callable[..., Any]:
    """Return the method `name` of what `kind` is laid over, bounded."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        conn = self if isinstance(self, BoundedConnection) else self.connection
        return _ask(conn, getattr(super(kind, self), name), *args, **kwargs)

    call.__name__ = name
    call.__doc__ = f"As psycopg2's `{name}`, bounded in time."
    return call


class BoundedCursor(TellingCursor):
    """A cursor of a bounded connection: laid over the application's own class."""

    __slots__ = ()

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's, bounded in time; as `_ask`, without its frames."""
        conn = _connection_of(self)
        before, conn.asked_at = conn.asked_at, monotonic()
        try:
            return super().execute(*args, **kwargs)
        finally:
            conn.asked_at = before

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's, bounded in time."""
        return _ask(_connection_of(self), super().callproc, *args, **kwargs)

    def executemany(self, query: Any, vars_list: Iterable[Any]) -> None:
        """As psycopg2's, each round bounded in time."""
        conn = _connection_of(self)
        _ask(conn, super().executemany, query, _each(conn, vars_list))

    def copy_from(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, each piece bounded in time."""
        conn = _connection_of(self)
        _ask(conn, super().copy_from, _pieces(conn, file), *args, **kwargs)

    def copy_to(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, each piece bounded in time."""
        conn = _connection_of(self)
        _ask(conn, super().copy_to, _pieces(conn, file), *args, **kwargs)

    def copy_expert(self, sql: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, each piece bounded in time."""
        conn = _connection_of(self)
        _ask(conn, super().copy_expert, sql, _pieces(conn, file), *args, **kwargs)


class BoundedNamedCursor(BoundedCursor, TellingNamedCursor):
    """A server-side cursor: it asks at each fetch."""

    __slots__ = ()


for _name in ASKING_OF_NAMED:
    setattr(BoundedNamedCursor, _name, _asking(BoundedNamedCursor, _name))


class BoundedConnection(Connection):
    """A pooled connection that is cut when an answer takes too long: laid over the application's own class."""

    own_cursor = BoundedCursor
    cursor_layer = BoundedCursor
    named_cursor_layer = BoundedNamedCursor
    asked_at: float = _NEVER  # CLOCK_MONOTONIC; infinite while nothing is asked
    query_timeout: float = _NEVER  # seconds
    is_late: bool = False  # it was cut for that
    _twin: socket.socket | None = None  # of a number that stays ours when libpq closes its own
    _tell: Callable[[str], None]

    def watch(self, seconds: float, tell: Callable[[str], None]) -> None:
        """Bound every answer from now on.

        Args:
            tell: called in the watching thread when the connection was cut, with what happened.
        """
        self.query_timeout = seconds
        self._tell = tell
        self._twin = socket.socket(fileno=os.dup(self.fileno()))
        watch().add(self)

    def let_go(self) -> None:
        """As Connection's: it is not cut any more from here on."""
        watch().forget(self)
        twin, self._twin = self._twin, None
        if twin is not None:
            twin.close()

    def cut_if_waiting(self, asked_at: float) -> bool:
        """Cut it if it still waits for what was asked then; return whether it was (watching thread).

        The marks come first: a call that ends meanwhile leaves a connection that its checkin closes.
        """
        if not self._waits() or self._twin is None:
            return False
        self.is_cut = self.is_late = True
        self.marks.append(None)
        if self.asked_at != asked_at or not self._waits():
            return False
        with contextlib.suppress(OSError):  # the other end has just gone
            self._twin.shutdown(socket.SHUT_RDWR)
        return True

    def tell_cut(self) -> None:
        """Tell the group."""
        self._tell(f"no answer within query_timeout, {self.query_timeout:g} s: a connection was cut")

    def _waits(self) -> bool:
        """Whether libpq waits for the server; else the time is the application's."""
        with contextlib.suppress(InterfaceError):
            return connection.get_transaction_status(self) == TRANSACTION_STATUS_ACTIVE
        return False

    def cut_error(self) -> QueryTimeout | None:
        """As Connection's: a wait that was too long."""
        return QueryTimeout(self.query_timeout) if self.is_late else None


for _name in _ASKING:
    setattr(BoundedConnection, _name, _asking(BoundedConnection, _name))


def _asking_property(name: str) -> property:
    base: property = getattr(Connection, name)
    assert base.fset is not None
    put = base.fset
    return property(base.fget, lambda self, value: _ask(self, put, self, value), doc=base.__doc__)


for _name in SESSION_PROPERTIES:
    setattr(BoundedConnection, _name, _asking_property(_name))


BoundedConnection.may_choose = False  # it has no `cursor` of its own; what is laid over an application's class may


def bounded(factory: type[Connection]) -> type[Connection]:
    """Return a connection class laid over another one; the same one each time."""
    return cast(type[Connection], laid_over(factory, BoundedConnection))


def _connection_of(cur: cursor) -> BoundedConnection:
    return cast(BoundedConnection, cur.connection)


def _each(conn: BoundedConnection, items: Iterable[Any]) -> Iterator[Any]:
    """Pass on the arguments of each round, whose time begins with them."""
    for item in items:
        conn.asked_at = monotonic()
        yield item


class _Pieces:
    """The application's file in a COPY: its own time does not count, and each piece begins the server's anew."""

    def __init__(self, conn: BoundedConnection, file: Any) -> None:
        self._conn = conn
        self._file = file

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        return partial(self._aside, value) if name in ("read", "readline", "write") else value

    def _aside(self, call: Callable[..., Any], *args: Any) -> Any:
        self._conn.asked_at = _NEVER
        try:
            return call(*args)
        finally:
            self._conn.asked_at = monotonic()


class _TextPieces(_Pieces, io.TextIOBase):
    """The same for a text file: psycopg2 tells the two by this class."""

    def read(self, size: int | None = -1, /) -> str:
        """As the file's."""
        return cast(str, self._aside(self._file.read, size))

    def write(self, text: str, /) -> int:
        """As the file's."""
        return cast(int, self._aside(self._file.write, text))


def _pieces(conn: BoundedConnection, file: Any) -> _Pieces:
    return _TextPieces(conn, file) if isinstance(file, io.TextIOBase) else _Pieces(conn, file)
