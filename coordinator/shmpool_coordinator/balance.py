"""Moving connections, one after the other, until each endpoint holds its share.

An endpoint that returned, is new or has another weight has fewer or more connections than its share.  Those that had
better be elsewhere (shmpool.routing) are asked for: the worker closes one, at rest or at checkin, and opens it anew,
which leads to where it had better be.  It looks for itself whether that is still so: what comes late moves nothing.

Guarantees.
- In a group that holds n connections no two moves are closer than a n-th of the ramp, on the whole host; what a
  returning endpoint has never exceeds what has grown of its share, so that slow start and this are one limit.
- Nothing moves where shares match as well as they can, nor for a difference that passes by itself (SETTLE_S), nor in a
  group that waits: its permits go round anyway.
- A worker that does not answer holds nobody up, and an endpoint that gains nothing is tried less and less often.
Writers.  Recall words, with MOVE, of slots that are not recalled for a waiter; the groups' recall counter.
Stale reads.  As in arbiter.py: a recall counts only while it speaks of its slot's word.
If a process dies.  As in arbiter.py; a new coordinator begins anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shmpool.endpoints import read_candidate
from shmpool.layout import GROUPS, RECALL_WORDS, SLOT_WORDS
from shmpool.routing import Candidate, better_place, pause_between_moves
from shmpool.segment import Segment
from shmpool.settings import GroupSettings, PoolSettings
from shmpool.words import BOTH_YES, E_INDEX_SHIFT, FIELDS_MASK, G_INDEX_SHIFT, INDEX_MASK, MOVE
from shmpool_coordinator.arbiter import PATIENCE_S, Held

LOOK_S: Final = 1.0  # between looks at shares that match
SETTLE_S: Final = 1.0  # so long a difference has lasted before anything moves
CATCH_UP_S: Final = 0.2  # what a late look makes up for
YOUNG_S: Final = 1.0  # a connection that was opened so lately stays
_MOST_MISSES: Final = 6

Counts = Mapping[tuple[int, int], int]  # connections by group and endpoint


@dataclass(frozen=True, slots=True)
class Move:
    """A connection that was asked for."""

    recall: int
    group: int
    source: int
    target: int
    asked_at: float


@dataclass(slots=True)
class Drift:
    """A group whose shares do not match.

    A move that was answered and brought its target nothing is a miss: the target refuses workers, though not the
    probes.  Each miss in a row doubles the pause.
    """

    next_at: float
    target: int = -1
    looked_at: float = 0.0
    had: int = 0
    answered: int = 0
    misses: int = 0

    def moved(self, target: int, has: int, held: int, now: float) -> None:
        """Note that a connection was just asked for.

        Args:
            has: how many the group has at the target.
            held: how many it holds altogether.
        """
        if target != self.target:
            self.target, self.looked_at, self.had, self.answered, self.misses = target, now, has, 0, 0
        elif self.answered and now - self.looked_at >= PATIENCE_S:
            self.misses = min(self.misses + 1, _MOST_MISSES) if has <= self.had else 0
            self.looked_at, self.had, self.answered = now, has, 0
        pause = pause_between_moves(held)
        if self.misses:
            pause = max(pause, PATIENCE_S) * 2**self.misses
        self.next_at = max(self.next_at, now - CATCH_UP_S) + pause


def first_move(
    group: GroupSettings, candidates: Sequence[Candidate], groups: Sequence[GroupSettings], counts: Counts
) -> tuple[int, int] | None:
    """Return from which endpoint to which one a connection of a group is to move first; None: none is."""

    def held(endpoint: int) -> int:
        return counts.get((group.index, endpoint), 0)

    for here in sorted(candidates, key=lambda c: -c.in_use):
        source = here.settings.index
        target = better_place(group, candidates, source, groups, held) if held(source) > 0 else None
        if target is not None:
            return source, target
    return None


def after(
    moves: Collection[tuple[int, int, int]], candidates: Sequence[Candidate], counts: Counts
) -> tuple[list[Candidate], Counter[tuple[int, int]]]:
    """Return candidates and counts as they are once some moves (group, source, target) are done."""
    gains: Counter[int] = Counter()
    done = Counter(counts)
    for group, source, target in moves:
        gains[source] -= 1
        gains[target] += 1
        done[group, source] -= 1
        done[group, target] += 1
    return [c._replace(in_use=max(0, c.in_use + gains[c.settings.index])) for c in candidates], done


class Free(Protocol):
    """How many permits are in the semaphores (permits.Permits)."""

    def endpoint_free(self, endpoint: int) -> int: ...


class Balancer:
    """Sees whose shares do not match, and asks for connections."""

    def __init__(self, segment: Segment, permits: Free, connections: Callable[[], list[Held]]) -> None:
        """Args: connections: returns those of live workers; asked only when one is to move."""
        self.segment = segment
        self.moves: dict[int, Move] = {}  # by slot
        self._permits = permits
        self._connections = connections
        self._drifts: dict[int, Drift] = {}  # by group
        self._next_look = 0.0
        self._slots_at, self._slots_end = segment.layout.span(SLOT_WORDS)
        self._recalls_at, _ = segment.layout.span(RECALL_WORDS)

    def tick(self, settings: PoolSettings, waiting: Collection[int], now: float) -> set[int]:
        """Ask for what is due to move; return the worker rows that have something new to give back.

        Args:
            waiting: the groups in which somebody waits for a permit.
        """
        self._drop_answered()
        if now < self._next_look:
            return set()
        candidates = [read_candidate(self.segment, e, self._permits.endpoint_free(e.index)) for e in settings.endpoints]
        counts = self._count()
        rows: set[int] = set()
        for group in settings.groups:
            if group.index in waiting:
                continue
            if self._is_adrift(group, settings, candidates, counts, now):
                rows |= self._ask(group, settings, candidates, counts, now)
            else:
                self._withdraw(group.index, now)
        due = (drift.next_at for drift in self._drifts.values())
        self._next_look = min(now + LOOK_S, *due) if self._drifts else now + LOOK_S
        return rows

    def _count(self) -> Counts:
        """Count what groups hold at endpoints, that of dead workers included."""
        words = self.segment.words[self._slots_at : self._slots_end].tolist()
        found = Counter(word & INDEX_MASK for word in words if word & FIELDS_MASK == BOTH_YES)
        return {(w >> G_INDEX_SHIFT & 0xFF, w >> E_INDEX_SHIFT & 0xFF): number for w, number in found.items()}

    def _is_adrift(
        self, group: GroupSettings, settings: PoolSettings, candidates: Sequence[Candidate], counts: Counts, now: float
    ) -> bool:
        """Whether a connection of a group is to move beside those that are about to."""
        candidates, counts = after(self._about_to_move(now), candidates, counts)
        return first_move(group, candidates, settings.groups, counts) is not None

    def _about_to_move(self, now: float) -> list[tuple[int, int, int]]:
        return [(m.group, m.source, m.target) for m in self.moves.values() if now - m.asked_at < PATIENCE_S]

    def _ask(
        self, group: GroupSettings, settings: PoolSettings, candidates: Sequence[Candidate], counts: Counts, now: float
    ) -> set[int]:
        """Ask for as many connections of a group as the pace allows by now."""
        drift = self._drifts.setdefault(group.index, Drift(now + SETTLE_S))
        rows: set[int] = set()
        held = sum(number for (index, _), number in counts.items() if index == group.index)
        while drift.next_at <= now:
            then, so_many = after(self._about_to_move(now), candidates, counts)
            move = first_move(group, then, settings.groups, so_many)
            found = self._movable(group.index, move[0], now) if move else None
            if move is None or found is None:
                drift.next_at = max(drift.next_at, now - CATCH_UP_S) + pause_between_moves(held)
                break
            self._write(found, move[1], now)
            rows.add(found.row)
            drift.moved(move[1], counts.get((group.index, move[1]), 0), held, now)
        return rows

    def _movable(self, group: int, endpoint: int, now: float) -> Held | None:
        """Return the connection that rests longest, else the one in use that was opened first; None: all are asked."""
        recalls = self.segment.words
        found = [
            h
            for h in self._connections()
            if (h.group, h.endpoint) == (group, endpoint)
            and now - h.opened_at >= YOUNG_S
            and not recalls[self._recalls_at + h.slot]
        ]
        return min(found, key=lambda h: (not h.is_idle, h.idle_since if h.is_idle else h.opened_at), default=None)

    def _write(self, held: Held, target: int, now: float) -> None:
        recall = held.word | MOVE
        self.moves[held.slot] = Move(recall, held.group, held.endpoint, target, now)
        self.segment.words[self._recalls_at + held.slot] = recall
        self.segment.words[self.segment.layout.at(GROUPS, held.group, "recalls")] += 1

    def _drop_answered(self) -> None:
        """Forget moves whose slot has gone on, and those that a recall for a waiter took the place of."""
        words = self.segment.words
        for slot, move in list(self.moves.items()):
            is_mine = words[self._recalls_at + slot] == move.recall
            if is_mine and words[self._slots_at + slot] == move.recall & ~MOVE:
                continue
            if is_mine:
                words[self._recalls_at + slot] = 0
            del self.moves[slot]
            if move.group in self._drifts:
                self._drifts[move.group].answered += 1

    def _withdraw(self, group: int, now: float) -> None:
        """Take back what a group was asked for long ago and needs no more; forget its drift when nothing is asked."""
        for slot, move in list(self.moves.items()):
            if move.group == group and now - move.asked_at >= PATIENCE_S:
                self.segment.words[self._recalls_at + slot] = 0
                del self.moves[slot]
        if not any(move.group == group for move in self.moves.values()):
            self._drifts.pop(group, None)
