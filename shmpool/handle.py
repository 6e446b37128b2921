"""What an application holds between checkout and checkin.

A handle behaves like the psycopg2 connection behind it and is dead after checkin: its methods raise, its cursors are
closed, a second close does nothing, and nothing of it ever reaches the next holder, who has a handle of their own.
It is not an instance of psycopg2's connection class: where psycopg2 wants one (type registration, `as_string`,
`Literal.prepare`), give it a cursor, or do it once in `on_connect`.

Threads.  A handle may be passed between threads and closed in another one; two users at once are not allowed.
Fork.  In a child every use raises, and closing does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from psycopg2.extensions import cursor

from shmpool.pool_errors import ConnectionGivenBackError

if TYPE_CHECKING:
    from shmpool.lease import Lease
    from shmpool.position import CommitPosition

_METHODS: Final = (
    "cancel",
    "commit",
    "rollback",
    "reset",
    "set_client_encoding",
    "set_isolation_level",
    "set_session",
    "tpc_begin",
    "tpc_commit",
    "tpc_prepare",
    "tpc_recover",
    "tpc_rollback",
    "xid",
    "lobject",
    "poll",
    "fileno",
    "isexecuting",
    "get_backend_pid",
    "get_dsn_parameters",
    "get_native_connection",
    "get_parameter_status",
    "get_transaction_status",
)


class Handle:
    """A checked-out connection; attributes that are not listed here are those of the connection."""

    if not TYPE_CHECKING:  # a checker takes the forwarded attributes for slots that are missing
        __slots__ = ("__weakref__", "_lease")

    _lease: Lease | None
    if TYPE_CHECKING:  # made below
        autocommit: bool
        isolation_level: int | None
        readonly: bool | None
        deferrable: bool | None
        cursor_factory: Any
        notices: Any

    def __repr__(self) -> str:
        lease = self._lease
        if lease is None:
            return "<pooled connection, given back>"
        return f"<pooled connection, group {lease.group.settings.name!r}, {lease.connection!r}>"

    def _live(self) -> Lease:
        lease = self._lease
        if lease is None:
            raise ConnectionGivenBackError("this connection was given back to the pool; check out another one")
        if not lease.page[0] and lease.group.attachment.pid != os.getpid():
            raise ConnectionGivenBackError(
                "this connection belongs to the process that checked it out, not to its child; check out another one"
            )
        return lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live().connection, name)

    def cursor(self, *args: Any, **kwargs: Any) -> cursor:
        """As psycopg2's `connection.cursor`; the cursor is closed when the connection is given back."""
        lease = self._lease
        if lease is None or not lease.page[0]:
            lease = self._live()
        conn = lease.connection
        cur: cursor = conn.cursor(*args, **kwargs) if args or kwargs else conn.cursor()
        return cur

    def commit_position(self) -> CommitPosition:
        """Return a position that covers every commit made here so far, for `Pool.connection(..., after=...)`.

        Call it after the commit: one round trip.  What others commit meanwhile may be covered, too.

        Raises:
            psycopg2.ProgrammingError: a transaction is open, or the connection leads to a replica.
        """
        return self._live().connection.commit_position()

    def close(self) -> None:
        """Give the connection back to its pool; a second time: nothing."""
        lease = self._lease
        if lease is not None:
            lease.pool.checkin(self)

    @property
    def closed(self) -> int:
        """As psycopg2's: 0 while it can be used."""
        lease = self._lease
        return 1 if lease is None else int(lease.connection.closed)

    def __enter__(self) -> Self:
        """As psycopg2's: a transaction block; leaving it commits or rolls back and keeps the connection."""
        self._live().connection.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease = self._lease
        if lease is not None:
            lease.connection.__exit__(kind, error, trace)


def _method(name: str) -> Callable[..., Any]:
    """Return a method that looks at the handle when it is called: one kept beyond checkin raises."""

    def call(self: Handle, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._live().connection, name)(*args, **kwargs)

    call.__name__ = name
    call.__doc__ = f"As psycopg2's `{name}`."
    return call


def _forwarded(name: str) -> property:
    def get(self: Handle) -> Any:
        return getattr(self._live().connection, name)

    def put(self: Handle, value: Any) -> None:
        setattr(self._live().connection, name, value)

    return property(get, put, doc=f"As psycopg2's `{name}`; undone at checkin.")


for _name in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory", "notices"):
    setattr(Handle, _name, _forwarded(_name))

for _name in _METHODS:
    setattr(Handle, _name, _method(_name))
