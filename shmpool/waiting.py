"""The threads of one process that wait for a connection of a group.

Threads queue in order of arrival, those of high priority before the others; one of them, the scout, looks for permits
for all.  What comes first serves the head of the queue: a checkin of this process, or the connection that the scout
opened with a permit.

A scout that sleeps on the group's bell cannot be woken by its own process: a stranger may take the ring.  So it sleeps
there only while no checkin serves the queue.  Else it sleeps on its lock like the others and is served in its turn; one
in LOOK_EVERY_S looks for permits meanwhile, every REST_S, and is seen to wait.

Guarantees: a connection that is handed over and not taken goes back to the idle ones.
Threads.  Deques and single attribute stores carry all shared state: no lock but the one that each waiter sleeps on.
If a thread is interrupted by an exception.  A waiter that left without leaving the queue is skipped when its turn
    comes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from itertools import takewhile
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from shmpool.clock import monotonic
from shmpool.pool_errors import WouldBlockEventLoop
from shmpool.semaphores import SLICE_S, Semaphore, ring

if TYPE_CHECKING:
    from shmpool.lease import Lease

LIVELY_S: Final = 0.02  # since the last checkin that served the queue: so long another one is expected
LOOK_EVERY_S: Final = 0.1  # while checkins serve the queue, and waits are short: a look costs as much as a few of them
REST_S: Final = 0.005  # a scout's sleep on its lock
_is_high: Final = attrgetter("is_high")


class Presence:
    """Lives as long as a call that waits."""

    __slots__ = ("__weakref__",)


class Waiter:
    """A thread in the queue; `handed` is what it was handed, at most one.

    Whoever hands something over looks at `is_gone` afterwards; whoever goes calls `go` before looking at `handed`:
    one of the two takes it back.  A call that a signal handler ended before it could go has dropped its presence.

    Whoever is about to sleep on the bell sets `is_on_bell` before it looks at `handed` once more.

    Args:
        presence: what the waiting call alone refers to.
        is_high: whether it is served before those that are not.
    """

    __slots__ = ("_has_left", "_presence", "handed", "is_high", "is_on_bell", "lock", "since")

    def __init__(self, presence: Presence, *, is_high: bool = False) -> None:
        self.is_high = is_high
        self.is_on_bell = False
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
        try:
            self.lock.release()
        except RuntimeError:
            return  # it is awake already

    def sleep(self, seconds: float) -> None:
        """Sleep until woken, for one slice at most."""
        self.lock.acquire(timeout=max(0.0, min(seconds, SLICE_S)))


class Queue:
    """A group's waiting threads; `waiters` is what a checkin looks at.

    Args:
        idle: the group's idle connections.
    """

    def __init__(self, idle: deque[Lease]) -> None:
        self.waiters: deque[Waiter] = deque()
        self._idle = idle
        self._scout: Waiter | None = None
        self._served_at = -LIVELY_S  # monotonic
        self._look_at = 0.0  # monotonic

    def enter(self, waiter: Waiter) -> None:
        """Queue a thread: behind its like, and one of high priority before all others."""
        if waiter.is_high:
            self.waiters.insert(self._count_high(), waiter)
        else:
            self.waiters.append(waiter)

    def put_back(self, waiter: Waiter) -> None:
        """Queue a thread again that was taken out in vain: it keeps its place."""
        if waiter.is_high:
            self.waiters.appendleft(waiter)
        else:
            self.waiters.insert(self._count_high(), waiter)

    def _count_high(self) -> int:
        return sum(1 for _ in takewhile(_is_high, tuple(self.waiters)))

    def has_high(self) -> bool:
        """Whether a thread of high priority waits; wherever it stands, should others have moved when it came."""
        return any(waiter.is_high and not waiter.is_gone for waiter in tuple(self.waiters))

    def count_before(self, waiter: Waiter) -> int:
        """Return how many threads are served before one of the queue; 0 if it is out of it, to be served."""
        waiters = tuple(self.waiters)
        place = waiters.index(waiter) if waiter in waiters else 0
        return sum(not other.is_gone for other in waiters[:place])

    def serve(self, bell: Semaphore) -> None:
        """Hand idle connections to waiting threads, high priority first, then first come first served."""
        while self._idle:
            waiter = self._next_to_serve()
            if waiter is None:
                scout = self._scout
                if scout is not None:
                    ring(bell)  # it sleeps there; a stranger may take the ring: a slice bounds the delay
                    scout.wake()  # or on its lock, while the worker holds all it may
                return
            try:
                lease = self._idle.pop()
            except IndexError:
                self.put_back(waiter)
                return
            if self._hand(waiter, lease, bell):
                self._served_at = monotonic()
            else:
                self._idle.append(lease)

    def is_lively(self) -> bool:
        """Whether checkins of this process serve the queue."""
        return monotonic() - self._served_at < LIVELY_S

    def is_look_due(self) -> bool:
        """Whether the scout is to look for permits now, and not only rest."""
        now = monotonic()
        if now < self._look_at and now - self._served_at < LIVELY_S:
            return False
        self._look_at = now + LOOK_EVERY_S
        return True

    def serve_high(self, lease: Lease, bell: Semaphore) -> bool:
        """Hand a connection to the first thread of high priority; return whether there was one."""
        for waiter in tuple(self.waiters):
            if not waiter.is_high or waiter.is_gone:
                continue
            try:
                self.waiters.remove(waiter)
            except ValueError:
                continue  # it is just being served
            if self._hand(waiter, lease, bell):
                return True
        return False

    def _hand(self, waiter: Waiter, lease: Lease, bell: Semaphore) -> bool:
        """Hand a connection to a thread that was taken out of the queue; False: it has gone, and did not take it."""
        waiter.handed.append(lease)
        waiter.wake()
        if waiter.is_on_bell:
            ring(bell)
        if waiter.is_gone:
            with contextlib.suppress(IndexError):
                waiter.handed.pop()
                return False
        return True

    def _next_to_serve(self) -> Waiter | None:
        """Take the first waiter out of the queue; one that sleeps on the bell only if it goes first by right."""
        waiter = self._pop_waiter()
        if waiter is None or not waiter.is_on_bell or waiter.is_high:
            return waiter
        following = self._pop_waiter()
        self.put_back(waiter)
        return following

    def _pop_waiter(self) -> Waiter | None:
        """Take the first waiter out of the queue; one that went while it was out of it is forgotten."""
        try:
            while True:
                waiter = self.waiters.popleft()
                if not waiter.is_gone:
                    return waiter
        except IndexError:
            return None

    def take_scouting(self, waiter: Waiter) -> bool:
        """Have a thread look for permits for all if no other does; return whether it does.  Two do no harm."""
        scout = self._scout
        if scout is None or scout.is_gone:
            self._scout = waiter
        return self._scout is waiter

    def is_scout(self, waiter: Waiter) -> bool:
        """Whether a thread is the one that looks for permits."""
        return self._scout is waiter

    def stop_scouting(self, waiter: Waiter) -> None:
        """Let another thread scout, if this one does: opening takes a while."""
        if self._scout is waiter:
            self._scout = None
            self._wake_youngest(waiter)

    def wake_scout(self) -> None:
        """Let the scout look again: the process may hold more than it did."""
        scout = self._scout
        if scout is not None:
            scout.wake()

    def is_first(self, waiter: Waiter) -> bool:
        """Whether nobody queues before this thread.  By index: an iterator fails when another thread queues."""
        try:
            return self.waiters[0] is waiter
        except IndexError:
            return True

    def pass_scouting_on(self, waiter: Waiter) -> None:
        """After a slice in vain the youngest waiter scouts, so that checkins serve this thread in its turn."""
        with contextlib.suppress(IndexError):
            youngest = self.waiters[-1]
            if youngest is not waiter:
                self._scout = youngest
                youngest.wake()

    def leave(self, waiter: Waiter, *, was_served: bool) -> None:
        """Forget a thread whose call ends, and have another one scout in its place.

        At once, unless checkins serve: then it is the next that comes, or that wakes by itself, a slice later at most.

        Args:
            was_served: it was taken out of the queue for what it was handed.
        """
        waiter.go()
        if not was_served:
            with contextlib.suppress(ValueError):
                self.waiters.remove(waiter)
        if self._scout is waiter:
            self._scout = None  # who comes next takes its place
            if not self.is_lively():
                self._wake_youngest(waiter)

    def _wake_youngest(self, but: Waiter) -> None:
        with contextlib.suppress(IndexError):
            if self.waiters[-1] is not but:
                self.waiters[-1].wake()


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
