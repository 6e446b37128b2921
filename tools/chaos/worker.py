"""The workers of a chaos run, and the nursery that forks them from a warm process.

`python -m tools.chaos.worker POOL BOARD WORKERS LOG` is the nursery.  It reads `PLACE SEED` lines, forks a worker for
each, answers `started PLACE PID`, and tells `ended PLACE PID STATUS` of each that ends.  The end of its input ends
everything that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

import psycopg2

from shmpool import Handle, Pool
from tools.chaos.board import THREADS, Board, Column

CHILD_S: Final = 2.0  # a forked child that takes longer is stuck in a lock of a C library
ALARMS_S: Final = ((0.00001, 0.0006), (0.0002, 0.03))  # into a bracket that comes next, or into anything
ROUNDS: Final = (
    ("brief", 30),
    ("idle", 35),
    ("query", 15),
    ("transaction", 10),
    ("drop", 7),
    ("leave open", 2),
    ("fork", 1),
)
_PR_SET_CHILD_SUBREAPER: Final = 36


class InterruptedByHandlerError(BaseException):
    """What the signal handler raises, wherever the main thread happens to be."""


class Worker:
    """One worker process, in its place."""

    def __init__(self, pool: str, board: Board, place: int, seed: str, log: int) -> None:
        self.pool = Pool(pool)
        self.board = board
        self.place = place
        self.seed = seed
        self.log = log
        self.is_ending = False

    def run(self) -> None:
        """Work in all threads until SIGTERM; raises nothing."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(1, THREADS)]
        for thread in threads:
            thread.start()
        self._work_under_alarms()
        for thread in threads:
            thread.join()
        self.pool.close()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.is_ending = True

    def _work(self, thread: int) -> None:
        rng, row = random.Random(f"{self.seed} {thread}"), self.board.at(self.place, thread)
        while not self.is_ending:
            self._round(rng, row)

    def _work_under_alarms(self) -> None:
        rng, row = random.Random(f"{self.seed} 0"), self.board.at(self.place, 0)
        signal.signal(signal.SIGALRM, self._raise)
        while not self.is_ending:
            try:
                while not self.is_ending:
                    try:
                        self._round(rng, row, self._set_alarm)
                    except InterruptedByHandlerError:
                        self.board.add(row, Column.RAISED)
            except InterruptedByHandlerError:  # one that came after the round; each was set by a round
                continue

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self.is_ending:
            raise InterruptedByHandlerError

    @staticmethod
    def _set_alarm(rng: random.Random) -> None:
        if rng.random() < 0.5:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(*rng.choice(ALARMS_S)))

    def _round(
        self, rng: random.Random, row: int, set_alarm: Callable[[random.Random], None] = lambda rng: None
    ) -> None:
        kinds, weights = zip(*ROUNDS, strict=True)
        kind = rng.choices(kinds, weights)[0]
        if kind == "fork":
            self._fork(rng, row)
            return
        set_alarm(rng)
        handle = self._checkout(rng.choice(("read", "read", "write")), row)
        if handle is None:
            return
        try:
            self._use(handle, kind, rng, row)
            set_alarm(rng)
            if kind not in ("drop", "leave open"):
                handle.close()
        except psycopg2.Error as error:  # a server fault; whether it was one is for the runner to judge
            self.board.add(row, Column.BROKEN)
            self.tell(f"in use: {type(error).__name__}: {error}")
            handle.close()
        finally:
            self.board.words[row + Column.SLEEPING] = 0
        if kind in ("drop", "leave open"):
            self.board.add(row, Column.DROPPED)
        del handle
        if kind == "idle":
            time.sleep(rng.uniform(0.0, 0.15))

    def _checkout(self, group: str, row: int) -> Handle | None:
        try:
            handle = self.pool.checkout(group)
        except Exception as error:  # noqa: BLE001  whatever it is: a checkout that failed
            self.board.add(row, Column.FAILED)
            self.tell(f"checkout of {group!r} failed: {type(error).__name__}: {error}")
            time.sleep(0.05)
            return None
        self.board.add(row, Column.CHECKOUTS)
        return handle

    def _use(self, handle: Handle, kind: str, rng: random.Random, row: int) -> None:
        with handle.cursor() as cur:
            if kind == "query":
                self.board.words[row + Column.SLEEPING] = handle.get_backend_pid()
                cur.execute(f"select pg_sleep({rng.uniform(0.02, 0.4):.3f})")
                self.board.words[row + Column.SLEEPING] = 0
            elif kind == "transaction":
                cur.execute("begin" if handle.autocommit else "select 1")
                cur.execute("select count(*) from pg_class")
                time.sleep(rng.uniform(0.0, 0.02))
            else:
                cur.execute("select 1")
            if kind == "leave open":
                cur.execute("begin" if handle.autocommit else "select 1")

    def _fork(self, rng: random.Random, row: int) -> None:
        handle = self._checkout("read", row)
        uses_pool = rng.random() < 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and newer: fork beside threads
            pid = os.fork()
        if pid == 0:
            self._be_child(handle, uses_pool=uses_pool)
        self.board.add(row, Column.FORKED)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            self.board.add(row, Column.FORKS_STUCK)
        if handle is not None:
            handle.close()

    def _be_child(self, handle: Handle | None, *, uses_pool: bool) -> None:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, CHILD_S)
            if handle is not None:
                handle.close()  # the parent's: nothing must come of it
            if uses_pool:
                with contextlib.suppress(psycopg2.Error):
                    self.pool.checkout("read", 0.2).close()
                self.pool.close()
        finally:
            os._exit(0)

    def tell(self, text: str) -> None:
        """Append a line to the workers' log (one write: whole, whoever else writes)."""
        os.write(self.log, f"worker {self.place} pid {os.getpid()}: {' '.join(text.split())}\n".encode())


def nursery(pool: str, board: Board, log: int) -> None:
    """Serve the runner's lines until its end of the pipe closes."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # workers' own children end with them
    places: dict[int, int] = {}
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    gc.collect()
    gc.freeze()
    pending = b""
    while True:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
        for pid, status in _ended():
            if pid in places:
                print(f"ended {places.pop(pid)} {pid} {status}", flush=True)
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                place, seed = line.decode().split(maxsplit=1)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for fd in (wake_read, wake_write):
                        os.close(fd)
                    _be_worker(pool, board, int(place), seed, log)
                places[pid] = int(place)
                print(f"started {place} {pid}", flush=True)
    for pid in places:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def _be_worker(pool: str, board: Board, place: int, seed: str, log: int) -> None:
    """Be a worker and end; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        faulthandler.register(signal.SIGUSR1)  # the runner asks a worker that hangs where it is
        Worker(pool, board, place, seed, log).run()
        code = 0
    except BaseException:  # noqa: BLE001  sys.excepthook does not run before os._exit
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    """Be the nursery."""
    pool, board, workers, log = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log_fd, 2)
    nursery(pool, Board(Path(board), int(workers)), log_fd)


if __name__ == "__main__":
    main()
