"""The pool of one process: checkout, checkin, statistics.

A warm checkout and checkin execute no lock, no system call but a clock read in the vDSO, and no logging: a deque
pop and append, a handful of loads and compares, three stores (`make bench` counts the nanoseconds).

    checkout   this process and row (one load each), epoch and state of the endpoint (one load), lifetime, idle age
    checkin    transaction status, session changes, recall (one load), open cursors, waiting threads

Guarantees: a connection has one user at a time; a handle is dead after checkin; an exception at any point loses
neither connection nor permit (leases are tokens: dropping one gives the slot back).
Assumptions: deque append and pop are atomic; attribute loads and stores are.

Threads.  One pool object serves all threads.  Fork.  A pool made before fork works in each child: it attaches there on
first use, with connections of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from psycopg2.extensions import STATUS_READY, cursor

from shmpool.attachment import Attachment, has_threads, is_coordinated, is_server_starting, join
from shmpool.bounded import bounded
from shmpool.clock import monotonic
from shmpool.connection import Connection, make_recipe
from shmpool.credentials import Lookup
from shmpool.endpoints import is_down
from shmpool.errors import DisownedError, MechanismError, SegmentMissingError, SegmentRetiredError
from shmpool.handle import Handle
from shmpool.lease import BYPASS_S, Lease, give_back, tidy
from shmpool.local_group import LocalGroup
from shmpool.names import Names
from shmpool.pool_errors import ConfigurationDiffers, CoordinatorNotRunning, PoolClosed, PoolError, UnknownGroup
from shmpool.position import CommitPosition
from shmpool.session import are_spent, restore
from shmpool.settings import GIVEN, GroupSettings

if TYPE_CHECKING:
    from shmpool.document import Document

Priority = Literal["normal", "high"]
_Result = TypeVar("_Result")

JOIN_PAUSE_S: Final = 0.02  # between looks for a segment that is about to open
SERVER_STARTS_S: Final = 10.0  # what an application server has to start the coordinator that it brings along
JOIN_WITHIN_S: Final = 5.0  # a checkout's time until the group's own timeout can be read: its default


class Pool:
    """Connections of this process, within the budget of the whole host.

    Cheap to make, also at import and before fork: it attaches on first use in each process.

    Args:
        name: the pool; default: environment variable SHMPOOL_NAME.
        connection_factory: a subclass of `shmpool.Connection`.
        cursor_factory: psycopg2 cursor class for new cursors.
        on_connect: called once with each new connection (type registration, adapters, SET ROLE).
        credentials: called with an endpoint's name before each connect, in the thread that connects; returns the
            password, or a mapping of some of `shmpool.credentials.KEYWORDS` to texts.  Goes before what the
            configuration names for the endpoint.  It must be bounded in time, and not use the pool: a permit is held
            meanwhile.  What it raises is the cause of the psycopg2.OperationalError that `checkout` raises.
        uid: whose pool it is, where that is not the effective user's (`[access] group`, or a process of root).
        config: the whole configuration, tables and keys as in the file, `name` among them: no file is needed.  The
            first process that uses the pool starts a coordinator with it; those with an equal one share that.
        passwords: by endpoint, beside a `config` in which no endpoint has [credentials].  They reach the coordinator
            through a pipe and stay in memory; a process with a newer one hands it over to a living coordinator.

    Raises:
        ValueError, TypeError: there is no name, or it is not allowed; an argument is not what it should be.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        connection_factory: type[Connection] = Connection,
        cursor_factory: type[cursor] | None = None,
        on_connect: Callable[[Any], None] | None = None,
        credentials: Lookup | None = None,
        uid: int | None = None,
        config: Mapping[str, Any] | None = None,
        passwords: Mapping[str, str] | None = None,
    ) -> None:
        self._document = _document(name, config, passwords)
        chosen = name or (os.environ.get("SHMPOOL_NAME") if self._document is None else self._document.name)
        if not chosen:
            raise ValueError("Pool() needs a name, as argument or in the environment variable SHMPOOL_NAME")
        Names.of(chosen, uid)  # a bad name fails here, not at first use
        if not issubclass(connection_factory, Connection):
            raise TypeError(f"connection_factory {connection_factory!r}: expected a subclass of shmpool.Connection")
        if credentials is not None and not callable(credentials):  # not to be quoted: it may be a password
            raise TypeError(f"credentials: found {type(credentials).__name__}, expected a callable that returns them")
        self.name = chosen
        self._uid = uid
        self.connection_factory = connection_factory
        self.cursor_factory = cursor_factory
        self.on_connect = on_connect
        self.credentials = credentials or (self._document.password if passwords and self._document else None)
        self._closed = False
        self._state: _State | None = None
        self._former: list[_State] = []  # of segments that were retired: what is in use goes home through them
        self._config: str | None = None  # the pool's file, if a worker may start a coordinator
        self._idle: dict[str, deque[Lease]] = {}
        self._joining: dict[int, threading.RLock] = {}  # by process: one that forks may hold its own
        _pools.add(self)

    def __repr__(self) -> str:
        return f"<shmpool.Pool {self.name!r}{', closed' if self._closed else ''}>"

    def checkout(self, group: str, timeout: float | None = None, priority: Priority = "normal") -> Handle:
        """Return a connection of a group; give it back with `checkin`, or close the handle.

        Args:
            timeout: seconds to wait at most; default: the group's. 0: do not wait.
            priority: "high" goes before others of this process, and may take what the group has in `reserve`.

        Raises:
            PoolTimeout, TooManyWaiting, NoEligibleEndpoint, UnknownGroup, PoolClosed, CoordinatorNotRunning,
            psycopg2.OperationalError: no endpoint could be reached in time.
        """
        lease = None
        try:
            lease = self._idle[group].pop()
            words = lease.words
            if words[lease.generation_at] == lease.page[0] and words[lease.status_at] == lease.status:
                now = monotonic()
                if now < lease.expires and now - lease.since < BYPASS_S:
                    lease.since = now
                    lease.times[lease.since_at] = now
                    words[lease.use_at] = lease.active_use
                    handle = Handle()
                    handle._lease = lease
                    return handle
        except (KeyError, IndexError, ValueError):
            pass
        return self._checkout_slowly(group, timeout, lease, priority)

    def checkin(self, handle: Handle) -> None:
        """Give a connection back; the handle and its cursors are dead afterwards.  A second time: nothing.

        An open transaction is rolled back, session properties are restored; a connection that cannot be brought
        back in order is closed.  In a child of the process that checked it out: nothing happens to it.
        """
        lease = handle._lease
        if lease is None:
            return
        handle._lease = None
        words = lease.words
        lease.checkouts += 1
        if not lease.page[0] or lease.connection.get_transaction_status() or words[lease.recall_at]:
            self._checkin_slowly(lease)
            return
        if lease.marks:  # the shared counter follows whenever the connection was really used
            conn = lease.connection
            if conn.status != STATUS_READY or conn.notices or not are_spent(lease.marks):
                self._checkin_slowly(lease)
                return
            words[lease.checkouts_at] = lease.checkouts
        words[lease.use_at] = lease.idle_use
        lease.idle.append(lease)
        if lease.waiters:
            lease.group.serve()

    def checkout_after(
        self, group: str, after: CommitPosition, timeout: float | None = None, priority: Priority = "normal"
    ) -> Handle:
        """Return a connection of a group to a server that shows everything up to a position (`commit_position`).

        A replica that is known to have come so far serves at once, without a statement.  Else the replica at hand is
        asked, for `after_wait` at most; then the primary serves, if the group may use it, else it is waited for one
        that shows the position.  A position of a system that no endpoint is of any more is ignored.

        Raises:
            PositionNotReached: no endpoint of the group showed the position in time.
            Others, `timeout` and `priority`: as `checkout`.
        """
        if not isinstance(after, CommitPosition):
            raise TypeError(f"after: found {type(after).__name__}, expected a CommitPosition; parse() reads its text")
        return self._checkout_slowly(group, timeout, None, priority, after)

    def connection(
        self,
        group: str,
        timeout: float | None = None,
        after: CommitPosition | None = None,
        priority: Priority = "normal",
    ) -> Lending:
        """Return a context manager around `checkout`, or with a position `checkout_after`, and `checkin`.

        In groups without autocommit it commits on success and rolls back on an exception.
        """
        if after is not None:
            return LendingAfter(self, group, timeout, after, priority)
        if priority != "normal":
            return LendingAhead(self, group, timeout, priority)
        return Lending(self, group, timeout)

    def run(
        self,
        group: str,
        function: Callable[[Handle], _Result],
        *,
        retries: int = 2,
        timeout: float | None = None,
        after: CommitPosition | None = None,
    ) -> _Result:
        """Call a function with a connection of a group, commit as `connection` does, and return its result.

        After a failure it is called again, with another connection and a short pause, where that is safe: the
        connection was lost before a statement was sent, or the server rolled the whole transaction back (serialization
        failure, deadlock).  In read-only groups (`readonly = true`, target `replica`) also after any other loss.  In
        autocommit groups that are not read-only it is called once, and once where it committed something by itself.

        What the function does elsewhere must bear being done again.  It must not end its transaction by a statement
        (COMMIT as text), nor lift a read-only group's restriction by one.

        Args:
            retries: how often it is called again at most.
            timeout: seconds for connections and pauses together; no call begins later.  Default: the group's.
            after: as for `connection`.

        Raises:
            What `checkout` raises, and what the last call or its commit raised.
        """
        from shmpool.retry import run  # here: not every worker needs it

        return run(self, group, function, retries=retries, timeout=timeout, after=after)

    def statistics(self) -> dict[str, dict[str, float]]:
        """Return this process's numbers for each group it has used: connections, waiting threads, counters."""
        state = self._state
        if state is None or not state.attachment.page[0]:
            return {}
        return {name: local.numbers() for name, local in state.groups.items()}

    def close(self) -> None:
        """Close idle connections and give their permits back; those in use follow at checkin.  May be repeated."""
        self._closed = True
        state, self._state, self._idle = self._state, None, {}
        states = [*self._former, *([] if state is None else [state])]
        self._former.clear()
        for one in states:
            if one.attachment.pid == os.getpid():
                one.attachment.users.discard(self)
                one.retire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _joined(self) -> _State:
        """Return the state of an attachment that this process may use now, with the current configuration."""
        if self._closed:
            raise PoolClosed(f"pool {self.name!r} was closed; make a new shmpool.Pool")
        state = self._state
        if state is not None and state.is_current():
            return state
        # Two states, or two copies of a group, would keep connections and waiting threads apart.
        with self._joining.setdefault(os.getpid(), threading.RLock()):
            return self._join()

    def _join(self) -> _State:
        """Make the state, or bring it up to date; one thread at a time."""
        state = self._state
        if state is not None and state.attachment.is_current():
            if not state.is_current():
                state.attachment.refresh()
                state.refresh(self)
                self._idle = state.idle()
            return state
        if state is not None:
            self._set_aside(state)
        attachment = self._attach()
        self._compare(attachment)
        fresh = _State(attachment)
        fresh.refresh(self)
        self._config = attachment.settings.config_file if attachment.settings.autostart else None
        attachment.users.add(self)
        attachment.start_background()
        self._state, self._idle = fresh, fresh.idle()  # last: an exception before it leads here again
        return fresh

    def _set_aside(self, state: _State) -> None:
        """Give back what rests through an attachment that is over; what is in use follows at checkin."""
        self._former.append(state)
        self._state, self._idle = None, {}
        if state.attachment.pid == os.getpid():
            state.attachment.step_aside()
        self._tidy_former()

    def _tidy_former(self) -> None:
        for state in tuple(self._former):
            if state.attachment.pid != os.getpid() or state.retire():
                with contextlib.suppress(ValueError):  # another thread did the same
                    self._former.remove(state)

    def _attach(self) -> Attachment:
        """Attach this process; where there is no coordinator, have one started if that is wanted (`autostart`)."""
        names = Names.of(self.name, self._uid)
        try:
            return join(names, Lease)
        except (SegmentMissingError, SegmentRetiredError) as error:
            if not is_coordinated(names) and not self._begin_coordinator(names):
                raise CoordinatorNotRunning(self._how_to_start(error)) from error
            raise self._not_yet(error) from error
        except MechanismError as error:
            raise CoordinatorNotRunning(self._how_to_start(error)) from error

    def _not_yet(self, reason: object) -> CoordinatorNotRunning:
        refusal = CoordinatorNotRunning(
            f"{reason}; a coordinator is there or is just being started, and the checkout had no more time to wait "
            f"for it; `shmpool status {self.name}` tells what it waits for"
        )
        refusal.is_passing = True
        return refusal

    def _how_to_start(self, reason: object) -> str:
        if self._document is None:
            return how_to_start(self.name, reason)
        return f"{reason}. This pool carries its own configuration: its processes start the coordinator, if one can be"

    def _compare(self, attachment: Attachment) -> None:
        """Leave a pool that is configured otherwise than by what this one was given.

        What a coordinator that died has left is taken over by one that is started now.
        """
        if self._document is None or attachment.settings.document == self._document.digest:
            return
        is_served = attachment.is_served()
        attachment.refresh()  # one that came between the first reading and the question has published since
        if attachment.settings.document == self._document.digest:
            return
        attachment.leave_when_due()
        differs = ConfigurationDiffers(self.name, attachment.settings.config_file or GIVEN)
        if is_served or (not is_coordinated(attachment.names) and not self._begin_coordinator(attachment.names)):
            raise differs
        raise self._not_yet(differs)

    def _begin_coordinator(self, names: Names) -> bool:
        if self._document is None and is_server_starting(SERVER_STARTS_S):
            return True
        from shmpool.launch import begin_on_demand  # here: few workers ever need it

        try:
            return begin_on_demand(names, self._document or self._config)
        except MechanismError as error:
            raise CoordinatorNotRunning(self._how_to_start(error)) from error

    def start_coordinator(self) -> None:
        """Start one, where that is wanted; blocks until it serves (background thread)."""
        from shmpool.launch import start_on_demand  # here: few workers ever need it

        with contextlib.suppress(MechanismError, OSError):  # it is tried again, and a checkout that needs it says why
            start_on_demand(Names.of(self.name, self._uid), self._document or self._config)

    def read_passwords(self) -> dict[str, str]:
        """Return what the pool was given to hand over to its coordinator (background thread)."""
        return {} if self._document is None else self._document.read_passwords()

    def _joined_by(self, deadline: float) -> _State:
        """Do as `_joined`, and wait for a segment that is about to open."""
        while True:
            try:
                return self._joined()
            except CoordinatorNotRunning as error:
                remaining = deadline - monotonic()
                if not error.is_passing or remaining <= 0:
                    raise
                time.sleep(min(JOIN_PAUSE_S, remaining))

    def _checkout_slowly(
        self,
        group: str,
        timeout: float | None,
        lease: Lease | None,
        priority: Priority,
        after: CommitPosition | None = None,
    ) -> Handle:
        """Everything that is not a warm checkout: join, look after an idle connection, claim and open, wait."""
        is_high = priority == "high"
        if not is_high and priority != "normal":
            raise ValueError(f"priority: found {priority!r}, expected 'normal' or 'high'")
        began = monotonic()
        deadline = None if timeout is None else began + timeout
        if lease is not None and not lease.group.attachment.is_current():
            give_back(lease)  # before the wait for a successor, which it would keep from opening
            lease = None
        while True:
            state = self._joined_by(began + JOIN_WITHIN_S if deadline is None else deadline)
            state.attachment.start_background()  # a signal handler that raised around a fork may have kept it away
            local = state.groups.get(group)
            if local is None:
                raise UnknownGroup(group, self.name, list(state.groups))
            if deadline is None:
                deadline = began + local.settings.timeout
            if lease is not None and not local.is_fit(lease):
                lease = None
            try:
                state.tidy()
                if after is None:
                    lease = lease or local.pop_idle() or local.acquire(deadline, is_high=is_high)
                else:
                    from shmpool.freshness import acquire_after  # here: few workers ever need it

                    lease = acquire_after(local, after, deadline, is_high=is_high)
                break
            except (DisownedError, SegmentRetiredError):
                if monotonic() >= deadline:
                    raise CoordinatorNotRunning(self._how_to_start("the segment was retired")) from None
        lease.since = monotonic()
        lease.times[lease.since_at] = lease.since
        lease.words[lease.use_at] = lease.active_use
        handle = Handle()
        handle._lease = lease
        return handle

    def _checkin_slowly(self, lease: Lease) -> None:
        if not lease.page[0]:
            return  # a child's copy: the parent's connection is not touched
        lease.words[lease.checkouts_at] = lease.checkouts
        if lease.words[lease.recall_at] == lease.words[lease.word_at]:
            lease.group.yield_to_others(lease)
        elif lease.words[lease.recall_at] and lease.group.leave_for_better(lease):
            return
        elif restore(lease.connection, lease.recipe):
            lease.group.put_idle(lease)
        else:
            give_back(lease)

    def rest(self) -> int:
        """Give idle connections back; return how many there were (before a fork)."""
        state = self._state
        return 0 if state is None else sum(local.rest() for local in state.groups.values())

    def look_after_idle(self) -> float:
        """Give back idle connections that are recalled, too old or dead, and open those ahead of need.

        Returns:
            The seconds until it is to be called again (background thread).
        """
        self._tidy_former()
        state = self._state
        if state is None:
            return float("inf")
        state.tidy()
        look_in = float("inf")
        for local in state.groups.values():
            local.look_after_idle()
            look_in = min(look_in, local.warmup.look(local))
        state.cut_unanswered(self.name)
        if not state.attachment.is_current() or state.attachment.is_outdated():
            with contextlib.suppress(PoolError):
                self._joined()
        return look_in


class _State:
    """A pool's groups as far as they belong to one attachment; it dies with it (fork, another segment)."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.groups: dict[str, LocalGroup] = {}
        self.generation = 0

    def is_current(self) -> bool:
        """Whether this process may use it, with the configuration of now."""
        attachment = self.attachment
        if not attachment.is_current():  # asked first: a child's copy has no words to look at
            return False
        return attachment.config_generation == self.generation and not attachment.is_outdated()

    def refresh(self, pool: Pool) -> None:
        """Follow the configuration: a group is replaced if its connections are to be others, retired if it went.

        A changed cap, weight or timeout costs no idle connection.
        """
        attachment = self.attachment
        groups: dict[str, LocalGroup] = {}
        for name, (settings, permits) in attachment.groups.items():
            factory = _factory_of(pool, settings)
            recipes = {
                endpoint.index: make_recipe(endpoint, settings, factory, pool.cursor_factory, pool.on_connect)
                for endpoint in attachment.settings.endpoints
            }
            known = self.groups.get(name)
            if known is not None and known.leads_to_the_same(recipes):
                known.follow(settings, permits, recipes)
                groups[name] = known
            else:
                groups[name] = LocalGroup(pool, attachment, settings, permits, recipes)
        replaced = [local for name, local in self.groups.items() if groups.get(name) is not local]
        self.groups = groups
        self.generation = attachment.config_generation
        for local in replaced:
            local.retire()

    def idle(self) -> dict[str, deque[Lease]]:
        """Return the idle connections by group: what a warm checkout looks into."""
        return {name: local.idle for name, local in self.groups.items()}

    def tidy(self) -> None:
        """Close what was dropped without checkin, and give its permits back."""
        tidy(self.attachment.table)

    def cut_unanswered(self, pool: str) -> None:
        """Cut what waits for a server that is DOWN and does not answer."""
        attachment = self.attachment
        held = attachment.table.resources()
        down = {index for index, _ in held if is_down(attachment.segment, index)}
        if not down:
            return
        from shmpool.silence import cut_unanswered  # here: few workers ever need it

        cut = cut_unanswered(conn for index, conn in held if index in down and isinstance(conn, Connection))
        if cut:
            import logging  # cold, and an application has it anyway

            logging.getLogger("shmpool").warning(
                "pool %s: cut %d connections in use: their server is DOWN and does not answer", pool, cut
            )

    def retire(self) -> bool:
        """Give back what rests, and the rows when nothing is in use any more; return whether that is so."""
        for local in self.groups.values():
            local.retire()
        self.tidy()
        if not self.attachment.users:
            self.attachment.stop_background()
        return self.attachment.leave_when_due()


class Lending:
    """A connection for the length of a `with` block; see `Pool.connection`."""

    __slots__ = ("_group", "_handle", "_pool", "_timeout")

    def __init__(self, pool: Pool, group: str, timeout: float | None) -> None:
        self._pool = pool
        self._group = group
        self._timeout = timeout

    def __enter__(self) -> Handle:
        self._handle = self._pool.checkout(self._group, self._timeout)
        return self._handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handle = self._handle
        lease = handle._lease
        try:
            if kind is None and lease is not None and not lease.recipe.autocommit:
                lease.connection.commit()
        finally:
            self._pool.checkin(handle)


class LendingAhead(Lending):
    """A connection that was asked for with a priority, for the length of a `with` block; see `Pool.connection`."""

    __slots__ = ("_priority",)

    def __init__(self, pool: Pool, group: str, timeout: float | None, priority: Priority) -> None:
        super().__init__(pool, group, timeout)
        self._priority = priority

    def __enter__(self) -> Handle:
        self._handle = self._pool.checkout(self._group, self._timeout, self._priority)
        return self._handle


class LendingAfter(LendingAhead):
    """A connection that shows a position, for the length of a `with` block; see `Pool.connection`."""

    __slots__ = ("_after",)

    def __init__(
        self, pool: Pool, group: str, timeout: float | None, after: CommitPosition, priority: Priority
    ) -> None:
        super().__init__(pool, group, timeout, priority)
        self._after = after

    def __enter__(self) -> Handle:
        self._handle = self._pool.checkout_after(self._group, self._after, self._timeout, self._priority)
        return self._handle


def how_to_start(pool: str, reason: object) -> str:
    """Say what keeps a process from joining and how a coordinator is started."""
    return (
        f"{reason}. Start one: `shmpool-coordinator run --config FILE`, or let the application server start it, with "
        f"SHMPOOL_CONFIG naming the file: Gunicorn (from shmpool.hooks.gunicorn import *) or uWSGI (a mule that runs "
        f"shmpool_coordinator.mule.main); "
        f"`shmpool status {pool}` tells more"
    )


def _factory_of(pool: Pool, group: GroupSettings) -> type[Connection]:
    """Return the class of a group's connections: the pool's, or one over it that bounds its queries in time."""
    if group.query_timeout is None:
        return pool.connection_factory
    if has_threads():
        return bounded(pool.connection_factory)
    if (pool.name, group.name) not in _unbounded:
        _unbounded.add((pool.name, group.name))
        import logging  # cold, and an application has it anyway

        logging.getLogger("shmpool").warning(
            "pool %s: group %s: query_timeout has no effect in a process without threads (uWSGI: enable-threads)",
            pool.name,
            group.name,
        )
    return pool.connection_factory


def _document(
    name: str | None, config: Mapping[str, Any] | None, passwords: Mapping[str, str] | None
) -> Document | None:
    """Return what a pool is to be configured with if it carries that itself.

    Raises:
        ValueError, TypeError: the arguments do not go together, or cannot be written down.
    """
    if config is None:
        if passwords is not None:
            raise TypeError("passwords: expected only together with config")
        return None
    from shmpool.document import Document  # here: few workers ever need it

    document = Document(config, passwords)
    if name is not None and name != document.name:
        raise ValueError(f"name {name!r}: config has {document.name!r}; leave one of them out")
    return document


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_unbounded: set[tuple[str, str]] = set()  # pools and groups that were told that they have no query_timeout


@atexit.register
def close_all() -> None:
    """Close every pool of this process, which is about to end; what it still uses is the reaper's.

    Registered by a parent it also runs in its children: no harm.
    """
    for pool in list(_pools):
        pool.close()
