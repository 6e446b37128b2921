"""The coordinator's half of the permit protocol: settle, give, audit, grow, shrink.

Guarantees: no permit is created; what a dead or abandoned slot held comes back; every store leaves a state that the
next coordinator's first tick carries on from.  Post, then mark: what was posted before a crash is counted by the next
audit; the other order would leak.
Assumptions: one coordinator per pool (its lock); one aligned 8-byte store or load per word access.

Writers.  Control words, permit counters: this module.  Slot words: only while ORPHAN is set.
Stale reads.  Slot words of live workers may be a step behind; an audit compares two copies and never acts on one.
If a process dies.  `pending` in the control word, and MAYBE in an orphan's word, say what must be counted.
Keeps INV-1, INV-2, INV-3, INV-5.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from shmpool import views
from shmpool.clock import monotonic
from shmpool.layout import PERMITS, SLOT_WORDS
from shmpool.segment import Segment
from shmpool.semaphores import BusyError, Semaphore, ring, ring_anyway
from shmpool.words import (
    E_FIELD_SHIFT,
    E_INDEX_SHIFT,
    FIELDS_MASK,
    G_FIELD_SHIFT,
    G_INDEX_SHIFT,
    MAYBE,
    NONE,
    ORPHAN,
    YES,
    Control,
    Kind,
    SlotWord,
    with_field,
)
from shmpool_coordinator.tally import Tally

STUCK_S: Final = 1.0  # a live unknown word unchanged for so long is reported

_CONTROL: Final = PERMITS.column("control")
_AUDITS: Final = PERMITS.column("audits")
_LOST_FOUND: Final = PERMITS.column("lost_found")
_OUT_OF_BOUNDS: Final = PERMITS.column("out_of_bounds")
_LAST_TARGET: Final = PERMITS.column("last_target")

log = logging.getLogger(__name__)

SessionGone = Callable[[int, int], bool]  # slot, its word -> whether the server session has ended


@dataclass(slots=True)
class _Count:
    """What one copy of the slot words says about one semaphore."""

    certain: int = 0
    live: int = 0  # unknown, in slots that their owners still write
    orphans: list[int] = field(default_factory=list)  # slots whose unknown field is the coordinator's


class Balance(NamedTuple):
    """What one clean copy says about a semaphore."""

    control: Control
    value: int
    certain: int
    doubtful: int  # unknown slots and pending permits

    @property
    def missing(self) -> int:
        """How many permits are neither in the semaphore nor certain in a slot."""
        return self.control.issued - self.value - self.certain

    @property
    def is_possible(self) -> bool:
        """Whether the protocol can lead there."""
        return 0 <= self.missing <= self.doubtful


class Permits:
    """The permit semaphores and bells of one pool.

    A semaphore's number is its row in the PERMITS table: groups first, then endpoints.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._words = segment.words
        self._groups = segment.layout.groups
        start, end = segment.layout.span(SLOT_WORDS)
        self._slots_at = start
        self._slots = segment.words[start:end]
        self._rows = segment.layout.semaphores
        self._semaphores: dict[int, Semaphore] = {}
        self._bells: dict[int, Semaphore] = {}
        self._endpoint_bells: dict[int, Semaphore] = {}
        self._users: dict[int, tuple[int, ...]] = {}
        self._tally = Tally(segment.layout.slots, self._groups)
        self._calm_words = b""  # a copy in which nothing is uncertain; empty: none
        self._calm_certain: dict[int, int] = {}
        self._reported: dict[int, tuple[int, ...]] = {}
        self._live_since: dict[int, tuple[int, float]] = {}

    # -- what there is -----------------------------------------------------------------------------

    def add(self, number: int, semaphore: Semaphore) -> None:
        """Take in a permit semaphore."""
        self._semaphores[number] = semaphore
        self._calm_words = b""

    def add_bells(self, group: int, bell: Semaphore, endpoint_bell: Semaphore) -> None:
        """Take in a group's two bells."""
        self._bells[group], self._endpoint_bells[group] = bell, endpoint_bell

    def remove(self, number: int) -> None:
        """Close a semaphore, and a group's bells with it."""
        self._semaphores.pop(number).close()
        if number < self._groups:
            self._bells.pop(number).close()
            self._endpoint_bells.pop(number).close()
        self._calm_words = b""

    def set_users(self, users: Mapping[int, Iterable[int]]) -> None:
        """Tell which groups can use each endpoint: their endpoint bells ring when one of its permits comes back."""
        self._users = {endpoint: tuple(groups) for endpoint, groups in users.items()}

    def close(self) -> None:
        """Close everything; the words are let go of."""
        for number in list(self._semaphores):
            self.remove(number)
        self._slots.release()

    def value(self, number: int) -> int:
        """Return how many permits nobody holds."""
        return int(self._semaphores[number].value)

    def group_available(self, group: int) -> int:
        """Return how many permits of a group a worker may take."""
        return self._available(group)

    def endpoint_available(self, endpoint: int) -> int:
        """Return how many permits of an endpoint a worker may take."""
        return self._available(self._groups + endpoint)

    def endpoint_free(self, endpoint: int) -> int:
        """Return the value of an endpoint's semaphore; 0 where there is none."""
        number = self._groups + endpoint
        return self.value(number) if number in self._semaphores else 0

    def _available(self, number: int) -> int:
        """The value without the surplus that is the coordinator's; 0 where there is no semaphore."""
        if number not in self._semaphores:
            return 0
        control = self.control(number)
        return max(0, self.value(number) - max(0, control.issued - control.target))

    def read_values(self) -> list[int | None]:
        """Return the value of every semaphore; None where there is none."""
        found = [self._semaphores.get(number) for number in range(self._rows)]
        return [None if semaphore is None else semaphore.value for semaphore in found]

    def control(self, number: int) -> Control:
        """Return a semaphore's control word."""
        return Control.of(self._words[self._at(number)])

    def set_target(self, number: int, target: int) -> None:
        """Say how many permits shall circulate; `resize` brings it about."""
        control = self.control(number)
        if control.target != target:
            # First, so that issued is at every instant within what invariants.py allows.
            self._words[self._at(number) + _LAST_TARGET] = control.issued
            self._store(number, control._replace(target=target))

    def is_empty(self, number: int) -> bool:
        """Whether nothing circulates and no slot word speaks of a semaphore: its index may be used again."""
        if self.value(number) or self.control(number) != Control(0, 0, 0):
            return False
        kind, index = self._kind(number)
        shift = G_INDEX_SHIFT if kind is Kind.GROUP else E_INDEX_SHIFT
        field_shift = G_FIELD_SHIFT if kind is Kind.GROUP else E_FIELD_SHIFT
        return not any(w >> field_shift & 3 and w >> shift & 0xFF == index for w in self._slots.tolist())

    def slot_words(self) -> list[int]:
        """Return an unguarded copy of every slot word."""
        return self._slots.tolist()

    def holds_nothing(self) -> bool:
        """Whether every slot word is FREE."""
        return not any(word & FIELDS_MASK for word in self._slots.tolist())

    # -- what a repair needs ------------------------------------------------------------------------

    def has(self, kind: Kind, index: int) -> bool:
        """Whether a slot word may speak of this index."""
        return (index if kind is Kind.GROUP else self._groups + index) in self._semaphores

    def balances(self) -> dict[int, Balance] | None:
        """Return the balance of every semaphore, by one clean copy; None: there was none under this load."""
        snapshot = views.snap(self.segment, self.read_values)
        if not snapshot.is_clean:
            return None
        found = {}
        for number, count in self._counts(snapshot.raw).items():
            value, control = snapshot.values[number], snapshot.controls[number]
            assert value is not None
            doubtful = count.live + len(count.orphans) + control.pending
            found[number] = Balance(control, value, count.certain, doubtful)
        return found

    def shift_issued(self, number: int, more: int) -> None:
        """Count more, or fewer, permits as issued; none is posted or taken."""
        control = self.control(number)
        self._store(number, control._replace(issued=control.issued + more))

    def post(self, number: int, count: int) -> int:
        """Put permits into the semaphore, and ring; returns how many."""
        for _ in range(count):
            self._semaphores[number].release()
        self._ring(number)
        return count

    def take(self, number: int, count: int) -> int:
        """Take permits out of the semaphore, as far as nobody holds them; returns how many."""
        for taken in range(count):
            try:
                self._semaphores[number].acquire(0)
            except BusyError:
                return taken
        return count

    def forget_faults(self, number: int) -> None:
        """Count a semaphore as in bounds again."""
        self._words[self._at(number) + _OUT_OF_BOUNDS] = 0
        self._reported.pop(number, None)
        self._calm_words = b""

    def mark(self, slot: int, word: int) -> None:
        """Store the word of an orphan's slot."""
        self._mark(slot, word)

    # -- places ------------------------------------------------------------------------------------

    def _at(self, number: int) -> int:
        return self.segment.layout.at(PERMITS, number)

    def _kind(self, number: int) -> tuple[Kind, int]:
        return (Kind.GROUP, number) if number < self._groups else (Kind.ENDPOINT, number - self._groups)

    def _label(self, number: int) -> str:
        kind, index = self._kind(number)
        return f"permits of {kind.name.lower()} {index}"

    def _store(self, number: int, control: Control) -> None:
        self._words[self._at(number)] = control.word()

    def _mark(self, slot: int, word: int) -> None:
        self._words[self._slots_at + slot] = word

    # -- the tick ----------------------------------------------------------------------------------

    def tick(self, is_session_gone: SessionGone) -> None:
        """Settle, audit and resize once.  Cheap while nothing is uncertain and no word has changed."""
        if self._is_calm():
            return
        self.settle(is_session_gone)
        self.audit()
        self.resize()

    def _is_calm(self) -> bool:
        """Whether nothing has changed since the last full tick, and the values still fit."""
        if not self._calm_words or self._slots.tobytes() != self._calm_words:
            return False
        for number, semaphore in self._semaphores.items():
            control = self._words[self._at(number)]
            issued = control >> 16
            if issued != control & 0xFFFF or semaphore.value != issued - self._calm_certain[number]:
                return False
        return self._slots.tobytes() == self._calm_words

    def settle(self, is_session_gone: SessionGone) -> None:
        """Give back what orphans certainly held: the group's permit at once, the endpoint's after its session."""
        self._tally.update(self._slots.tobytes())
        for slot, word in self._tally.orphans():
            self._settle_slot(slot, word, is_session_gone)

    def _settle_slot(self, slot: int, word: int, is_session_gone: SessionGone) -> None:
        parts = SlotWord.of(word)
        if parts.group_field == YES and parts.group in self._semaphores:
            word = self._give_back(slot, word, Kind.GROUP, parts.group)
        if (
            parts.endpoint_field == YES
            and self._groups + parts.endpoint in self._semaphores
            and is_session_gone(slot, word)
        ):
            self._give_back(slot, word, Kind.ENDPOINT, parts.endpoint)

    def _give_back(self, slot: int, word: int, kind: Kind, index: int) -> int:
        word = with_field(word, kind, MAYBE)
        self._mark(slot, word)
        self.give(index if kind is Kind.GROUP else self._groups + index)
        word = with_field(word, kind, NONE)
        self._mark(slot, word)
        return word

    def give(self, number: int) -> None:
        """Let one permit that was held circulate again, or take it off a surplus."""
        control = self.control(number)
        if control.issued > control.target:
            self._store(number, control._replace(issued=control.issued - 1))
            return
        self._semaphores[number].release()
        self._ring(number)

    def audit(self) -> bool:
        """Find out by counting what is uncertain, for every semaphore; return whether the copy was clean."""
        snapshot = views.snap(self.segment, self.read_values)
        if not snapshot.is_clean:
            return False
        counts = self._counts(snapshot.raw)
        open_words = dict(self._tally.open)  # of the copy, as this audit changes them
        calm = not open_words
        for number, count in counts.items():
            value = snapshot.values[number]
            assert value is not None
            control = snapshot.controls[number]
            calm &= not control.pending and control.issued == control.target
            calm &= self._audit_one(number, value, control, count, open_words)
        self._report_stuck()
        self._calm_words = self._slots.tobytes() if calm else b""
        if calm:
            self._calm_certain = {number: count.certain for number, count in counts.items()}
            if self._calm_words != snapshot.raw:
                self._calm_words = b""
        return True

    def _counts(self, raw: bytes) -> dict[int, _Count]:
        """Count a copy of the slot words for every semaphore in use."""
        tally, groups = self._tally, self._groups
        tally.update(raw)
        counts = {number: _Count(tally.certain[number]) for number in self._semaphores}
        for slot, word in sorted(tally.open.items()):
            for state, number in (
                (word >> G_FIELD_SHIFT & 3, word >> G_INDEX_SHIFT & 0xFF),
                (word >> E_FIELD_SHIFT & 3, groups + (word >> E_INDEX_SHIFT & 0xFF)),
            ):
                count = counts.get(number)
                if count is None or state != MAYBE:
                    continue
                if word & ORPHAN:
                    count.orphans.append(slot)
                else:
                    count.live += 1
        return counts

    def _audit_one(
        self,
        number: int,
        value: int,
        control: Control,
        count: _Count,
        words: dict[int, int],
    ) -> bool:
        """Audit one semaphore by a clean copy; return whether its numbers are possible."""
        unknown = len(count.orphans) + control.pending
        missing = control.issued - value - count.certain
        at = self._at(number)
        if not 0 <= missing <= unknown + count.live:
            self._words[at + _OUT_OF_BOUNDS] += 1
            self._report_impossible(number, value, control, count)
            return False
        self._reported.pop(number, None)
        self._words[at + _AUDITS] += 1
        low, high = max(0, missing - count.live), min(missing, unknown)
        settled = unknown - (high - low)
        if not settled:
            return True
        absorbed = min(low, max(0, control.issued - control.target))
        if absorbed:
            control = control._replace(issued=control.issued - absorbed)
            self._store(number, control)
        for _ in range(low - absorbed):
            self._semaphores[number].release()
        if low > absorbed:
            self._words[at + _LOST_FOUND] += low - absorbed
            self._ring(number)
        kind, _ = self._kind(number)
        for slot in count.orphans[:settled]:
            words[slot] = with_field(words[slot], kind, NONE)
            self._mark(slot, words[slot])
        of_resize = settled - min(settled, len(count.orphans))
        if of_resize:
            self._store(number, control._replace(pending=control.pending - of_resize))
        return True

    def _report_impossible(self, number: int, value: int, control: Control, count: _Count) -> None:
        seen = (value, *control, count.certain, count.live, len(count.orphans))
        if self._reported.get(number) != seen:
            self._reported[number] = seen
            log.critical(
                "%s: out of bounds: issued %d, value %d, certain %d, unknown %d live and %d of orphans, pending %d; "
                "nothing is changed: something else writes to the segment or its semaphores",
                self._label(number),
                control.issued,
                value,
                count.certain,
                count.live,
                len(count.orphans),
                control.pending,
            )

    def _report_stuck(self) -> None:
        """Tell once about a live worker that stopped in the middle of a bracket."""
        now = monotonic()
        unknown = {}
        for slot, word in self._tally.open.items():
            if not word & ORPHAN:
                known, since = self._live_since.get(slot, (0, now))
                unknown[slot] = (word, since if known == word else now)
                if known == word and 0 <= since <= now - STUCK_S:
                    log.warning(
                        "slot %d: %s unchanged for %g s; its process is stopped or busy",
                        slot,
                        SlotWord.of(word),
                        STUCK_S,
                    )
                    unknown[slot] = (word, -1.0)
        self._live_since = unknown

    def resize(self) -> None:
        """Bring what circulates nearer to the targets."""
        for number in self._semaphores:
            control = self.control(number)
            if control.pending == 0 and control.issued < control.target:
                self.grow(number)
            elif control.pending == 0 and control.issued > control.target:
                self.shrink(number)

    def grow(self, number: int) -> None:
        """Issue the permits that are missing to the target."""
        control = self.control(number)
        more = control.target - control.issued
        control = control._replace(issued=control.target, pending=more)
        self._store(number, control)
        for _ in range(more):
            self._semaphores[number].release()
        self._store(number, control._replace(pending=0))
        self._ring(number)

    def shrink(self, number: int) -> None:
        """Take permits that nobody holds out of circulation, one at a time."""
        control = self.control(number)
        while control.issued > control.target:
            self._store(number, control._replace(pending=1))
            try:
                self._semaphores[number].acquire(0)
            except BusyError:
                self._store(number, control)
                return
            control = control._replace(issued=control.issued - 1)
            self._store(number, control)

    # -- bells -------------------------------------------------------------------------------------

    def _ring(self, number: int) -> None:
        kind, index = self._kind(number)
        if kind is Kind.GROUP:
            ring(self._bells[index])
            return
        for group in self._users.get(index, ()):
            if group in self._endpoint_bells:
                ring(self._endpoint_bells[group])

    def ring_waiting(self, for_group: Collection[int], for_endpoint: Collection[int]) -> None:
        """Wake a waiter of each of these groups where a permit is free, whatever its bell's value says.

        A poster that was killed between a bell's increment and its wake left a ring that wakes nobody.
        """
        for group in for_group:
            if group in self._bells and self.group_available(group) > 0:
                self._ring_anyway(self._bells[group])
        for group in for_endpoint:
            usable = [endpoint for endpoint, groups in self._users.items() if group in groups]
            if group in self._endpoint_bells and any(self.endpoint_available(e) > 0 for e in usable):
                self._ring_anyway(self._endpoint_bells[group])

    def ring_all(self) -> None:
        """Wake one sleeper of every bell (after the clock was set back, their deadlines are late)."""
        for bell in (*self._bells.values(), *self._endpoint_bells.values()):
            self._ring_anyway(bell)

    def _ring_anyway(self, bell: Semaphore) -> None:
        if bell.value <= self.segment.layout.workers:  # more rings than rows wake nobody else
            ring_anyway(bell)
