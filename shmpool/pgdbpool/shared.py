"""The pool of the whole host, behind pgdbpool's interface: what `type: 'shared'` stands for.

The dictionary is turned into a shmpool configuration, which the process carries itself (`Pool(config=...)`): one
coordinator for each distinct dictionary, started by the first process that takes a connection.  `connection_count` then
counts for all processes of the host together.

A connection has a number while it is in use, the lowest that is free in this process: nothing else is known of the
others.

Guarantees: making one attaches and starts nothing; as for `shmpool.Pool` in everything else.
Threads.  Any number.  Fork.  A child has connections of its own; a number stays with the process that took it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg2
from psycopg2.extensions import make_dsn

from shmpool.clock import monotonic
from shmpool.handle import Handle
from shmpool.lease import give_back
from shmpool.names import POOL_NAME
from shmpool.pgdbpool import session
from shmpool.pgdbpool.configuration import EndpointSettings, GroupSettings, Settings
from shmpool.pgdbpool.errors import (
    DBConfigurationError,
    DBConnectionError,
    DBOfflineError,
    DBTimeoutError,
    UnconfiguredGroupError,
)
from shmpool.pool import Pool
from shmpool.pool_errors import CoordinatorNotRunning, NoEligibleEndpoint, PoolError, PoolTimeout
from shmpool.segment import private_page
from shmpool.session import close_cursors

DIGEST_CHARS: Final = 16
DEFAULT_PORT: Final = "5432"
MOST_ENDPOINTS: Final = 64
MOST_GROUPS: Final = 64
MOST_CONNECTIONS: Final = 65_535
MOST_SLOTS: Final = 256  # of a worker row; a worker that needs more takes a further row
LEAST_SLOTS: Final = 32
LEAST_RETRY_S: Final = 0.1
START_WITHIN_S: Final = 10.0
START_PAUSE_S: Final = 0.02  # between looks for a coordinator that is being started


class SharedPool:
    """See the module; `shmpool.pgdbpool.backend.Backend` says what each method promises.

    Raises:
        DBConfigurationError: there is no such shared pool.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._page = private_page()
        self._page[0] = 1
        config, passwords, self._names = translate(settings)
        plain = Pool(config=config, passwords=passwords)
        preparing = plain
        if any(group.sqlprepare for group in settings.groups.values()):
            preparing = Pool(config=config, passwords=passwords, on_connect=_prepare)
        self._pools = {name: preparing if group.sqlprepare else plain for name, group in settings.groups.items()}
        self._held: dict[tuple[str, int], _Held] = {}

    def __repr__(self) -> str:
        return f"<SharedPool {next(iter(self._pools.values())).name!r}>"

    @property
    def is_inherited(self) -> bool:
        return not self._page[0]

    def renewed(self) -> SharedPool:
        return SharedPool(self.settings)

    def open(self) -> None:
        """Do nothing: the first connection is made when it is needed, in the process that needs it."""

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def checkout(self, group: str, holder: object | None = None, *, waits: bool = True) -> int | None:
        known = self._group(group)
        held = _Held()
        number = next(n for n in itertools.count() if self._held.setdefault((group, n), held) is held)
        key = (group, number)
        try:
            if holder is not None:
                held.holder = weakref.ref(holder, lambda _: self._held.pop(key, None))
            held.handle = self._checkout(known, waits=waits)
            held.is_at_stake = not known.autocommit
        except BaseException as error:
            self._held.pop(key, None)
            if not waits and isinstance(error, DBTimeoutError):
                return None
            raise
        return number

    def checkin(self, group: str, number: int, *, commits: bool) -> None:
        known, held = self._group(group), self._held.pop((group, number), None)
        handle = None if held is None else held.handle
        if handle is None or handle._lease is None:  # its user has given it back
            return
        try:
            session.finish(_connection(handle), known, commits=commits)
        finally:
            _give_back(handle)

    def mark(self, group: str, number: int, *, is_occupied: bool) -> None:
        held = self._of(group, number)
        if is_occupied:
            held.holder = None
        elif self._held.pop((group, number), None) is held and held.handle is not None:
            _give_back(held.handle)

    def look(self, group: str, number: int) -> tuple[Any, bool]:
        self._group(group)
        held = self._held.get((group, number))
        handle = None if held is None else held.handle  # None also for one that is being waited for
        return handle, handle is not None

    def occupied(self, group: str) -> int:
        self._group(group)
        return sum(name == group and held.handle is not None for (name, _), held in tuple(self._held.items()))

    def ready(self, group: str, number: int) -> Any:
        known, held = self._group(group), self._of(group, number)
        handle = held.handle
        is_closed = handle is None or handle.closed
        if is_closed and held.is_at_stake:
            raise DBOfflineError(
                f"group {group!r}: the connection was lost in a transaction; leave the handler, and begin again"
            )
        if handle is None or is_closed or session.is_dropped(_connection(handle)):
            handle = self._replace(known, held)
        held.is_at_stake = not known.autocommit or session.is_in_transaction(_connection(handle))
        return handle

    def commit(self, group: str, number: int) -> None:
        held = self._of(group, number)
        if held.handle is None:
            raise DBOfflineError(f"group {group!r}: the connection was lost, and there was no other")
        try:
            held.handle.commit()
        finally:
            held.is_at_stake = False

    def reopen(self, group: str, number: int, *, tries: int = 1) -> None:
        self._replace(self._group(group), self._of(group, number))

    def _group(self, name: str) -> GroupSettings:
        try:
            return self.settings.groups[name]
        except KeyError:
            raise UnconfiguredGroupError(name, self.settings.groups) from None

    def _of(self, group: str, number: int) -> _Held:
        self._group(group)
        try:
            return self._held[group, number]
        except KeyError:
            raise DBConnectionError(
                f"connection {(group, number)!r} is not in use in this process, and with type 'shared' only those that "
                "are have numbers: take one by Handler, conn_iter or get_next_connection"
            ) from None

    def _replace(self, group: GroupSettings, held: _Held) -> Handle:
        """Close a connection and take another one in its place."""
        handle, held.handle = held.handle, None
        if handle is not None:
            _discard(handle)
        held.handle = new = self._checkout(group, waits=True)
        held.is_at_stake = not group.autocommit
        return new

    def _checkout(self, group: GroupSettings, *, waits: bool) -> Handle:
        """Return a connection; the group's time for it begins when a coordinator is there."""
        pool, name = self._pools[group.name], self._names[group.name]
        start_until = monotonic() + START_WITHIN_S
        with _translated(group.name):
            while True:
                try:
                    return pool.checkout(name, timeout=group.timeout if waits else 0.0)
                except CoordinatorNotRunning as error:
                    if not error.is_passing or monotonic() >= start_until:
                        raise
                time.sleep(START_PAUSE_S)


class _Held:
    """A connection in use."""

    __slots__ = ("handle", "holder", "is_at_stake")

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self.holder: weakref.ref[Any] | None = None  # whose death lets the handle fall, and thereby gives it back
        self.is_at_stake = False  # a transaction would be lost with the connection, as far as is known


def _connection(handle: Handle) -> Any:
    """Return what is behind a handle that is in use."""
    lease = handle._lease
    assert lease is not None
    return lease.connection


def _give_back(handle: Handle) -> None:
    """Give a connection back; rows that were not read yet stay with their cursors (kept_cursor.py)."""
    if handle._lease is not None:
        close_cursors(handle._lease.connection)  # the pool closes none where somebody waits for the permit
        handle.close()


def _discard(handle: Handle) -> None:
    """Close a connection instead of giving it back to the pool; its permits go back."""
    lease = handle._lease
    if lease is not None:
        close_cursors(lease.connection)
        handle._lease = None
        give_back(lease)


@contextmanager
def _translated(group: str) -> Iterator[None]:
    """Raise pgdbpool's exceptions instead of the pool's and the driver's."""
    try:
        yield
    except PoolTimeout as error:
        raise DBTimeoutError(f"group {group!r}: {error}") from error
    except NoEligibleEndpoint as error:
        raise DBOfflineError(f"group {group!r}: {error}") from error
    except PoolError as error:
        raise DBConnectionError(f"group {group!r}: {error}") from error
    except psycopg2.Error as error:
        raise DBOfflineError(f"group {group!r}: no server can be reached: {error}") from error


def _prepare(conn: Any) -> None:
    """Prepare the queries of a new connection, outside any transaction."""
    before = conn.autocommit
    conn.autocommit = True
    session.prepare_queries(conn)
    conn.autocommit = before


# -- The dictionary as a shmpool configuration


def translate(settings: Settings) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the configuration of a shared pool, its passwords by endpoint, its groups' names by pgdbpool's.

    The pool's name is made from everything that matters but the passwords: who could read a digest over a password
    could try passwords against it.

    Raises:
        DBConfigurationError: there is no such shared pool.
    """
    _check(settings)
    groups = settings.groups
    total = sum(group.connection_count for group in groups.values())
    names = _group_names(groups)
    config: dict[str, Any] = {
        "limits": {
            "slots_per_worker": min(MOST_SLOTS, max(LEAST_SLOTS, total)),
            "endpoints": MOST_ENDPOINTS,
            "groups": MOST_GROUPS,
        },
        "coordinator": {"linger": settings.linger},
        "probe": {
            "downinter": max(LEAST_RETRY_S, min(one.connection_retry_sleep for one in settings.endpoints)),
            "conninfo": "options='-c statement_timeout=0'",  # that of the endpoint is for the application's statements
        },
        "endpoints": {
            f"db{number}": {"conninfo": _conninfo(endpoint), "max_connections": total}
            for number, endpoint in enumerate(settings.endpoints, 1)
        },
        "groups": {
            names[group.name]: {
                "connections": group.connection_count,
                "target": "any",
                "policy": "round-robin",
                "autocommit": group.autocommit,
                "per_worker_max": min(MOST_SLOTS, group.connection_count),
                "timeout": group.timeout,
            }
            for group in groups.values()
        },
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    config["name"] = f"pgdbpool-{digest[:DIGEST_CHARS]}"
    passwords = {
        f"db{number}": endpoint.password for number, endpoint in enumerate(settings.endpoints, 1) if endpoint.password
    }
    return config, passwords, names


def _check(settings: Settings) -> None:
    problems = [
        f"{what}: found {found}, expected {least} to {most} with type 'shared'"
        for what, found, least, most in (
            ("db", len(settings.endpoints), 1, MOST_ENDPOINTS),
            ("groups", len(settings.groups), 1, MOST_GROUPS),
            (
                "connection_count of all groups",
                sum(group.connection_count for group in settings.groups.values()),
                1,
                MOST_CONNECTIONS,
            ),
        )
        if not least <= found <= most
    ]
    for number, endpoint in enumerate(settings.endpoints):
        host = _known(endpoint.host, "PGHOST")
        if not host or "," in host:
            problems.append(
                f"db[{number}]: found host {host or None!r}, expected one host with type 'shared', here or in PGHOST; "
                "a further one has an entry of its own"
            )
    if problems:
        raise DBConfigurationError(problems)


def _conninfo(endpoint: EndpointSettings) -> str:
    """Return where an entry of `db` leads, whatever the environment of a process that reads it says."""
    keywords = {
        "host": _known(endpoint.host, "PGHOST"),
        "port": _known(None if endpoint.port is None else str(endpoint.port), "PGPORT") or DEFAULT_PORT,
        "dbname": _known(endpoint.name, "PGDATABASE"),
        "user": _known(endpoint.user, "PGUSER"),
        "sslmode": endpoint.ssl,
        "connect_timeout": str(endpoint.connect_timeout),
        "options": f"-c statement_timeout={endpoint.query_timeout} -c temp_buffers={endpoint.session_tmp_buffer}MB",
    }
    return str(make_dsn(**{key: value for key, value in keywords.items() if value}))


def _known(value: str | None, variable: str) -> str:
    return value or os.environ.get(variable, "")


def _group_names(groups: Mapping[str, GroupSettings]) -> dict[str, str]:
    """Return names that a shmpool configuration allows: pgdbpool's own where they are, else `group-1` and so on."""
    names = {name: name for name in groups if POOL_NAME.fullmatch(name)}
    free = (f"group-{number}" for number in itertools.count(1))
    for name in sorted(set(groups) - set(names)):
        names[name] = next(new for new in free if new not in groups)
    return names
