"""What connects cost, by group: the counters of opens of all slots, as a moving average.

Writers.  None here: workers count in their slots.
Stale reads.  A counter one step behind counts with the next look; of a slot that began anew for another group a look is
left out.
If a process dies.  Its counters stay; a new coordinator begins with the average over all of them.
"""

from __future__ import annotations

from typing import Any, Final

from shmpool.layout import SLOTS
from shmpool.segment import Segment

FIRST_COST_S: Final = 0.005  # before any connect was measured
MEMORY_OPENS: Final = 16  # so many opens later a cost counts half
LOOK_S: Final = 0.5

_OPENS: Final = SLOTS.column("opens")
_OPEN_TOTAL: Final = SLOTS.column("open_total")
_COUNTED_GROUP: Final = SLOTS.column("counted_group")


def averaged(cost_s: float | None, opens: int, seconds: float) -> float:
    """Return what a connect costs after some more of them; the newest count most.

    Args:
        cost_s: what it cost before; None: none was measured.
        opens, seconds: how many connections were opened since, at least one, and what that took altogether.
    """
    kept = 0.0 if cost_s is None else 0.5 ** (opens / MEMORY_OPENS)
    return kept * (cost_s or 0.0) + (1 - kept) * seconds / opens


class Costs:
    """Looks at the counters now and then."""

    def __init__(self, segment: Segment) -> None:
        self._words, self._times = segment.words, segment.times
        self._start, self._end = segment.layout.span(SLOTS)
        self._seen: dict[int, tuple[int, float]] = {}  # opens and their seconds, by group
        self._costs: dict[int, float] = {}
        self._next_look = 0.0

    def of(self, group: int) -> float:
        """Return what a connect of a group costs, in seconds."""
        return self._costs.get(group, FIRST_COST_S)

    def look(self, now: float) -> None:
        """Take into account what was opened since the last look, if that is long enough ago."""
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        for group, (opens, seconds) in self._totals().items():
            seen_opens, seen_seconds = self._seen.get(group, (0, 0.0))
            if opens > seen_opens and seconds > seen_seconds:
                self._costs[group] = averaged(self._costs.get(group), opens - seen_opens, seconds - seen_seconds)
            self._seen[group] = opens, seconds

    def _totals(self) -> dict[int, tuple[int, float]]:
        """Add up all slots' opens and their seconds, by group."""

        def column(view: memoryview[int] | memoryview[float], at: int) -> list[Any]:
            return view[self._start + at : self._end : SLOTS.row_words].tolist()

        totals: dict[int, tuple[int, float]] = {}
        counted = column(self._words, _COUNTED_GROUP)
        for group, opens, seconds in zip(
            counted, column(self._words, _OPENS), column(self._times, _OPEN_TOTAL), strict=True
        ):
            if group and opens:
                before = totals.get(group - 1, (0, 0.0))
                totals[group - 1] = before[0] + opens, before[1] + seconds
        return totals
