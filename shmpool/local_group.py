"""A group as one process uses it: its idle connections, its waiting threads, opening and giving back.

Waiting is local and global at once.  Threads queue in order of arrival; one of them, the scout, sleeps on the
group's bell for all.  What comes first serves the head of the queue: a checkin of this process, or a permit that the
scout got, with the connection it opened.

Guarantees: no lock on the uncontended path; a connection that is handed over and not taken goes back to its slot.
Threads.  Everything here may run in any thread; deques and single attribute stores carry all shared state.
If a thread is interrupted by an exception.  What it held is dropped, and thereby given back (slots.py); a waiter that
    left without leaving the queue is skipped when its lease falls into nobody's hands.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import psycopg2
from psycopg2.extensions import cursor

from shmpool import slots
from shmpool.attachment import Attachment
from shmpool.bounded import BoundedConnection
from shmpool.chance import chance
from shmpool.clock import monotonic, slept
from shmpool.connection import (
    CLOSE_BOUND_S,
    ConnectFailedError,
    Connection,
    Recipe,
    WrongRoleError,
    answers,
    application_name,
    close_connection,
    is_alive,
    open_connection,
    prepare,
    role_of,
)
from shmpool.credentials import CredentialsError, may_be_cured, read_secrets
from shmpool.endpoints import count_held, heartbeat_age, read_candidates, status_at
from shmpool.errors import DisownedError, TableFullError
from shmpool.pool_errors import NoEligibleEndpoint, PoolTimeout, WouldBlockEventLoop
from shmpool.reports import describe_group
from shmpool.routing import Candidate, Route, choose, is_fallback_spent, is_role_allowed, is_too_slow, should_move
from shmpool.semaphores import SLICE_S, ring
from shmpool.settings import GroupSettings
from shmpool.slots import EndpointPermits, GroupPermits, Token
from shmpool.states import Admin, Health, Use
from shmpool.words import Status

if TYPE_CHECKING:
    from shmpool.pool import Pool

PING_TIMEOUT_S: Final = 5.0
LIFETIME_JITTER: Final = 0.05
POLITE_S: Final = 0.002  # about the cost of a connect
REFUSED_PAUSE_S: Final = 0.05  # between rounds in which every eligible endpoint refused
_TURNS: Final = 1 << 16  # more than any cycle of weights
AVOID_S: Final = 1.0  # how long an endpoint that refused is tried last
FALLBACK_REST_S: Final = 1.0  # how long a connection that fell back rests while the group may hold no more like it
DOWN_CLOSE_BOUND_S: Final = 0.02  # at an endpoint that is DOWN, and hardly answers: others wait to be closed as well
BYPASS_S: Final = 0.5  # a connection used within this window is handed out without a look at its socket
_PASSING: Final = (
    "starting up",
    "shutting down",
    "not yet accepting",
    "too many clients",
    "too many connections",
    "connection slots",
)  # of a server that answers: it will serve soon


class Lease(Token):
    """A token with its connection: what the idle deques hold, and what a handle stands for.

    Words, page and row are those of the attachment that the connection was claimed through.
    """

    __slots__ = (
        "active_use",
        "checkouts",
        "checkouts_at",
        "connection",
        "expires",
        "group",
        "idle",
        "idle_use",
        "marks",
        "page",
        "pool",
        "recipe",
        "since",
        "since_at",
        "slept",
        "status",
        "status_at",
        "table",
        "times",
        "waiters",
        "words",
    )

    active_use: int
    idle_use: int
    checkouts: int
    checkouts_at: int
    connection: Connection
    marks: list[weakref.ref[cursor] | None]  # the connection's
    expires: float
    group: LocalGroup
    idle: deque[Lease]
    page: memoryview  # the one word of the private page that stands for this row
    pool: Pool
    recipe: Recipe
    since: float  # last checkout, CLOCK_MONOTONIC
    since_at: int
    slept: float  # clock.slept() at the last look
    status: int  # the endpoint's status word when it was last judged
    status_at: int
    table: slots.SlotTable
    times: memoryview[float]
    waiters: deque[Waiter]
    words: memoryview


class Presence:
    """Lives as long as a call that waits."""

    __slots__ = ("__weakref__",)


class Waiter:
    """A thread in the queue; `handed` is what it was handed, at most one.

    Whoever hands something over looks at `is_gone` afterwards; whoever goes calls `go` before looking at `handed`:
    one of the two takes it back.  A call that a signal handler ended before it could go has dropped its presence.

    Args:
        presence: what the waiting call alone refers to.
    """

    __slots__ = ("_has_left", "_presence", "handed", "lock", "since")

    def __init__(self, presence: Presence) -> None:
        self.handed: deque[Lease] = deque()
        self._has_left = False
        self._presence = weakref.ref(presence)
        self.since = monotonic()
        self.lock = threading.Lock()
        self.lock.acquire()

    @property
    def is_gone(self) -> bool:
        """Whether the call that waited has ended."""
        return self._has_left or self._presence() is None

    def go(self) -> None:
        """Be gone from now on."""
        self._has_left = True

    def wake(self) -> None:
        """Let the thread look again."""
        with contextlib.suppress(RuntimeError):  # it is awake already
            self.lock.release()

    def sleep(self, seconds: float) -> None:
        """Sleep until woken, for one slice at most."""
        self.lock.acquire(timeout=max(0.0, min(seconds, SLICE_S)))


class LocalGroup:
    """Made by the pool for each group of an attachment; replaced when the configuration of the group changes."""

    def __init__(
        self,
        pool: Pool,
        attachment: Attachment,
        settings: GroupSettings,
        permits: GroupPermits,
        recipes: dict[int, Recipe],
    ) -> None:
        self.pool = pool
        self.attachment = attachment
        self.table = attachment.table
        self.settings = settings
        self.permits = permits
        self.recipes = recipes
        self.idle: deque[Lease] = deque()
        self.waiters: deque[Waiter] = deque()
        self.is_retired = False
        self._scout: Waiter | None = None
        self._turn = int(chance() * _TURNS)  # workers that start together do not all begin at the same endpoint
        self._polite_until = 0.0  # monotonic
        self._avoid: dict[int, float] = {}  # endpoint -> monotonic time until which it is tried last

    def __repr__(self) -> str:
        return f"<LocalGroup {self.settings.name!r} idle={len(self.idle)} waiting={len(self.waiters)}>"

    def leads_to_the_same(self, recipes: dict[int, Recipe]) -> bool:
        """Whether connections opened by these recipes are like those of the group's own."""
        return self.recipes.keys() == recipes.keys() and all(
            own.of_connection() == recipes[index].of_connection() for index, own in self.recipes.items()
        )

    # -- idle connections

    def is_fit(self, lease: Lease, *, is_wanted: bool = True) -> bool:
        """Judge an idle connection with every check; give it back if it must not be handed out.

        Args:
            is_wanted: somebody waits for it; else it is only looked at, without a round trip.
        """
        if not lease.table.owns(lease):
            self.disown(lease)
            return False
        if lease.group is not self or not self._is_endpoint_fit(lease):
            self.give_back(lease)
            return False
        now = monotonic()
        asleep = slept()
        idle = now - lease.since + max(0.0, asleep - lease.slept)  # a suspended machine's peers forget
        lease.slept = asleep
        if now >= lease.expires:
            fit = False
        elif is_wanted and idle >= self.settings.ping_after:
            fit = answers(lease.connection, PING_TIMEOUT_S)
        else:
            fit = idle < BYPASS_S or is_alive(lease.connection)
        if not fit:
            self.give_back(lease)
        return fit

    def _is_endpoint_fit(self, lease: Lease) -> bool:
        """Whether the endpoint is what it was when the connection was opened, and still eligible."""
        seen: int = lease.words[lease.status_at]
        if seen == lease.status:
            return True
        if Status.of(seen).epoch != Status.of(lease.status).epoch:
            return False
        lease.status = seen  # weight or verdict: nothing that a connection depends on
        return True

    def pop_idle(self) -> Lease | None:
        """Take out an idle connection that is fit, if there is one."""
        while True:
            try:
                lease = self.idle.pop()
            except IndexError:
                return None
            if self.is_fit(lease):
                return lease

    def look_after_idle(self) -> None:
        """Give back idle connections that are recalled, too old, unused for `max_idle`, or that died.

        Those of a replica that lags too far as well, where there is a better one.  And one of those that fell back on
        another endpoint than the group prefers, once a preferred one is there again: its next user opens it there.
        One at a time, as a server that returns is not to be stormed.
        """
        now = monotonic()
        may_move = True
        for _ in range(len(self.idle)):
            try:
                lease = self.idle.popleft()
            except IndexError:
                return
            wanted_back = lease.words[lease.recall_at] == lease.words[lease.word_at]
            if wanted_back or self.is_retired or now - lease.since >= self.settings.max_idle:
                self.give_back(lease)
            elif not self.is_fit(lease, is_wanted=False):
                continue
            elif self._is_too_slow(lease):
                self.give_back(lease)
            elif may_move and self._should_move(lease, now):
                may_move = False
                self.give_back(lease)
            else:
                self.put_idle(lease)

    def _candidates(self) -> list[Candidate]:
        attachment = self.attachment
        return read_candidates(attachment.segment, attachment.settings.endpoints, attachment.endpoints)

    def _is_stale(self) -> bool:
        """Whether the coordinator's heartbeat is too old to believe health, roles and lag."""
        return heartbeat_age(self.attachment.segment) > self.attachment.settings.stale_after

    def _held_at(self, endpoint: int) -> int:
        """Count the connections that all workers of the host hold for this group at an endpoint."""
        return count_held(self.attachment.segment, self.permits, self.attachment.endpoints[endpoint])

    def _is_too_slow(self, lease: Lease) -> bool:
        endpoint, settings = lease.tether.endpoint, self.settings
        if endpoint is None or (settings.max_lag_s is None and settings.max_lag_bytes is None) or self._is_stale():
            return False
        groups = self.attachment.settings.groups
        return is_too_slow(settings, self._candidates(), endpoint.index, groups, self._held_at)

    def _should_move(self, lease: Lease, now: float) -> bool:
        """Whether a connection is better opened elsewhere, or by a worker that has none where few may be had."""
        endpoint = lease.tether.endpoint
        if endpoint is None or self._is_stale():
            return False
        candidates = self._candidates()
        if should_move(self.settings, candidates, endpoint.index):
            return True
        is_resting = now - lease.since >= FALLBACK_REST_S
        return is_resting and is_fallback_spent(
            self.settings, candidates, endpoint.index, self.attachment.settings.groups, self._held_at
        )

    def put_idle(self, lease: Lease) -> None:
        """Let a connection rest; serve a waiting thread first."""
        lease.words[lease.use_at] = lease.idle_use
        lease.idle.append(lease)
        if self.waiters:
            self.serve()

    def rest(self) -> int:
        """Give back every idle connection; return how many there were."""
        count = 0
        with contextlib.suppress(IndexError):
            while True:
                self.give_back(self.idle.pop())
                count += 1
        return count

    def retire(self) -> None:
        """Take no part any more: idle connections go now, those in use at checkin."""
        if not self.is_retired:
            self.is_retired = True
            self.waiters.append(Waiter(Presence()))  # nobody; it leads every checkin to `serve`
        self.rest()

    def give_back(self, lease: Lease) -> None:
        """Close a connection and give its permits back; leave them to the coordinator if the server lingers."""
        table = lease.table
        if not table.owns(lease):
            self.disown(lease)
            return
        if lease.connection.closed or lease.connection.is_cut:
            self._lost(lease)
        lease.words[lease.use_at] = int(Use.CLOSING) | self.permits.index << 8
        lease.times[lease.since_at] = monotonic()
        is_down = Status.of(lease.words[lease.status_at]).health is Health.DOWN
        if close_connection(lease.connection, within=DOWN_CLOSE_BOUND_S if is_down else CLOSE_BOUND_S):
            table.release(lease)
        else:
            table.abandon(lease)
        if lease.group.is_retired or lease.group.attachment.keeps_nothing:
            lease.group.attachment.leave_when_due()

    def _lost(self, lease: Lease) -> None:
        """Tell the coordinator that a connection broke, and let those that rest beside it be looked at before use."""
        endpoint = lease.tether.endpoint
        if endpoint is None:
            return
        for other in tuple(lease.idle):
            if other.tether.endpoint is endpoint:
                other.since -= BYPASS_S
        lease.group.attachment.say_evidence(endpoint.index, "connection lost")

    def disown(self, lease: Lease) -> None:
        """Forget a connection whose slot is not this process's any more.

        After a fork it is the parent's, and its socket must not be touched; else it is closed.
        """
        lease.tether.resource = None
        if lease.group.attachment.pid == os.getpid():
            close_connection(lease.connection)

    def numbers(self) -> dict[str, float]:
        """Return this process's connections and counters of the group."""
        for lease in tuple(self.idle):
            lease.words[lease.checkouts_at] = lease.checkouts
        return {
            "idle": len(self.idle),
            "held": self.table.out(self.permits),
            "waiting": len(self.waiters) - self.is_retired,
            **self.table.counters(self.permits),
        }

    # -- waiting

    def serve(self) -> None:
        """Hand idle connections to waiting threads, first come first served."""
        if self.is_retired:
            self.rest()
            return
        while self.idle:
            waiter = self._next_to_serve()
            if waiter is None:
                scout = self._scout
                if scout is not None:
                    ring(self.permits.bell)  # it sleeps there; a stranger may take the ring: a slice bounds the delay
                    scout.wake()  # or on its lock, while the worker holds all it may
                return
            try:
                waiter.handed.append(self.idle.pop())
            except IndexError:
                self.waiters.appendleft(waiter)
                return
            waiter.wake()
            if waiter.is_gone:
                with contextlib.suppress(IndexError):
                    self.idle.append(waiter.handed.pop())

    def _next_to_serve(self) -> Waiter | None:
        """Take the first waiter out of the queue, the scout only if it wakes on its lock."""
        waiter = self._pop_waiter()
        if waiter is None or waiter is not self._scout:
            return waiter
        following = self._pop_waiter()
        self.waiters.appendleft(waiter)
        return following

    def _pop_waiter(self) -> Waiter | None:
        """Take the first waiter out of the queue; one that went while it was out of it is forgotten."""
        with contextlib.suppress(IndexError):
            while True:
                waiter = self.waiters.popleft()
                if not waiter.is_gone:
                    return waiter
        return None

    def acquire(self, deadline: float) -> Lease:
        """Return a connection that rests, is handed over, or is opened, whichever comes first.

        Raises:
            PoolTimeout, NoEligibleEndpoint: nothing came by `deadline` (monotonic clock).
            psycopg2.OperationalError: endpoints were tried, and none took the connection.
        """
        attempt = Attempt()
        if not self.waiters:
            lease = self._claim_and_open(attempt, deadline, scout=None)
            if lease is not None:
                return lease
        if deadline > monotonic():
            refuse_in_event_loop(self.settings.name)
        presence = Presence()
        waiter = Waiter(presence)
        self.waiters.append(waiter)
        try:
            while True:
                if self.table.dropped:
                    tidy(self.table)
                if self.is_retired:
                    raise DisownedError("this group was replaced, or its pool was closed")
                lease = self._take_handed(waiter) or self.pop_idle()
                if lease is None and self._is_scout(waiter):
                    lease = self._scouted(waiter, attempt, deadline)
                if lease is not None:
                    attempt.failures.clear()  # their tracebacks refer to tokens: a forgotten one is to be dropped
                    self._count_wait(lease, monotonic() - waiter.since)
                    return lease
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise self.give_up(attempt, monotonic() - waiter.since)
                if self._scout is not waiter:
                    waiter.sleep(remaining)
        finally:
            self._leave_queue(waiter)

    def _take_handed(self, waiter: Waiter) -> Lease | None:
        try:
            lease = waiter.handed.pop()
        except IndexError:
            return None
        if self.is_fit(lease):
            return lease
        self.waiters.appendleft(waiter)  # it keeps its place
        return None

    def _is_scout(self, waiter: Waiter) -> bool:
        """Whether this thread sleeps on the bell for all; two for a moment do no harm."""
        scout = self._scout
        if scout is None or scout.is_gone:
            self._scout = waiter
        return self._scout is waiter

    def _scouted(self, waiter: Waiter, attempt: Attempt, deadline: float) -> Lease | None:
        """Get a permit and open a connection: for the head of the queue, or for the scout itself."""
        lease = self._claim_and_open(attempt, deadline, scout=waiter)
        if lease is None:
            if self._scout is waiter:
                self._pass_scouting_on(waiter)
            return None
        if self._is_first(waiter):
            return lease
        self.put_idle(lease)
        return None

    def _is_first(self, waiter: Waiter) -> bool:
        """Whether nobody queues before this thread.  By index: an iterator fails when another thread queues."""
        try:
            return self.waiters[0] is waiter
        except IndexError:
            return True

    def _pass_scouting_on(self, waiter: Waiter) -> None:
        """After a slice in vain the youngest waiter scouts, so that checkins serve this thread in its turn."""
        with contextlib.suppress(IndexError):
            youngest = self.waiters[-1]
            if youngest is not waiter:
                self._scout = youngest
                youngest.wake()

    def _leave_queue(self, waiter: Waiter) -> None:
        waiter.go()
        with contextlib.suppress(ValueError):
            self.waiters.remove(waiter)
        if self._scout is waiter:
            self._scout = None
            self._wake_youngest(waiter)
        with contextlib.suppress(IndexError):
            self.put_idle(waiter.handed.pop())

    def _wake_youngest(self, but: Waiter) -> None:
        with contextlib.suppress(IndexError):
            if self.waiters[-1] is not but:
                self.waiters[-1].wake()

    # -- claiming and opening

    def try_open(self, attempt: Attempt, deadline: float, *, may_wait: bool) -> Lease | None:
        """Claim permits and open a connection, beside the queue, waiting for a slice at most; None: look again.

        For a thread that not every connection serves: one that is checked in may be of no use to it.

        Raises:
            psycopg2.OperationalError: endpoints were tried, and will not take a connection.
        """
        presence = Presence()
        return self._claim_and_open(attempt, deadline, Waiter(presence) if may_wait else None)

    def _claim_and_open(self, attempt: Attempt, deadline: float, scout: Waiter | None) -> Lease | None:
        """Claim permits, as scout sleeping on the group's bells, and open a connection; None: look again."""
        if self.is_retired or not self.attachment.is_current():
            raise DisownedError("this group was replaced, or the attachment is not this process's any more")
        self._be_polite(deadline)
        route = self._route(attempt)
        token = self._take_token() if route.order else None
        if token is None:
            if scout is not None:
                scout.sleep(deadline - monotonic())
            return None
        if scout is None:
            granted = self.table.claim_once(token, self.permits, self._permits_of(route))
        else:
            granted = self._wait_on_bell(token, attempt, deadline, scout)
        if not granted:
            self.table.put_back(token)
            return None
        if scout is not None and self._scout is scout:
            self._scout = None  # opening takes a while: let another thread scout meanwhile
            self._wake_youngest(scout)
        return self._open(token, attempt, deadline)

    def yield_to_others(self, lease: Lease) -> None:
        """Give back a connection that another worker waits for, and let that one claim first."""
        self.give_back(lease)
        self._polite_until = monotonic() + POLITE_S

    def _be_polite(self, deadline: float) -> None:
        """After a connection was given up for others: one short sleep before the next claim; never on the bell."""
        pause = min(self._polite_until, deadline) - monotonic()
        if pause > 0:
            time.sleep(pause)

    def _wait_on_bell(self, token: Lease, attempt: Attempt, deadline: float, scout: Waiter) -> bool:
        began = monotonic()

        def is_done() -> bool:
            is_choosy = attempt.only is not None
            relieved = (is_choosy or len(self.waiters) > 1) and monotonic() - began >= SLICE_S
            is_over = self.is_retired or not self.attachment.is_current()
            return bool((self.idle and not is_choosy) or scout.handed) or relieved or is_over

        self.attachment.say_waiting(self.permits.index)
        return self.table.wait(
            token,
            self.permits,
            lambda: self._permits_of(self._route(attempt)),
            deadline,
            is_done=is_done,
            queued=lambda: max(0, len(self.waiters) - 1),  # this one may just be out of the queue, to be served
        )

    def _take_token(self) -> Lease | None:
        """Take a slot out, unless the worker holds as many for this group as it may."""
        if self.table.out(self.permits) >= self.settings.per_worker_max:
            return None
        try:
            token = self.attachment.take_token(self.permits)
        except TableFullError:
            return None
        assert isinstance(token, Lease)
        if self.table.out(self.permits) > self.settings.per_worker_max:
            self.table.put_back(token)
            return None
        return token

    def _route(self, attempt: Attempt) -> Route:
        """Ask for the endpoints to try now; those that refused lately come last, and spare ones if all others did."""
        self._turn += 1
        route = choose(
            self.settings,
            self._candidates(),
            is_stale=self._is_stale(),
            groups=self.attachment.settings.groups,
            held=self._held_at,
            turn=self._turn,
        )
        now = monotonic()
        avoided = {index for index in route.order if self._avoid.get(index, 0.0) > now}
        order = tuple(sorted(route.order, key=avoided.__contains__))
        if attempt.only is not None:
            order = tuple(index for index in order if index in attempt.only)
        elif not avoided >= set(order) - route.spare:
            order = tuple(index for index in order if index not in route.spare)
        attempt.route = Route(order, route.refusals)
        return attempt.route

    def _permits_of(self, route: Route) -> list[EndpointPermits]:
        return [self.attachment.endpoints[index] for index in route.order if index in self.recipes]

    def _open(self, token: Lease, attempt: Attempt, deadline: float) -> Lease | None:
        """Open the connection of a claimed token; None: it failed, and the permits went back."""
        endpoint = token.tether.endpoint
        assert endpoint is not None
        recipe = self.recipes[endpoint.index]
        row, generation, slot = self.attachment.slot_name(token)
        name = application_name(self.settings.application_name, self.pool.name, row, generation, slot)
        token.status_at = status_at(self.attachment.segment, endpoint.index)
        token.status = self.table.words[token.status_at]
        if Status.of(token.status).admin is not Admin.READY:  # drained since it was chosen
            self._let_go_unopened(token, is_over=True)
            return None
        began = monotonic()
        try:
            conn = self._connect(recipe, name, deadline)
        except (ConnectFailedError, CredentialsError) as error:
            self._count(token, slots.ERRORS, 1)
            self._let_go_unopened(token, is_over=error.is_over)
            self._refused(endpoint.index, error, attempt, deadline)
            return None
        except BaseException:  # a signal handler raised: nobody knows how far it came
            self._let_go_unopened(token, is_over=False)
            raise
        self._fill_in(token, conn, recipe)
        self._count(token, slots.OPENS, 1)
        self.table.times[token.detail_at + slots.OPEN_TOTAL] += monotonic() - began
        try:
            self._bound(conn, endpoint.index)
            prepare(conn, recipe)
            role = role_of(conn)
        except BaseException:
            self.give_back(token)
            raise
        if not is_role_allowed(self.settings.target, role):
            self.give_back(token)
            wrong = WrongRoleError(
                f"endpoint {recipe.endpoint.name!r} is a {role.name.lower()}, group "
                f"{self.settings.name!r} wants {self.settings.target}"
            )
            self._refused(endpoint.index, wrong, attempt, deadline)
            return None
        self._avoid.pop(endpoint.index, None)
        return token

    def _connect(self, recipe: Recipe, name: str, deadline: float) -> Connection:
        """Read the secrets and connect; once more, a moment later, where they may just be being replaced.

        Raises:
            ConnectFailedError, CredentialsError: that failed, too, or there was no time for it.
        """
        endpoint, used = recipe.endpoint, None
        try:
            used = read_secrets(endpoint, self.pool.credentials)
            return open_connection(recipe, name, used)
        except (ConnectFailedError, CredentialsError) as error:
            remaining = deadline - monotonic()
            if remaining <= 0 or not error.is_refused or is_passing(error):
                raise
            time.sleep(min(REFUSED_PAUSE_S, remaining))
            now = read_secrets(endpoint, self.pool.credentials)
            if used is not None and not may_be_cured(str(error), used, now):
                raise
            return open_connection(recipe, name, now)

    def _bound(self, conn: Connection, endpoint: int) -> None:
        """Have the time of a connection's queries watched, where the group wants that."""
        seconds = self.settings.query_timeout
        if seconds is not None and isinstance(conn, BoundedConnection):
            conn.watch(seconds, lambda told: self._tell_cut(endpoint, told))

    def _tell_cut(self, endpoint: int, told: str) -> None:
        """Log that a query was cut off, and let the coordinator look at the server."""
        import logging  # cold, and an application has it anyway

        self.attachment.say_evidence(endpoint, told)
        name = self.recipes[endpoint].endpoint.name if endpoint in self.recipes else str(endpoint)
        logging.getLogger("shmpool").warning(
            "pool %s: group %s, endpoint %s: %s", self.pool.name, self.settings.name, name, told
        )

    def _fill_in(self, token: Lease, conn: Connection, recipe: Recipe) -> None:
        """Make a claimed token a lease: from here on a dropped reference leads to close and release."""
        table = self.table
        token.connection = conn
        token.tether.resource = conn
        token.table, token.words, token.times = table, table.words, table.times
        token.page = table.page[token.page_at : token.page_at + 1]
        token.group, token.pool, token.recipe = self, self.pool, recipe
        token.idle, token.waiters = self.idle, self.waiters
        if self.attachment.keeps_nothing:
            token.recall_at = token.word_at  # as if recalled all the time
        token.idle_use = int(Use.IDLE) | self.permits.index << 8
        token.active_use = int(Use.ACTIVE) | self.permits.index << 8
        token.marks = conn.marks
        token.since = monotonic()
        token.slept = slept()
        token.since_at = token.detail_at + slots.SINCE
        token.checkouts_at = token.detail_at + slots.CHECKOUTS
        token.checkouts = table.words[token.checkouts_at]
        jitter = 1 - LIFETIME_JITTER * chance()
        token.expires = conn.opened_at + self.settings.max_lifetime * jitter
        table.words[token.detail_at + slots.ENDPOINT_EPOCH] = Status.of(token.status).epoch
        table.words[token.detail_at + slots.BACKEND_PID] = conn.get_backend_pid()

    def _let_go_unopened(self, token: Lease, *, is_over: bool) -> None:
        """Give a token's permits back, or, if a session may yet appear at the server, leave them to the coordinator."""
        if is_over:
            self.table.release(token)
        else:
            self.table.abandon(token)

    def _refused(self, endpoint: int, error: psycopg2.OperationalError, attempt: Attempt, deadline: float) -> None:
        """Note that an endpoint did not serve; pause once a round, and tell the coordinator."""
        self.attachment.say_evidence(endpoint, str(error))
        self._avoid[endpoint] = monotonic() + AVOID_S
        again = endpoint in attempt.failures
        attempt.failures[endpoint] = error
        eligible = set(attempt.route.order) if attempt.route else set()
        if eligible <= set(attempt.failures):
            if attempt.is_hopeless():
                raise error
            if again or len(eligible) == 1:
                time.sleep(max(0.0, min(REFUSED_PAUSE_S, deadline - monotonic())))

    def give_up(self, attempt: Attempt, waited: float) -> Exception:
        """Return the error that tells best why nothing came in time."""
        self._count_timeout()
        if attempt.failures:
            return next(reversed(attempt.failures.values()))
        if attempt.route is not None and not attempt.route.order:
            return NoEligibleEndpoint(self.settings.name, self.settings.target, attempt.route.refusals)
        return PoolTimeout(describe_group(self.attachment.segment, self.settings.name, self.permits, waited))

    def _count(self, token: Lease, counter: int, more: int) -> None:
        self.table.words[token.detail_at + counter] += more

    def _count_wait(self, lease: Lease, waited: float) -> None:
        lease.table.count_wait(lease, waited)

    def _count_timeout(self) -> None:
        with contextlib.suppress(TableFullError):
            token = self.table.take(self.permits)
            self.table.words[token.detail_at + slots.TIMEOUTS] += 1
            self.table.put_back(token)


def tidy(table: slots.SlotTable) -> None:
    """Close connections that were dropped without checkin, and give their permits back."""
    for token in table.tidy():
        resource = token.tether.resource
        if isinstance(resource, Connection) and close_connection(resource):
            table.release(token)
        else:
            table.abandon(token)


def refuse_in_event_loop(group: str) -> None:
    """Raise where waiting would stop every coroutine or greenlet of this thread, the one that holds a connection too.

    Asked only by a call that is about to wait; what is not imported costs a look into `sys.modules`.

    Raises:
        WouldBlockEventLoop: an asyncio loop runs in this thread, or a gevent hub exists in it.
    """
    asyncio = sys.modules.get("asyncio.events")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise WouldBlockEventLoop(group, "an asyncio event loop runs in this thread")
    gevent = sys.modules.get("gevent._hub_local")
    if gevent is not None and gevent.get_hub_if_exists() is not None:
        raise WouldBlockEventLoop(group, "a gevent hub runs in this thread")


class Attempt:
    """What one checkout has tried so far.

    Args:
        only: the endpoints that it may try; default: all that are eligible.
    """

    __slots__ = ("failures", "only", "route")

    def __init__(self, only: Collection[int] | None = None) -> None:
        self.only = only
        self.route: Route | None = None
        self.failures: dict[int, psycopg2.OperationalError] = {}

    def is_hopeless(self) -> bool:
        """Whether every failure is of a kind that does not pass by itself: credentials, database, certificate."""
        return all(
            isinstance(error, CredentialsError)
            or (isinstance(error, ConnectFailedError) and error.is_untrusted)
            or ("FATAL:" in str(error) and not is_passing(error))
            for error in self.failures.values()
        )


def is_passing(error: psycopg2.OperationalError) -> bool:
    """Whether a server that answers will serve soon, as it says."""
    return any(passing in str(error) for passing in _PASSING)
