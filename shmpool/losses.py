"""What a lost or cut connection is told as: psycopg2's classes, with calls that say what is known.

The connection class is the pool's own; over cursor classes, the application's too, a layer is laid.  A call that fails
is looked at once: if the connection went with it, ConnectionLost or TransactionOutcomeUnknown leaves, with psycopg2's
error as its cause.  Any other error stays as it is, and so does InterfaceError, which a connection that was lost
earlier raises.

A transaction is known to be open by psycopg2's own account, which does not see BEGIN and COMMIT as statements; a lost
call is not taken for harmless if its text ended a transaction.  Large objects and cursor factories that are not
classes raise what psycopg2 raises.

The price of a call that succeeds is one frame.  Threads.  Nothing here is shared but a connection's attributes.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Any, Final

from psycopg2 import DatabaseError
from psycopg2.errorcodes import READ_ONLY_SQL_TRANSACTION
from psycopg2.extensions import (
    STATUS_READY,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_UNKNOWN,
    connection,
    cursor,
)

from shmpool.pool_errors import ConnectionLost, PoolError, TransactionOutcomeUnknown

_LAST_WORDS: Final = ("FATAL", "PANIC")  # severities after which the server ends the session
_COMMENT: Final = re.compile(rb"/\*.*?\*/|--[^\n]*", re.DOTALL)
_ENDS_TRANSACTION: Final = re.compile(rb"(?:^|;)\s*(?:commit|end|prepare\s+transaction)\b", re.IGNORECASE)
ASKING_OF_NAMED: Final = ("fetchone", "fetchmany", "fetchall", "scroll", "close", "__next__")
_ASKING: Final = ("rollback", "reset", "set_client_encoding", "tpc_begin", "tpc_recover", "lobject")
_ENDING_PREPARED: Final = ("tpc_prepare", "tpc_commit", "tpc_rollback")
_SETTING: Final = ("set_session", "set_isolation_level")
SESSION_PROPERTIES: Final = ("autocommit", "isolation_level", "readonly", "deferrable")
_execute: Final[Any] = cursor.execute


def tell(conn: TellingConnection, error: DatabaseError, *, is_open: bool, is_sent: bool, may_have_ended: bool) -> None:
    """Raise what is known if the connection was lost with a call that failed; return if it was not.

    A write that was refused as such puts the server's role in doubt.

    Args:
        is_open: a transaction was.
        is_sent: a statement was, in this transaction or without one.
        may_have_ended: the call may have committed or prepared a transaction.
    """
    if not isinstance(error, PoolError) and _is_lost(conn, error):
        timeout = conn.cut_error()
        reason: DatabaseError = error
        if timeout is not None:
            timeout.__cause__, reason = error, timeout
        lost: PoolError
        if may_have_ended:
            lost = TransactionOutcomeUnknown(conn.endpoint, reason)
        elif timeout is not None:
            lost, reason = timeout, error
        else:
            lost = ConnectionLost(conn.endpoint, reason, was_in_transaction=is_open, was_sent=is_sent or is_open)
        conn.failure = weakref.ref(lost)
        raise lost from reason
    conn.failure = weakref.ref(error)
    if error.pgcode == READ_ONLY_SQL_TRANSACTION and conn.doubt_role is not None:
        conn.doubt_role()


def _is_lost(conn: TellingConnection, error: DatabaseError) -> bool:
    return bool(
        conn.closed
        or conn.is_cut
        or conn.get_transaction_status() == TRANSACTION_STATUS_UNKNOWN
        or error.diag.severity_nonlocalized in _LAST_WORDS
    )


def _tell_statement(cur: cursor, error: DatabaseError) -> None:
    """Do as `tell` for a statement.  If psycopg2's own BEGIN did not succeed, nothing else was sent."""
    conn: Any = cur.connection
    is_open = conn.status != STATUS_READY
    text = _COMMENT.sub(b" ", cur.query or b"")
    may_have_ended = (is_open or conn.autocommit) and _ENDS_TRANSACTION.search(text) is not None
    tell(conn, error, is_open=is_open, is_sent=conn.autocommit, may_have_ended=may_have_ended)


class TellingCursor(cursor):
    """A cursor of a pooled connection: laid over the application's own class."""

    __slots__ = ()  # as psycopg2's, which is made faster without a dictionary

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's."""
        try:
            return super().execute(*args, **kwargs)
        except DatabaseError as error:
            _tell_statement(self, error)
            raise


class PlainCursor(TellingCursor):
    """The same over psycopg2's own class: no other can lie between, so that it is called without `super`."""

    __slots__ = ()

    def execute(self, query: Any, vars: Any = None) -> Any:  # noqa: A002  psycopg2's name
        """As psycopg2's."""
        try:
            return _execute(self, query, vars)
        except DatabaseError as error:
            _tell_statement(self, error)
            raise


class TellingNamedCursor(TellingCursor):
    """A server-side cursor: it asks at each fetch."""

    __slots__ = ()


def _telling_statement(name: str) -> Callable[..., Any]:
    def call(self: TellingCursor, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(TellingCursor, self), name)(*args, **kwargs)
        except DatabaseError as error:
            _tell_statement(self, error)
            raise

    return call


def _telling_fetch(name: str) -> Callable[..., Any]:
    def call(self: TellingNamedCursor, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(TellingNamedCursor, self), name)(*args, **kwargs)
        except DatabaseError as error:
            conn: Any = self.connection
            tell(conn, error, is_open=conn.status != STATUS_READY, is_sent=True, may_have_ended=False)
            raise

    return call


class TellingConnection(connection):
    """A connection that tells; its cursors do, too."""

    own_cursor: type[cursor] = PlainCursor  # where no class was asked for, and for what the pool itself asks
    cursor_layer: type[cursor] = TellingCursor
    named_cursor_layer: type[cursor] = TellingNamedCursor
    endpoint: str = ""
    is_cut: bool  # this side shut the socket down: the end of the stream says nothing about the server's end
    commits: int = 0  # grows whenever work may have been made to last
    doubt_role: Callable[[], None] | None = None  # called where a primary refuses a write
    failure: weakref.ref[Exception] | None = None  # what left the last call that failed
    _cursor_factory: Any = None  # the application's own

    def __init__(self, dsn: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dsn, *args, **kwargs)
        self.is_cut = False
        _set_cursor_factory(self, self.own_cursor)

    def cut_error(self) -> PoolError | None:
        """Return what a call raises whose connection was cut by this side; None: it counts as lost."""
        return None

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's."""
        if args or kwargs:
            return self._cursor_as_asked(args, kwargs)
        cur = super().cursor()
        return cur if type(cur) is self.own_cursor else self._cursor_again(cur, args, kwargs)

    def _cursor_as_asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and isinstance(chosen := kwargs.get("cursor_factory"), type) and len(kwargs) == 1:
            kwargs["cursor_factory"] = laid_over(chosen, self.cursor_layer)
        cur = super().cursor(*args, **kwargs)
        if isinstance(cur, self.cursor_layer) and cur.name is None:
            return cur
        return self._cursor_again(cur, args, kwargs)

    def _cursor_again(self, cur: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a cursor again with a layer: which class it is only the application's own `cursor` may know."""
        layer = self.cursor_layer if cur.name is None else self.named_cursor_layer
        chosen = (args[1] if len(args) > 1 else kwargs.get("cursor_factory")) or self._cursor_factory
        if isinstance(cur, layer) or (chosen is not None and not isinstance(chosen, type)):
            return cur
        over = laid_over(type(cur), layer)
        if len(args) > 1:
            args = (args[0], over, *args[2:])
        else:
            kwargs["cursor_factory"] = over
        return super().cursor(*args, **kwargs)

    def commit(self) -> None:
        """As psycopg2's."""
        before = self.get_transaction_status()
        try:
            super().commit()
        except DatabaseError as error:
            is_open = before != TRANSACTION_STATUS_IDLE
            may_have_ended = is_open and before != TRANSACTION_STATUS_INERROR
            tell(self, error, is_open=is_open, is_sent=is_open, may_have_ended=may_have_ended)
            raise
        if before != TRANSACTION_STATUS_IDLE:
            self.commits += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self.closed:  # else there is nothing to roll back, and the error itself is to be told
            super().__exit__(kind, error, trace)


def _telling(name: str, *, ends_prepared: bool = False) -> Callable[..., Any]:
    def call(self: TellingConnection, *args: Any, **kwargs: Any) -> Any:
        is_open = self.status != STATUS_READY
        try:
            result = getattr(super(TellingConnection, self), name)(*args, **kwargs)
        except DatabaseError as error:
            tell(self, error, is_open=is_open, is_sent=is_open, may_have_ended=ends_prepared)
            raise
        self.commits += ends_prepared
        return result

    return call


def _telling_setting(name: str) -> Callable[..., Any]:
    call = _telling(name)

    def put(self: TellingConnection, *args: Any, **kwargs: Any) -> None:
        call(self, *args, **kwargs)
        self.commits += self.autocommit  # each statement commits by itself from here on

    return put


def _telling_property(name: str) -> property:
    base: Any = connection.__dict__[name]

    def put(self: TellingConnection, value: Any) -> None:
        is_open = self.status != STATUS_READY
        try:
            base.__set__(self, value)
        except DatabaseError as error:
            tell(self, error, is_open=is_open, is_sent=is_open, may_have_ended=False)
            raise
        self.commits += self.autocommit

    return property(base.__get__, put)


def _set_cursor_factory(conn: TellingConnection, factory: Any) -> None:
    connection.__dict__["cursor_factory"].__set__(conn, factory)


def _put_cursor_factory(conn: TellingConnection, factory: Any) -> None:
    """Keep the application's own factory, which it reads back, and let the driver use one with the layer."""
    conn._cursor_factory = factory
    if factory is None or factory is cursor:
        over = conn.own_cursor
    else:
        over = laid_over(factory, conn.cursor_layer) if isinstance(factory, type) else factory
    _set_cursor_factory(conn, over)


def _add(kind: type, name: str, made: Any) -> None:
    if not isinstance(made, property):
        made.__name__ = name
    made.__doc__ = f"As psycopg2's `{name}`."
    setattr(kind, name, made)


for _name in ("callproc", "executemany", "copy_from", "copy_to", "copy_expert"):
    _add(TellingCursor, _name, _telling_statement(_name))
for _name in ASKING_OF_NAMED:
    _add(TellingNamedCursor, _name, _telling_fetch(_name))
for _name in _ASKING:
    _add(TellingConnection, _name, _telling(_name))
for _name in _ENDING_PREPARED:
    _add(TellingConnection, _name, _telling(_name, ends_prepared=True))
for _name in _SETTING:
    _add(TellingConnection, _name, _telling_setting(_name))
for _name in SESSION_PROPERTIES:
    _add(TellingConnection, _name, _telling_property(_name))
_add(TellingConnection, "cursor_factory", property(lambda self: self._cursor_factory, _put_cursor_factory))


def _lay_over(factory: type[Any], layer: type[Any]) -> type[Any]:
    if issubclass(factory, layer):
        return factory
    if issubclass(layer, factory):
        return layer
    return type(factory.__name__, (layer, factory), {"__module__": factory.__module__, "__doc__": factory.__doc__})


laid_over: Final[Any] = lru_cache(128)(_lay_over)
