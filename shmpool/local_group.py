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
from shmpool.attachment import Attachment, has_threads
from shmpool.clock import monotonic, slept
from shmpool.connection import Recipe, answers, is_alive
from shmpool.errors import DisownedError, TableFullError
from shmpool.lease import BYPASS_S, Lease, disown, give_back, tidy
from shmpool.moving import give_up, take_over
from shmpool.pool_errors import NoEligibleEndpoint, PoolTimeout, TooManyWaiting
from shmpool.reports import describe_group
from shmpool.router import Attempt, Router
from shmpool.routing import Route
from shmpool.semaphores import SLICE_S, Semaphore, sleep_on
from shmpool.settings import GroupSettings
from shmpool.slots import EndpointPermits, GroupPermits
from shmpool.waiting import REST_S, Presence, Queue, Waiter, refuse_in_event_loop
from shmpool.warmup import WarmUp
from shmpool.words import MOVE, Status

if TYPE_CHECKING:
    from shmpool.pool import Pool

PING_TIMEOUT_S: Final = 5.0
RESTED_S: Final = 0.5  # the only one at rest, if used more often, is opened anew by its next user, not ahead of it
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
        self.warmup = WarmUp()
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
        """Give back idle connections that are recalled, too old, unused for `max_idle` (if not kept), or that died.

        Those of a replica that lags too far as well, where there is a better one; and one of those that fell back,
        while the group may hold no more like it.  What rested and is to move is opened anew at once, where threads run.
        """
        now = monotonic()
        moved = 0
        may_yield = True
        for _ in range(len(self.idle)):
            try:
                lease = self.idle.popleft()
            except IndexError:
                break
            if lease.words[lease.recall_at] == lease.words[lease.word_at]:
                self.yield_to_others(lease)
            elif self.is_retired or self._is_unused(lease, now):
                give_back(lease)
            elif self.leave_for_better(lease):
                moved += bool(self.idle) or now - lease.since >= RESTED_S
            elif not self.is_fit(lease, is_wanted=False):
                continue
            elif self.router.is_too_slow(lease.recipe.endpoint.index):
                give_back(lease)
            elif may_yield and self.router.is_fallback_spent(lease.recipe.endpoint.index, now - lease.since):
                may_yield = False
                give_back(lease)
            else:
                self.put_idle(lease)
        for _ in range(moved if has_threads() else 0):
            self._open_ahead()

    def leave_for_better(self, lease: Lease) -> bool:
        """Give a connection back that is to move, if it still would be opened elsewhere; return whether it was."""
        if lease.words[lease.recall_at] != lease.words[lease.word_at] | MOVE:
            return False
        if not lease.table.owns(lease) or not self.router.turn_to_better(lease.recipe.endpoint.index):
            return False
        give_back(lease)
        self.queue.wake_scout()
        return True

    def _open_ahead(self) -> None:
        """Open a connection for the next request that needs one; a failure is left to that request."""
        attempt, deadline = Attempt(), monotonic() + self.settings.timeout
        try:
            lease = self.try_open(attempt, deadline, may_wait=False)
            if lease is None and attempt.failures:  # elsewhere, then: where it comes from, as a rule
                lease = self.try_open(attempt, deadline, may_wait=False)
        except Exception as error:  # noqa: BLE001  whatever `on_connect` raises: the thread is to go on
            import logging  # cold, and an application has it anyway

            logging.getLogger("shmpool").warning(
                "pool %s: group %s: no connection opened ahead (%s)",
                self.pool.name,
                self.settings.name,
                type(error).__name__,
            )
            return
        finally:
            attempt.failures.clear()  # as in `acquire`
        if lease is not None:
            self.put_idle(lease)

    def _is_unused(self, lease: Lease, now: float) -> bool:
        """Whether a connection has rested for `max_idle`, and is none of those that the worker keeps."""
        if now - lease.since < self.settings.max_idle:
            return False
        return self.table.out(self.permits) > self.settings.per_worker_min

    def put_idle(self, lease: Lease) -> None:
        """Let a connection rest; serve a waiting thread first."""
        if lease.is_reserved and self._keep_reserved(lease):
            return
        lease.words[lease.use_at] = lease.idle_use
        lease.idle.append(lease)
        if self.queue.waiters:
            self.serve()

    def _keep_reserved(self, lease: Lease) -> bool:
        """Keep a permit of the reserve from normal work; return False where the reserve is whole without it.

        A thread of high priority gets the connection, or it is closed: what rests is anybody's.
        """
        if self.is_retired or self.permits.semaphore.value >= self.settings.reserve:
            lease.unreserve()
            if lease.words[lease.recall_at] != lease.words[lease.word_at]:
                return False
            self.yield_to_others(lease)
            return True
        if not self.queue.serve_high(lease, self.permits.bell):
            give_back(lease)
        return True

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

    def acquire(self, deadline: float, *, is_high: bool = False) -> Lease:
        """Return a connection that rests, is handed over, or is opened, whichever comes first.

        Args:
            is_high: be served before those that are not, also with a permit that the group reserves.

        Raises:
            PoolTimeout, NoEligibleEndpoint: nothing came by `deadline` (monotonic clock).
            TooManyWaiting: as many as may wait do so already.
            psycopg2.OperationalError: endpoints were tried, and none took the connection.
        """
        attempt = Attempt(is_high=is_high)
        if not self.queue.waiters or (is_high and not self.queue.has_high()):
            lease = self._claim_and_open(attempt, deadline, scout=None)
            if lease is not None:
                return lease
        may_wait = deadline > monotonic()
        if may_wait:
            refuse_in_event_loop(self.settings.name)
        presence = Presence()
        waiter = Waiter(presence, is_high=is_high)
        self.queue.enter(waiter)
        was_served = False
        try:
            if may_wait:
                self._bound_waiting(waiter)
            while True:
                if self.table.dropped:
                    tidy(self.table)
                if self.is_retired:
                    raise DisownedError("this group was replaced, or its pool was closed")
                lease = self._take_handed(waiter)
                was_served = lease is not None
                if lease is None:
                    lease = self.pop_idle()
                may_rest = False
                if lease is None and self.queue.take_scouting(waiter):
                    may_rest = not self.queue.is_look_due()
                    if not may_rest:
                        lease = self._scouted(waiter, attempt, deadline)
                if lease is not None:
                    attempt.failures.clear()  # their tracebacks refer to tokens: a forgotten one is to be dropped
                    lease.table.count_wait(lease, monotonic() - waiter.since)
                    return lease
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise self.give_up(attempt, monotonic() - waiter.since)
                if may_rest:
                    waiter.sleep(min(remaining, REST_S))
                elif not waiter.handed and not self.queue.is_scout(waiter):
                    waiter.sleep(remaining)
        finally:
            self._leave_queue(waiter, was_served=was_served)

    def _take_handed(self, waiter: Waiter) -> Lease | None:
        try:
            lease = waiter.handed.pop()
        except IndexError:
            return None
        if self.is_fit(lease):
            return lease
        self.queue.put_back(waiter)
        return None

    def _bound_waiting(self, waiter: Waiter) -> None:
        """Refuse a thread that queues behind as many as may wait.  By its place: of two at once one is let in.

        Raises:
            TooManyWaiting: that is so.
        """
        most = self.settings.max_waiting
        if most and self.queue.count_before(waiter) >= most:
            self._count(slots.REFUSED)
            raise TooManyWaiting(self.settings.name, most)

    def _leave_queue(self, waiter: Waiter, *, was_served: bool = False) -> None:
        """End a call that waited; what was handed over to it meanwhile rests again."""
        self.queue.leave(waiter, was_served=was_served)
        if waiter.handed:
            with contextlib.suppress(IndexError):
                self.put_idle(waiter.handed.pop())

    def _scouted(self, waiter: Waiter, attempt: Attempt, deadline: float) -> Lease | None:
        """Get a permit and open a connection: for the head of the queue, or for the scout itself."""
        lease = self._claim_and_open(attempt, deadline, scout=waiter)
        if lease is None:
            if self.queue.is_scout(waiter):
                self.queue.pass_scouting_on(waiter)
            return None
        if self.queue.is_first(waiter) and (waiter.is_high or not lease.is_reserved):
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
        """Claim permits, as scout waiting for them, and open a connection; None: look again."""
        if self.is_retired or not self.attachment.is_current():
            raise DisownedError("this group was replaced, or the attachment is not this process's any more")
        if scout is None and self.permits.semaphore.value <= self._leave(attempt):
            return None  # the common case under load
        self._be_polite(deadline)
        route = self.router.route(attempt)
        has_nowhere = not route.order and (not route.last_resort or (attempt.has_tried and monotonic() >= deadline))
        token = None if has_nowhere else self._take_token()
        if token is None:
            if scout is not None:
                scout.sleep(deadline - monotonic())
            return None
        if scout is None:
            left = self._leave(attempt)
            granted = self.table.claim_once(token, self.permits, self._permits_of(route), left)
        else:
            granted = self._wait_for_permits(token, attempt, deadline, scout)
        if not granted:
            self.table.put_back(token)
            return None
        if scout is not None:
            self.queue.stop_scouting(scout)
        left = attempt.left
        lease = take_over(self, token, attempt, deadline)
        if lease is not None and left < self.settings.reserve and not self.attachment.keeps_nothing:
            lease.reserve()
        return lease

    def _leave(self, attempt: Attempt, *, is_for_first: bool = False) -> int:
        """Return how many free permits a claim leaves to others.

        Args:
            is_for_first: it is made for who stands first in the queue, whoever makes it.
        """
        is_high = attempt.is_high or (is_for_first and self.queue.has_high())
        attempt.left = 0 if is_high else self.settings.reserve
        return attempt.left

    def yield_to_others(self, lease: Lease) -> None:
        """Give up a connection that another worker waits for, and let that one claim first."""
        give_up(lease)
        self._polite_until = monotonic() + POLITE_S

    def _be_polite(self, deadline: float) -> None:
        """After a connection was given up for others: one short sleep before the next claim; never on the bell."""
        pause = min(self._polite_until, deadline) - monotonic()
        if pause > 0:
            time.sleep(pause)

    def _wait_for_permits(self, token: Lease, attempt: Attempt, deadline: float, scout: Waiter) -> bool:
        began = monotonic()

        def is_done() -> bool:
            is_choosy = attempt.only is not None
            relieved = (is_choosy or len(self.queue.waiters) > 1) and monotonic() - began >= SLICE_S
            is_over = self.is_retired or not self.attachment.is_current()
            return bool((self.idle and not is_choosy) or scout.handed) or relieved or is_over

        def rest(bell: Semaphore, seconds: float) -> bool:
            if attempt.only is None and self.queue.is_lively():
                scout.sleep(min(seconds, REST_S))
                return bool(self.permits.semaphore.value > attempt.left)
            scout.is_on_bell = True
            try:
                return not scout.handed and sleep_on(bell, seconds)
            finally:
                scout.is_on_bell = False

        return self.table.wait(
            token,
            self.permits,
            lambda: self._permits_of(self.router.route(attempt)),
            deadline,
            is_done=is_done,
            queued=lambda: max(0, len(self.queue.waiters) - 1),  # this one may just be out of the queue, to be served
            leave=lambda: self._leave(attempt, is_for_first=attempt.only is None),
            stand_aside=scout.sleep,
            rest=rest,
            tell=lambda: self.attachment.say_waiting(self.permits.index),
            is_choosy=attempt.only is not None or len(self.attachment.users) > 1,  # another pool's are not for this one
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
        self._count(slots.TIMEOUTS)
        if attempt.failures:
            return next(reversed(attempt.failures.values()))
        route = attempt.route or self.router.route(attempt)
        if not route.order:
            return NoEligibleEndpoint(self.settings.name, self.settings.target, self.router.reasons(route))
        told = describe_group(self.attachment.segment, self.settings.name, self.permits, waited)
        if self.settings.reserve and not attempt.is_high:
            told += f"; {self.settings.reserve} reserved for high priority"
        return PoolTimeout(told)

    def _count(self, column: int) -> None:
        """Count a checkout that ended without a connection."""
        with contextlib.suppress(TableFullError):
            token = self.table.take(self.permits)
            self.table.words[token.detail_at + column] += 1
            self.table.put_back(token)
