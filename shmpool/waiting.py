"""The threads of one process that wait for a connection of a group.

Threads queue in order of arrival; one of them, the scout, sleeps on the group's bell for all.  What comes first serves
the head of the queue: a checkin of this process, or the connection that the scout opened with a permit.

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
from typing import TYPE_CHECKING

from shmpool.clock import monotonic
from shmpool.pool_errors import WouldBlockEventLoop
from shmpool.semaphores import SLICE_S, Semaphore, ring

if TYPE_CHECKING:
    from shmpool.lease import Lease


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


class Queue:
    """A group's waiting threads; `waiters` is what a checkin looks at.

    Args:
        idle: the group's idle connections.
    """

    def __init__(self, idle: deque[Lease]) -> None:
        self.waiters: deque[Waiter] = deque()
        self._idle = idle
        self._scout: Waiter | None = None

    def serve(self, bell: Semaphore) -> None:
        """Hand idle connections to waiting threads, first come first served."""
        while self._idle:
            waiter = self._next_to_serve()
            if waiter is None:
                scout = self._scout
                if scout is not None:
                    ring(bell)  # it sleeps there; a stranger may take the ring: a slice bounds the delay
                    scout.wake()  # or on its lock, while the worker holds all it may
                return
            try:
                waiter.handed.append(self._idle.pop())
            except IndexError:
                self.waiters.appendleft(waiter)
                return
            waiter.wake()
            if waiter.is_gone:
                with contextlib.suppress(IndexError):
                    self._idle.append(waiter.handed.pop())

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

    def take_scouting(self, waiter: Waiter) -> bool:
        """Have a thread sleep on the bell for all if no other does; return whether it does.  Two do no harm."""
        scout = self._scout
        if scout is None or scout.is_gone:
            self._scout = waiter
        return self._scout is waiter

    def is_scout(self, waiter: Waiter) -> bool:
        """Whether a thread is the one that sleeps on the bell."""
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

    def leave(self, waiter: Waiter) -> None:
        """Take a thread out whose call ends, and have another one scout in its place."""
        waiter.go()
        with contextlib.suppress(ValueError):
            self.waiters.remove(waiter)
        self.stop_scouting(waiter)

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
