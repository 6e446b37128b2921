"""The thread that cuts connections whose server does not answer in time (`query_timeout`).

One for all pools of a process; it runs only while something is watched, and sleeps until the first query could be
due.  It is not the background thread of an attachment, which closes connections and talks to the coordinator: either
may take longer than a blocked caller is to wait.

Guarantees: what is forgotten is not touched any more.
Threads.  `add` and `forget` may be called anywhere, in signal handlers and at garbage collection too.
Fork.  The thread ends before a fork and comes back in the parent.  A child watches nothing, also where no at-fork
    handlers run: what is kept is kept by process id.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final, Protocol

from shmpool.clock import monotonic

LATE_S: Final = 0.1  # woken so much later than wanted, the whole process stood still
GRACE_S: Final = 0.05  # for the other threads to read what came meanwhile; also between looks at what is not due yet
STOP_S: Final = 2.0


class Watched(Protocol):
    """A connection that may wait for its server for `query_timeout` seconds."""

    asked_at: float  # CLOCK_MONOTONIC; infinite while nothing is asked
    query_timeout: float

    def cut_if_waiting(self, asked_at: float) -> bool:
        """Cut it if it still waits for what was asked then; return whether it was.  Never waits."""

    def tell_cut(self) -> None:
        """Tell whoever wants to know that it was cut."""


class Watch:
    """What one process watches."""

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._changed = threading.Condition(threading.RLock())  # a signal handler may come here again
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def add(self, watched: Watched) -> None:
        """Watch a connection from now on, until it is forgotten or gone."""
        with self._changed:
            self._watched.add(watched)
        self.start()

    def forget(self, watched: Watched) -> None:
        """Watch a connection no more; it is not touched after this returns."""
        with self._changed:
            self._watched.discard(watched)
            if not self._watched:
                self._changed.notify_all()

    def start(self) -> None:
        """Run the thread if there is something to watch; one that runs looks anew."""
        with self._changed:
            self._is_stopping = False
            if not self._watched or self._thread is not None:
                self._changed.notify_all()
                return
            self._thread = threading.Thread(target=self._run, name="shmpool-watch", daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._thread = None
                raise

    def stop(self) -> None:
        """End the thread, and wait for that; what is watched is kept for `start`."""
        with self._changed:
            thread, self._is_stopping = self._thread, True
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_S)

    def _run(self) -> None:
        is_late = False
        try:
            while True:
                with self._changed:
                    if is_late:
                        self._changed.wait(GRACE_S)
                    if self._is_stopping or not self._watched:
                        self._thread = None
                        return
                    again, cut = self._look(monotonic())
                    if not cut:
                        self._changed.wait(min(max(0.0, again - monotonic()), threading.TIMEOUT_MAX))
                    is_late = not cut and monotonic() - again > LATE_S
                for watched in cut:
                    watched.tell_cut()  # may block: logging
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None  # it failed; the next connection starts another one

    def _look(self, now: float) -> tuple[float, list[Watched]]:
        """Cut what waits for too long; return when to look again, and what was cut."""
        again, cut = float("inf"), []
        for watched in list(self._watched):
            asked_at, seconds = watched.asked_at, watched.query_timeout
            if asked_at + seconds > now:
                again = min(again, asked_at + seconds, now + seconds)  # what is asked later is due later
            elif watched.cut_if_waiting(asked_at):
                self._watched.discard(watched)
                cut.append(watched)
            else:
                again = min(again, now + GRACE_S)
        return again, cut


_watches: dict[int, Watch] = {}


def watch() -> Watch:
    """Return what this process watches."""
    return _watches.setdefault(os.getpid(), Watch())


def _before_fork() -> None:
    known = _watches.get(os.getpid())
    if known is not None:
        known.stop()


def _after_fork_in_parent() -> None:
    known = _watches.get(os.getpid())
    if known is not None:
        known.start()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_watches.clear)
