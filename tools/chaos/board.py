"""What workers tell the runner, in shared memory: counters that outlive a SIGKILL.

A row belongs to one thread of one worker place; the next worker in the same place goes on with its counters.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from pathlib import Path
from typing import Final

THREADS: Final = 3  # of each worker, its main thread included


class Column(IntEnum):
    """What a row says."""

    CHECKOUTS = 0
    FAILED = 1  # checkouts that raised, other than by a signal handler
    RAISED = 2  # exceptions out of a signal handler
    DROPPED = 3  # handles that were let go of without checkin
    FORKED = 4
    FORKS_STUCK = 5  # children that a C library's lock stopped, copied by fork while another thread held it
    BROKEN = 6  # connections that broke in use (a server fault)
    SLEEPING = 7  # backend pid while a long query runs, else 0


class Board:
    """The rows, mapped from a file."""

    def __init__(self, path: Path, workers: int) -> None:
        size = workers * THREADS * len(Column) * 8
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self.words = memoryview(self._memory).cast("Q")

    def at(self, worker: int, thread: int) -> int:
        """Return where a row begins."""
        return (worker * THREADS + thread) * len(Column)

    def add(self, row: int, column: Column) -> None:
        """Count one more; for the row's own thread."""
        self.words[row + column] += 1

    def total(self, column: Column) -> int:
        """Return the sum over all rows."""
        return sum(self.words[column :: len(Column)].tolist())

    def sleeping(self, worker: int) -> set[int]:
        """Return the backend pids that run a long query for a worker."""
        return {self.words[self.at(worker, thread) + Column.SLEEPING] for thread in range(THREADS)} - {0}

    def clear_sleeping(self, worker: int) -> None:
        """Forget what a dead worker was doing."""
        for thread in range(THREADS):
            self.words[self.at(worker, thread) + Column.SLEEPING] = 0
