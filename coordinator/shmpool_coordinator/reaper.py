"""Dead workers: their slots become orphans, which `permits` settles.

Writers.  On a row whose lock this process holds: ORPHAN in its slot words, and the generation.
Stale reads.  Whether a row's owner lives is asked of the kernel; its words are read again under the lock.
If a process dies.  A coordinator killed in the middle leaves a row that is still dirty and free: the next one goes on.
Keeps INV-3, INV-5.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from typing import Final

from shmpool.clock import monotonic
from shmpool.layout import SLOT_WORDS, WORKERS
from shmpool.rows import Locks, Process, owner_of
from shmpool.segment import Segment
from shmpool.words import FIELDS_MASK, ORPHAN

LOCKLESS_S: Final = 1.0  # a process that ends loses its locks before it is gone
LOOKS_PER_TICK: Final = 64  # a thousand rows are all looked at within two seconds

log = logging.getLogger(__name__)


class Reaper:
    """Looks for rows whose owner died."""

    def __init__(self, segment: Segment, locks: Locks) -> None:
        self.segment = segment
        self._locks = locks
        start, end = segment.layout.span(SLOT_WORDS)
        self._slots_at = start
        self._slots = segment.words[start:end]
        self._copy = bytes(8 * segment.layout.slots)  # all FREE
        self._dirty: deque[int] = deque()
        self._lockless: dict[tuple[int, Process], float] = {}  # since when; -1: was reported

    @property
    def awaits_an_end(self) -> bool:
        """Whether a process has lost its locks just now: it is ending, and its row is to be looked at soon again."""
        return any(since >= 0 for since in self._lockless.values())

    def close(self) -> None:
        """Let go of the words."""
        self._slots.release()

    def dirty_rows(self) -> deque[int]:
        """Return the rows with a word that is neither FREE nor an orphan's, those not looked at longest first."""
        copy, old = self._slots.tobytes(), self._copy
        if copy == old:
            return self._dirty
        self._copy = copy
        row_bytes = 8 * self.segment.layout.slots_per_worker
        clean, dirty = set(), []
        for row, at in enumerate(range(0, len(copy), row_bytes)):
            own = copy[at : at + row_bytes]
            if own == old[at : at + row_bytes]:
                continue
            if any(word & FIELDS_MASK and not word & ORPHAN for word in memoryview(own).cast("Q")):
                dirty.append(row)
            else:
                clean.add(row)
        known = set(self._dirty)
        self._dirty = deque(row for row in self._dirty if row not in clean)
        self._dirty.extend(row for row in dirty if row not in known)
        return self._dirty

    def tick(self, hinted: Collection[int] = ()) -> list[int]:
        """Reap dead rows: the hinted ones, and as many others as one tick has time for.  Returns the reaped rows."""
        dirty = self.dirty_rows()
        self._lockless = {key: since for key, since in self._lockless.items() if key[0] in dirty}
        looked = {row for row in (*hinted, *(row for row, _ in self._lockless)) if row in dirty}
        for _ in range(min(LOOKS_PER_TICK, len(dirty))):
            looked.add(dirty[0])
            dirty.rotate(-1)
        return [row for row in sorted(looked) if self._locks.holder(row) is None and self._reap(row)]

    def _reap(self, row: int) -> bool:
        """Take over a dirty row that nobody seems to hold."""
        owner = owner_of(self.segment, row)
        if owner.visibly_lives():
            since = self._lockless.setdefault((row, owner), monotonic())
            if 0 <= since <= monotonic() - LOCKLESS_S:
                self._lockless[row, owner] = -1.0
                log.error(
                    "worker row %d: pid %d lives but lost the row's lock (something closed its descriptor); "
                    "the row is not touched: restart that process",
                    row,
                    owner.pid,
                )
            return False
        self._lockless.pop((row, owner), None)
        if not self._locks.try_row(row):
            return False
        try:
            if owner_of(self.segment, row) != owner:
                return False
            orphans = self._orphan(row)
        finally:
            self._locks.unlock_row(row)
        if not orphans:
            return False  # its owner had just left in order
        log.warning("worker row %d: pid %d is gone, %d slots became orphans", row, owner.pid, orphans)
        return True

    def _orphan(self, row: int) -> int:
        words, shape = self.segment.words, self.segment.layout
        first = self._slots_at + row * shape.slots_per_worker
        orphans = 0
        for at in range(first, first + shape.slots_per_worker):
            word = words[at]
            if word & FIELDS_MASK and not word & ORPHAN:
                words[at] = word | ORPHAN
                orphans += 1
        if not orphans:
            return 0
        words[shape.at(WORKERS, row, "generation")] += 1
        self.segment.set_header("reaped_rows", self.segment.header("reaped_rows") + 1)
        return orphans
