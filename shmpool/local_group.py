"""A group as one process uses it: care for idle connections, and how a thread comes by one.

A thread takes what rests, claims permits and opens (opening.py), or waits for whichever comes first (waiting.py).

Guarantees: no lock on the uncontended path; a connection that is handed over and not taken rests again.
Threads.  Everything here may run in any thread; deques and single attribute stores carry all shared state.
If a thread is interrupted by an exception.  What it held is dropped, and thereby given back (slots.py).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from shmpool import slots
from shmpool.attachment import Attachment
from shmpool.clock import monotonic, slept
from shmpool.connection import Recipe, answers, is_alive
from shmpool.errors import DisownedError, TableFullError
from shmpool.lease import BYPASS_S, Lease, disown, give_back, tidy
from shmpool.opening import open_lease
from shmpool.pool_errors import NoEligibleEndpoint, PoolTimeout
from shmpool.reports import describe_group
from shmpool.router import Attempt, Router
from shmpool.routing import Route
from shmpool.semaphores import SLICE_S
from shmpool.settings import GroupSettings
from shmpool.slots import EndpointPermits, GroupPermits
from shmpool.waiting import Presence, Queue, Waiter, refuse_in_event_loop
from shmpool.words import Status

if TYPE_CHECKING:
    from shmpool.pool import Pool

PING_TIMEOUT_S: Final = 5.0
POLITE_S: Final = 0.002  # about the cost of a connect


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
        self.queue = Queue(self.idle)
        self.router = Router(attachment, settings, permits)
        self.is_retired = False
        self._polite_until = 0.0  # monotonic

    def __repr__(self) -> str:
        return f"<LocalGroup {self.settings.name!r} idle={len(self.idle)} waiting={len(self.queue.waiters)}>"

    def leads_to_the_same(self, recipes: dict[int, Recipe]) -> bool:
        """Whether connections opened by these recipes are like those of the group's own."""
        return self.recipes.keys() == recipes.keys() and all(
            own.of_connection() == recipes[index].of_connection() for index, own in self.recipes.items()
        )

    def follow(self, settings: GroupSettings, permits: GroupPermits, recipes: dict[int, Recipe]) -> None:
        """Take a changed configuration over that leads to the same connections."""
        self.settings, self.permits, self.recipes = settings, permits, recipes
        self.router.settings, self.router.permits = settings, permits

    # -- idle connections

    def is_fit(self, lease: Lease, *, is_wanted: bool = True) -> bool:
        """Judge an idle connection with every check; give it back if it must not be handed out.

        Args:
            is_wanted: somebody waits for it; else it is only looked at, without a round trip.
        """
        if not lease.table.owns(lease):
            disown(lease)
            return False
        if lease.group is not self or not self._is_endpoint_fit(lease):
            give_back(lease)
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
            give_back(lease)
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
                give_back(lease)
            elif not self.is_fit(lease, is_wanted=False):
                continue
            elif self.router.is_too_slow(lease.recipe.endpoint.index):
                give_back(lease)
            elif may_move and self.router.should_move(lease.recipe.endpoint.index, now - lease.since):
                may_move = False
                give_back(lease)
            else:
                self.put_idle(lease)

    def put_idle(self, lease: Lease) -> None:
        """Let a connection rest; serve a waiting thread first."""
        lease.words[lease.use_at] = lease.idle_use
        lease.idle.append(lease)
        if self.queue.waiters:
            self.serve()

    def serve(self) -> None:
        """Hand idle connections to waiting threads; give them back if the group takes no part any more."""
        if self.is_retired:
            self.rest()
        else:
            self.queue.serve(self.permits.bell)

    def rest(self) -> int:
        """Give back every idle connection; return how many there were."""
        count = 0
        with contextlib.suppress(IndexError):
            while True:
                give_back(self.idle.pop())
                count += 1
        return count

    def retire(self) -> None:
        """Take no part any more: idle connections go now, those in use at checkin."""
        if not self.is_retired:
            self.is_retired = True
            self.queue.waiters.append(Waiter(Presence()))  # nobody; it leads every checkin to `serve`
        self.rest()

    def numbers(self) -> dict[str, float]:
        """Return this process's connections and counters of the group."""
        for lease in tuple(self.idle):
            lease.words[lease.checkouts_at] = lease.checkouts
        return {
            "idle": len(self.idle),
            "held": self.table.out(self.permits),
            "waiting": len(self.queue.waiters) - self.is_retired,
            **self.table.counters(self.permits),
        }

    # -- waiting

    def acquire(self, deadline: float) -> Lease:
        """Return a connection that rests, is handed over, or is opened, whichever comes first.

        Raises:
            PoolTimeout, NoEligibleEndpoint: nothing came by `deadline` (monotonic clock).
            psycopg2.OperationalError: endpoints were tried, and none took the connection.
        """
        attempt = Attempt()
        if not self.queue.waiters:
            lease = self._claim_and_open(attempt, deadline, scout=None)
            if lease is not None:
                return lease
        if deadline > monotonic():
            refuse_in_event_loop(self.settings.name)
        presence = Presence()
        waiter = Waiter(presence)
        self.queue.waiters.append(waiter)
        try:
            while True:
                if self.table.dropped:
                    tidy(self.table)
                if self.is_retired:
                    raise DisownedError("this group was replaced, or its pool was closed")
                lease = self._take_handed(waiter) or self.pop_idle()
                if lease is None and self.queue.take_scouting(waiter):
                    lease = self._scouted(waiter, attempt, deadline)
                if lease is not None:
                    attempt.failures.clear()  # their tracebacks refer to tokens: a forgotten one is to be dropped
                    lease.table.count_wait(lease, monotonic() - waiter.since)
                    return lease
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise self.give_up(attempt, monotonic() - waiter.since)
                if not self.queue.is_scout(waiter):
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
        self.queue.waiters.appendleft(waiter)  # it keeps its place
        return None

    def _leave_queue(self, waiter: Waiter) -> None:
        """End a call that waited; what was handed over to it meanwhile rests again."""
        self.queue.leave(waiter)
        with contextlib.suppress(IndexError):
            self.put_idle(waiter.handed.pop())

    def _scouted(self, waiter: Waiter, attempt: Attempt, deadline: float) -> Lease | None:
        """Get a permit and open a connection: for the head of the queue, or for the scout itself."""
        lease = self._claim_and_open(attempt, deadline, scout=waiter)
        if lease is None:
            if self.queue.is_scout(waiter):
                self.queue.pass_scouting_on(waiter)
            return None
        if self.queue.is_first(waiter):
            return lease
        self.put_idle(lease)
        return None

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
        route = self.router.route(attempt)
        has_nowhere = not route.order and (not route.last_resort or (attempt.has_tried and monotonic() >= deadline))
        token = None if has_nowhere else self._take_token()
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
        if scout is not None:
            self.queue.stop_scouting(scout)
        return open_lease(self, token, attempt, deadline)

    def yield_to_others(self, lease: Lease) -> None:
        """Give back a connection that another worker waits for, and let that one claim first."""
        give_back(lease)
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
            relieved = (is_choosy or len(self.queue.waiters) > 1) and monotonic() - began >= SLICE_S
            is_over = self.is_retired or not self.attachment.is_current()
            return bool((self.idle and not is_choosy) or scout.handed) or relieved or is_over

        return self.table.wait(
            token,
            self.permits,
            lambda: self._permits_of(self.router.route(attempt)),
            deadline,
            is_done=is_done,
            queued=lambda: max(0, len(self.queue.waiters) - 1),  # this one may just be out of the queue, to be served
            tell=lambda: self.attachment.say_waiting(self.permits.index),
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

    def _permits_of(self, route: Route) -> list[EndpointPermits]:
        return [self.attachment.endpoints[i] for i in route.order or route.last_resort if i in self.recipes]

    def give_up(self, attempt: Attempt, waited: float) -> Exception:
        """Return the error that tells best why nothing came in time."""
        self._count_timeout()
        if attempt.failures:
            return next(reversed(attempt.failures.values()))
        if attempt.route is not None and not attempt.route.order:
            return NoEligibleEndpoint(self.settings.name, self.settings.target, self.router.reasons(attempt.route))
        return PoolTimeout(describe_group(self.attachment.segment, self.settings.name, self.permits, waited))

    def _count_timeout(self) -> None:
        with contextlib.suppress(TableFullError):
            token = self.table.take(self.permits)
            self.table.words[token.detail_at + slots.TIMEOUTS] += 1
            self.table.put_back(token)
