"""pgdbpool's classes, in front of a backend: `Connection`, `Query` and `Handler`.

`Connection` stands for the whole process, as in pgdbpool: `Connection.init(config)` once, then
`with Handler(group) as db: db.query(...)`.

Threads.  What is safe depends on `type`: 'threaded' is, 'non-threaded' is for one thread.
Fork.  A child has connections of its own, made when it first needs them; a handler stays with the process that made it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from shmpool.pgdbpool import session
from shmpool.pgdbpool.backend import Backend
from shmpool.pgdbpool.configuration import SHARED, GroupSettings, Settings, parse
from shmpool.pgdbpool.errors import (
    DBConfigurationError,
    DBConnectionError,
    DBOfflineError,
    DBQueryError,
    DBTimeoutError,
    UnconfiguredGroupError,
)
from shmpool.pgdbpool.private_pool import TRIES, PrivatePool

__all__ = [
    "Connection",
    "DBConfigurationError",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "DBTimeoutError",
    "Handler",
    "Query",
    "UnconfiguredGroupError",
    "conn_iter",
    "conn_iter_locked",
]

ConnectionId = tuple[str, int]  # group, number within the group

_STATUSES: Final = {"free": False, "occupied": True}
_locks: dict[int, threading.RLock] = {}  # by process: a parent may have held its own while it forked


class Connection:
    """The connections of this process."""

    _current: ClassVar[Backend | None] = None

    @classmethod
    def init(cls, config: Any) -> None:
        """Connect as the configuration says; what was set up before is closed, as soon as it is not in use.

        One endpoint that can be reached is enough.  The configuration dictionary is not changed.

        Raises:
            DBConfigurationError: says everything that is wrong; nothing was changed.
            DBConnectionError: no endpoint can be reached, and why; handlers made from now on try again.
        """
        backend = _backend_of(parse(config))
        with _lock():
            former = cls._current
            if former is not None and not former.is_inherited:
                former.close()
            try:
                backend.open()
            finally:
                cls._current = backend

    @classmethod
    def get_threading_model(cls) -> str:
        """Return the configuration's `type`."""
        return _backend().settings.type

    @classmethod
    def get_max_pool_size(cls, group: str) -> int:
        """Return how many connections a group has."""
        return _group(group).connection_count

    @classmethod
    def get_connection_iter_container(cls, group: str) -> Iterator[tuple[int, Any] | None]:
        """Return an iterator over a group's connections in rotation; see `conn_iter`."""
        return conn_iter(group)

    @classmethod
    def get_connection_container(cls, connection: ConnectionId) -> tuple[Any, str]:
        """Return the psycopg2 connection of (group, number) and its status, 'free' or 'occupied'."""
        conn, is_occupied = _backend().look(*connection)
        return conn, "occupied" if is_occupied else "free"

    @classmethod
    def get_connection(cls, connection: ConnectionId) -> tuple[Any, str]:
        """Do as `get_connection_container`."""
        return cls.get_connection_container(connection)

    @classmethod
    def get_connection_count(cls, connection: ConnectionId) -> int:
        """Return how many connections of the group of (group, number) are occupied."""
        group, _ = connection
        return _backend().occupied(group)

    @classmethod
    def set_connection_status(cls, connection: ConnectionId, status: str) -> None:
        """Let (group, number) be 'free' or 'occupied'; a free one goes to who has waited longest."""
        if status not in _STATUSES:
            raise ValueError(f"status: found {status!r}, expected 'free' or 'occupied'")
        _backend().mark(*connection, is_occupied=_STATUSES[status])

    @classmethod
    def get_next_connection(cls, group: str) -> tuple[int, Any] | None:
        """Take a group's next free connection and return its number and itself; None: all are occupied.

        It stays occupied until `set_connection_status` says otherwise.
        """
        return next(conn_iter(group))

    @classmethod
    def connect(cls, connection: ConnectionId) -> None:
        """Replace the connection of (group, number) by a new one.

        Raises:
            DBConnectionError: no endpoint can be reached, and why.
        """
        try:
            _backend().reopen(*connection)
        except DBOfflineError as error:
            raise DBConnectionError(str(error)) from error

    @classmethod
    def reconnect(cls, connection: ConnectionId) -> None:
        """Ask the server of (group, number) for a sign of life, and connect anew if there is none.

        Raises:
            DBOfflineError: no endpoint could be reached in ten tries, and why.
        """
        try:
            Query.check_db(connection)
        except DBOfflineError:
            _backend().reopen(*connection, tries=TRIES)


class Query:
    """Statements on a connection named by (group, number)."""

    @staticmethod
    def execute(connection: ConnectionId, sql_statement: Any, sql_params: Any = None) -> Any:
        """Run a statement and return its cursor, a psycopg2 DictCursor.

        Raises:
            DBQueryError: it failed.  `pgcode` and `__cause__` tell more.
            DBOfflineError: the connection is gone and there is no other.
        """
        return _execute(_backend(), connection, sql_statement, sql_params)

    @staticmethod
    def execute_prepared(connection: ConnectionId, sql_params: Any) -> Any:
        """Run a query prepared by pg_extensions' prep_queries (group setting `sqlprepare`) and return its result.

        A failing one returns JSON text: `error` (true), `exception` (the driver's class), `exceptionCause` (its text).

        Raises:
            DBOfflineError: the connection is gone and there is no other.
        """
        return _execute_prepared(_backend(), connection, sql_params)

    @staticmethod
    def check_db(connection: ConnectionId) -> None:
        """Ask the server for a sign of life: one round trip.

        Raises:
            DBOfflineError: there is none.
        """
        conn, _ = _backend().look(*connection)
        if conn is None:
            raise DBOfflineError(f"connection {connection!r} was not made yet")
        session.check(conn)


class Handler:
    """One connection of a group for the length of a `with` block.

    Leaving the block commits what is open, or rolls it back if an exception leaves it.  Without a block the connection
    is kept until the handler is dropped.

    Raises:
        UnconfiguredGroupError, DBTimeoutError, DBOfflineError: there is no such group, no free connection, no server.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._last: Any = None
        self._is_over = False
        self._home = _backend()
        number = self._home.checkout(group, self)
        assert number is not None  # it waits
        self._connection: ConnectionId = (group, number)

    def __enter__(self) -> Self:
        self._backend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the connection back.

        Raises:
            DBQueryError: what was to be committed was not.
        """
        if self._is_over or self._home.is_inherited:
            return
        self._is_over = True
        self._last = self._home.look(*self._connection)[0]
        self._home.checkin(*self._connection, commits=kind is None)

    @property
    def conn_ref(self) -> Any:
        """The psycopg2 connection behind the handler, also after it was replaced; afterwards, the last one."""
        if self._is_over:
            return self._last
        return self._backend().look(*self._connection)[0]

    def query(self, statement: Any, params: Any = None) -> Any:
        """Run a statement; see `Query.execute`."""
        return _execute(self._backend(), self._connection, statement, params)

    def query_prepared(self, params: Any) -> Any:
        """Run a prepared query; see `Query.execute_prepared`."""
        return _execute_prepared(self._backend(), self._connection, params)

    def commit(self) -> None:
        """Commit; needed in groups without autocommit only, and there at the latest the end of the block does it.

        Raises:
            psycopg2.Error: the driver's, as it is.
        """
        self._backend().commit(*self._connection)

    def _backend(self) -> Backend:
        if self._is_over:
            raise DBConnectionError(f"this handler of group {self._group!r} was left; make another one")
        if self._home.is_inherited:
            raise DBConnectionError(
                f"this handler of group {self._group!r} belongs to the parent process; make another one here"
            )
        return self._home


class _ConnectionIterator:
    """The rotation of a group, as an iterator; safe under threads as far as the pool is."""

    def __init__(self, group: str) -> None:
        self._group = group

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Any] | None:
        backend = _backend()
        number = backend.checkout(self._group, waits=False)
        return None if number is None else (number, backend.look(self._group, number)[0])


def conn_iter(connection_group: str) -> Iterator[tuple[int, Any] | None]:
    """Return an endless iterator that takes a group's next free connection at each step: (number, connection).

    A step yields None while all are occupied.  Iterators of one group share its rotation.
    """
    return _ConnectionIterator(connection_group)


def conn_iter_locked(iterator: Iterator[tuple[int, Any] | None]) -> Iterator[tuple[int, Any] | None]:
    """Return an iterator of `conn_iter` as it is: it needs no lock around it.  Older versions of pgdbpool have this."""
    return iterator


def _backend_of(settings: Settings) -> Backend:
    """Return a backend for a configuration's `type`, without a connection yet."""
    if settings.type != SHARED:
        return PrivatePool(settings)
    from shmpool.pgdbpool.shared import SharedPool  # here: the others need nothing of it

    return SharedPool(settings)


def _lock() -> threading.RLock:
    return _locks.setdefault(os.getpid(), threading.RLock())


def _backend() -> Backend:
    """Return what serves this process; in a child, one of its own."""
    backend = Connection._current
    if backend is not None and not backend.is_inherited:
        return backend
    if backend is None:
        raise DBConnectionError("there are no connections yet: call Connection.init(config) first")
    with _lock():
        backend = Connection._current
        assert backend is not None
        if backend.is_inherited:
            backend = Connection._current = backend.renewed()
        return backend


def _group(name: str) -> GroupSettings:
    groups = _backend().settings.groups
    try:
        return groups[name]
    except KeyError:
        raise UnconfiguredGroupError(name, groups) from None


def _execute(backend: Backend, connection: ConnectionId, sql: Any, params: Any) -> Any:
    return session.execute(backend.ready(*connection), sql, params)


def _execute_prepared(backend: Backend, connection: ConnectionId, params: Any) -> Any:
    if params is None:
        raise ValueError("sql_params: found None, expected the arguments of the prepared query")
    conn = backend.ready(*connection)
    try:
        return session.execute_prepared(conn, params)
    except DBQueryError as error:
        cause = error.__cause__
        return json.dumps({"error": True, "exception": type(cause).__name__, "exceptionCause": str(cause)})
