"""A worker in a container: does what it is told on standard input, and answers on standard output, in lines of JSON.

Run: `python -m tests.support.contained_worker POOL`; ends in order at the end of its input.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from typing import Any

from shmpool import Handle, Pool
from tests.support.load import run_process

PLACES = ("/", "/tmp", "/var", "/var/tmp", "/run", "/root", "/home", "/mnt", "/dev/shm", ".", sys.prefix)


class Desk:
    """What it can be told to do; each method answers with plain values."""

    def __init__(self, pool: str) -> None:
        self._pool = Pool(pool)
        self._held: list[Handle] = []

    def who(self) -> dict[str, Any]:
        """Tell the own pid, its namespace, and the processes that can be seen."""
        return {
            "pid": os.getpid(),
            "namespace": os.stat("/proc/self/ns/pid").st_ino,
            "processes": [int(entry) for entry in os.listdir("/proc") if entry.isdigit()],
        }

    def hold(self, group: str, count: int, timeout: float = 10.0) -> list[int]:
        """Check connections out and keep them; return the server processes."""
        self._held += [self._pool.checkout(group, timeout=timeout) for _ in range(count)]
        return self.select()

    def select(self) -> list[int]:
        """Use every connection that is held; return the server processes."""
        return [_backend(handle) for handle in self._held]

    def sleep(self) -> None:
        """Let a thread run a query that does not end."""
        threading.Thread(target=self._sleep, daemon=True).start()

    def _sleep(self) -> None:
        with self._held[0].cursor() as cursor:
            cursor.execute("SELECT pg_sleep(600)")

    def fork(self) -> None:
        """Leave a child that has every descriptor of this process, and stays until the container ends."""
        library = ctypes.PyDLL(None)
        if library.fork() == 0:  # as C code forks: no at-fork handler closes anything
            while True:
                library.pause()

    def release(self) -> None:
        """Check everything in, and keep no idle connection."""
        while self._held:
            self._pool.checkin(self._held.pop())
        self._pool.close()

    def load(self, group: str, threads: int, seconds: float) -> dict[str, Any]:
        """Use connections of a group all the time."""
        return run_process(Pool(self._pool.name), group, threads, time.monotonic() + seconds, 0.002)

    def writable(self) -> list[str]:
        """Return the places that can be written to."""
        found = []
        for place in PLACES:
            with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=place):
                found.append(place)
        return found


def _backend(handle: Handle) -> int:
    with handle.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone() or (0,)
        return int(pid)


def main() -> None:
    """Serve until the end of the input."""
    desk = Desk(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(desk, request.pop("do"))(**request)}
        except Exception as error:  # noqa: BLE001  the test looks at it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    desk.release()


if __name__ == "__main__":
    main()
