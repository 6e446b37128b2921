"""How long permits of a killed worker stay away, watched in the slot words at about a millisecond.

The coordinator is the only one that gives an orphan's permits back, each by two stores: so the word of a slot that
held both permits moves by two for the group's and by four for both, where its owner's own release moves it by two.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from shmpool.clock import monotonic
from shmpool.layout import SLOT_WORDS, SLOTS, USE_WORDS, WORKERS
from shmpool.segment import Segment
from shmpool.states import Use
from shmpool.words import BOTH_YES, FIELDS_MASK, ORPHAN, SEQ_SHIFT

OVERDUE_S: Final = 15.0


@dataclass(slots=True)
class _Slot:
    """A slot that a worker held when it was killed."""

    number: int
    word: int
    doing: str  # "idle", "mid-query", "busy"
    killed_at: float
    group_is_back: bool = False


class Times(NamedTuple):
    """Seconds until one kind of permit was back."""

    slots: int
    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Sum a list up; of an empty one, zeros."""
        if not seconds:
            return cls(0, 0.0, 0.0, 0.0)
        ordered = sorted(seconds)
        return cls(len(ordered), statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])


class Recovery:
    """Watches the slots of killed workers."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.coordinator_since = 0.0  # when the coordinator of now began to work, or was let go on
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.overdue: list[str] = []
        self._slots: list[_Slot] = []
        start, end = segment.layout.span(WORKERS)
        self._pids_at = range(start + WORKERS.column("pid"), end, WORKERS.row_words)

    @property
    def is_watching(self) -> bool:
        """Whether a permit is still away."""
        return bool(self._slots)

    def killed(self, pid: int, sleeping: Iterable[int]) -> None:
        """Begin to watch what a process holds that was sent SIGKILL right now.

        Args:
            sleeping: backend pids that run a long query for it.
        """
        now, shape, words = monotonic(), self.segment.layout, self.segment.words
        busy = set(sleeping)
        for row, at in enumerate(self._pids_at):
            if words[at] != pid:
                continue
            for number in range(row * shape.slots_per_worker, (row + 1) * shape.slots_per_worker):
                word = words[shape.at(SLOT_WORDS, number)]
                use = words[shape.at(USE_WORDS, number)] & 0xFF
                if word & FIELDS_MASK != BOTH_YES or word & ORPHAN or use not in (Use.IDLE, Use.ACTIVE):
                    continue
                backend = words[shape.at(SLOTS, number, "backend_pid")]
                doing = "idle" if use == Use.IDLE else "mid-query" if backend in busy else "busy"
                self._slots.append(_Slot(number, word, doing, now))

    def look(self) -> None:
        """Note what has come back since the last look."""
        now, shape, words = monotonic(), self.segment.layout, self.segment.words
        staying = []
        for slot in self._slots:
            word = words[shape.at(SLOT_WORDS, slot.number)]
            moved = (word >> SEQ_SHIFT) - (slot.word >> SEQ_SHIFT)
            if not slot.group_is_back and not word & ORPHAN and 0 < moved < 4:
                continue  # its owner still let it go itself before it died
            if moved >= 2 and not slot.group_is_back:
                slot.group_is_back = True
                self._note(slot, "group", now)
            if moved >= 4:
                self._note(slot, "endpoint", now)
            elif now - max(slot.killed_at, self.coordinator_since) > OVERDUE_S:
                self.overdue.append(f"slot {slot.number} ({slot.doing}): not back after {OVERDUE_S:g} s")
            else:
                staying.append(slot)
        self._slots = staying

    def _note(self, slot: _Slot, permit: str, now: float) -> None:
        self.seconds[slot.doing, permit].append(max(0.0, now - max(slot.killed_at, self.coordinator_since)))

    def times(self) -> dict[tuple[str, str], Times]:
        """Return the figures by what the worker was doing and whose permit it is."""
        return {key: Times.of(seconds) for key, seconds in sorted(self.seconds.items())}
