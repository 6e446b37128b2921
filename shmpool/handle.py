"""What an application holds between checkout and checkin.

A handle behaves like the psycopg2 connection behind it and is dead after checkin: its methods raise, its cursors are
closed, a second close does nothing, and nothing of it ever reaches the next holder, who has a handle of their own.
It is not an instance of psycopg2's connection class: where psycopg2 wants one (type registration, `as_string`,
`Literal.prepare`), give it a cursor, or do it once in `on_connect`.

Threads.  A handle may be passed between threads and closed in another one; two users at once are not allowed.
Fork.  The handle's pool refuses it in a child.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from psycopg2.extensions import cursor

from shmpool.pool_errors import ConnectionGivenBackError

if TYPE_CHECKING:
    from shmpool.local_group import Lease

_PRUNE_AT: Final = 64  # cursors remembered before the dead ones are forgotten


class Handle:
    """A checked-out connection; attributes that are not listed here are those of the connection."""

    __slots__ = ("__weakref__", "_lease")

    _lease: Lease | None

    def __repr__(self) -> str:
        lease = self._lease
        if lease is None:
            return "<pooled connection, given back>"
        return f"<pooled connection, group {lease.group.settings.name!r}, {lease.connection!r}>"

    def _live(self) -> Lease:
        lease = self._lease
        if lease is None:
            raise ConnectionGivenBackError("this connection was given back to the pool; check out another one")
        return lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live().connection, name)

    def cursor(self, *args: Any, **kwargs: Any) -> cursor:
        """As psycopg2's `connection.cursor`; the cursor is closed when the connection is given back."""
        lease = self._lease or self._live()
        cur: cursor = lease.connection.cursor(*args, **kwargs)
        marks = lease.marks
        if len(marks) >= _PRUNE_AT:
            marks[:] = [mark for mark in marks if mark is None or mark() is not None]
        marks.append(weakref.ref(cur))
        return cur

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


def _forwarded(name: str) -> property:
    def get(self: Handle) -> Any:
        return getattr(self._live().connection, name)

    def put(self: Handle, value: Any) -> None:
        setattr(self._live().connection, name, value)

    return property(get, put, doc=f"As psycopg2's `{name}`; undone at checkin.")


for _name in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory", "notices"):
    setattr(Handle, _name, _forwarded(_name))
