"""The background thread of an attachment: control connection, recall, idle connections.

It starts on first use in a process and ends before a fork.  While no coordinator answers it tries again, later and
later; everything that needs one goes on without.

Threads.  `say` may be called from any thread; the socket is written without waiting, and what does not fit is lost:
every message is advice.
Fork.  `stop` is called before a fork; a child starts its own on first use.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from shmpool.chance import chance
from shmpool.clock import monotonic
from shmpool.control_client import ControlError, connect
from shmpool.frames import FrameError, Frames, encode
from shmpool.names import Names

SWEEP_S: Final = 5.0  # between looks at idle connections when nothing is asked for
FIRST_LOOK_S: Final = 1.0
CONNECT_TIMEOUT_S: Final = 1.0
RETRY_MIN_S: Final = 0.2
RETRY_MAX_S: Final = 5.0
ALONE_S: Final = 5.0  # without a coordinator: whoever restarts it (a service manager) goes first

ROUND_S: Final = 0.1  # between two looks where there are no threads


class Background:
    """One thread of one attachment.

    Args:
        greetings: messages to begin a connection with, encoded: the first names the process and its row.
        look: called in the thread after a message from the coordinator, and when the seconds that it returned are over,
            SWEEP_S at most.
        alone: called in the thread, again and again, when no coordinator has answered for ALONE_S.
    """

    def __init__(
        self,
        names: Names,
        greetings: Callable[[], bytes],
        look: Callable[[], float],
        alone: Callable[[], None] = lambda: None,
    ) -> None:
        self._names = names
        self._greetings = greetings
        self._look = look
        self._alone = alone
        self._alone_since = monotonic()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self._socket: socket.socket | None = None
        self._retry_at = 0.0
        self._retry_s = RETRY_MIN_S
        self._look_in = FIRST_LOOK_S
        self._thread = threading.Thread(target=self._run, name=f"shmpool-{names.pool}", daemon=True)
        self._thread.start()

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message if a coordinator is connected; never waits."""
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.send(encode(kind, **fields), socket.MSG_DONTWAIT)

    def stop(self, within: float) -> bool:
        """End the thread; return whether it has ended."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")
        os.close(self._wake_write)  # by whoever wrote: the number may be another file's right afterwards
        if self._thread is not threading.current_thread():
            self._thread.join(within)
        return not self._thread.is_alive()

    def _run(self) -> None:
        frames = Frames()
        try:
            while not self._stopping:
                if self._socket is None and monotonic() >= self._retry_at:
                    frames = Frames()
                    self._connect()
                    if self._socket is None and monotonic() - self._alone_since >= ALONE_S:
                        self._alone()
                self._wait(frames)
                if not self._stopping:
                    self._look_in = self._look()
        except Exception:
            if not self._stopping:
                import logging  # cold, and an application has it anyway

                logging.getLogger("shmpool").exception(
                    "pool %s: background thread ended; idle connections are looked after at checkout",
                    self._names.pool,
                )
        finally:
            self._disconnect()
            os.close(self._wake_read)

    def _connect(self) -> None:
        try:
            connection = connect(self._names, CONNECT_TIMEOUT_S)
            connection.sendall(self._greetings())
        except (ControlError, OSError):
            self._retry_s = min(RETRY_MAX_S, self._retry_s * 2)
            self._retry_at = monotonic() + self._retry_s * (0.5 + chance() / 2)
        else:
            self._retry_s = RETRY_MIN_S
            self._socket = connection
            self._alone_since = float("inf")

    def _wait(self, frames: Frames) -> None:
        """Sleep until a message, `stop`, the next try to connect, or the next sweep."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        seconds = min(SWEEP_S, self._look_in)
        if self._socket is not None:
            poller.register(self._socket, select.POLLIN)
        else:
            seconds = min(seconds, max(0.0, self._retry_at - monotonic()))
        ready = [fd for fd, _ in poller.poll(seconds * 1000)]
        if self._socket is not None and self._socket.fileno() in ready:
            self._receive(frames)

    def _receive(self, frames: Frames) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(4096, socket.MSG_DONTWAIT)
            if not data:
                self._disconnect()
                return
            frames.feed(data)  # which message it was does not matter: the tables say what is wanted
        except BlockingIOError:
            return
        except (OSError, FrameError):
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        self._alone_since = monotonic()
        self._retry_at = monotonic() + RETRY_MIN_S * chance()
        if connection is not None:
            connection.close()


class Rounds:
    """What stands in for the thread where threads do not run: whoever calls `go` does what is due.

    There is no control connection: what the coordinator asks for is in the tables, and it looks by itself.

    Args:
        look, alone: as of Background, but called by `go`.
        is_coordinated: tells whether there is a coordinator.
        greet: called when one is there that was not.
    """

    def __init__(
        self,
        look: Callable[[], object],
        alone: Callable[[], None],
        is_coordinated: Callable[[], bool],
        greet: Callable[[], None] = lambda: None,
    ) -> None:
        self._look = look
        self._alone = alone
        self._is_coordinated = is_coordinated
        self._greet = greet
        self._is_greeted = False
        self._next_look = 0.0
        self._alone_since = monotonic()

    def go(self) -> None:
        """Look after what there is, if the last time is ROUND_S ago."""
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + ROUND_S
        self._look()
        if self._is_coordinated():
            self._alone_since = now
            if not self._is_greeted:
                self._is_greeted = True
                self._greet()
            return
        self._is_greeted = False
        if now - self._alone_since >= ALONE_S:
            self._alone()

    def say(self, kind: str, **fields: Any) -> None:
        """Tell nobody."""

    def stop(self, within: float) -> bool:
        """Nothing runs."""
        return True
