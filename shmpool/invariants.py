"""The invariants of the permit protocol, as code over a frozen view.

One `check` serves tests, the coordinator, the CLI and chaos runs.  Each entry has the same five fields: statement;
formula; kept by; may be broken when; after a crash.  The numbers are those of the promises and of the protocol's list
of checks.  Sequence rules (seq never falls, an orphan's fields only fall) need two views: `check_sequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shmpool.states import Use
from shmpool.views import Collect, PoolView
from shmpool.words import FIELDS_MASK, NONE, ORPHAN, YES, Kind, SlotWord


@dataclass(frozen=True, slots=True)
class Invariant:
    """One statement about every clean view."""

    name: str
    statement: str
    formula: str
    kept_by: str
    may_be_broken_when: str
    after_a_crash: str
    violations: Callable[[PoolView], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that a view breaks, and what was seen."""

    invariant: Invariant
    found: str

    def __str__(self) -> str:
        return f"{self.invariant.name}: {self.found} (expected {self.invariant.formula})"


def _label(view: PoolView, kind: Kind, index: int) -> str:
    rows = view.settings.groups if kind is Kind.GROUP else view.settings.endpoints
    name = next((row.name for row in rows if row.index == index), f"#{index}")
    return f"{kind.name.lower()} {name}"


def _bounds(view: PoolView) -> Iterator[str]:
    for permit in view.permits:
        assert permit.value is not None
        missing = permit.control.issued - permit.value - permit.certain
        unknown = permit.unknown_live + permit.unknown_orphan + permit.control.pending
        if not 0 <= missing <= unknown:
            yield (
                f"{_label(view, permit.kind, permit.index)}: issued {permit.control.issued}, value {permit.value}, "
                f"certain {permit.certain}, unknown {unknown}"
            )


def _issued(view: PoolView) -> Iterator[str]:
    for permit in view.permits:
        assert permit.value is not None
        target, issued, _ = permit.control
        if not permit.value <= issued <= max(target, permit.last_target):
            yield (
                f"{_label(view, permit.kind, permit.index)}: value {permit.value}, issued {issued}, "
                f"target {target}, last target {permit.last_target}"
            )


def _words(view: PoolView) -> Iterator[str]:
    known = {kind: {p.index for p in view.permits if p.kind is kind} for kind in Kind}
    for worker in view.workers:
        for slot in worker.slots:
            word = slot.word
            for kind, field, index in (
                (Kind.GROUP, word.group_field, word.group),
                (Kind.ENDPOINT, word.endpoint_field, word.endpoint),
            ):
                if field > YES or (field == NONE and index) or (field and index not in known[kind]):
                    yield f"slot {slot.number}: {word} has {kind.name.lower()} field {field}, index {index}"
            if word.is_free and word.orphan:
                yield f"slot {slot.number}: {word} is FREE and an orphan"


def _backends(view: PoolView) -> Iterator[str]:
    for worker in view.workers:
        for slot in worker.slots:
            both = slot.word.group_field == YES and slot.word.endpoint_field == YES
            beyond = slot.use.use in (Use.IDLE, Use.ACTIVE)
            if both and beyond and not slot.word.orphan and slot.details["backend_pid"] == 0:
                yield f"slot {slot.number}: {slot.use.use.name} without a backend pid"


def _quiet(view: PoolView) -> Iterator[str]:
    if any(not slot.word.is_free for worker in view.workers for slot in worker.slots):
        return
    for permit in view.permits:
        target, issued, pending = permit.control
        if pending == 0 and permit.value != issued:
            yield (
                f"{_label(view, permit.kind, permit.index)}: no slot holds anything, but value "
                f"{permit.value} of {issued} issued (target {target})"
            )


INVARIANTS = (
    Invariant(
        "INV-1/2/3 bounds",
        "every permit is in the semaphore, certain in a slot, or lost with a record that says so",
        "0 <= issued - value - certain <= unknown + pending",
        "MAYBE around each semaphore operation; the audit's clean copy; post before mark",
        "never on a clean view",
        "holds; the coordinator brings the unknown part to zero",
        _bounds,
    ),
    Invariant(
        "INV-1 circulation",
        "no more permits circulate than the configuration allows (the larger of two while it changes)",
        "value <= issued <= max(target, last target)",
        "the coordinator alone changes issued, before it posts",
        "never",
        "holds",
        _issued,
    ),
    Invariant(
        "INV-5 words",
        "a slot word is well formed and speaks of semaphores that exist",
        "field NONE => index 0; FREE is no orphan; indices exist",
        "words.py computes every word",
        "somebody scribbled over the segment",
        "holds",
        _words,
    ),
    Invariant(
        "INV-6 backends",
        "a connection in use has a known server session",
        "YES/YES and use beyond OPENING => backend pid not 0",
        "backend pid := 0 before (g,e), and := n before IDLE",
        "never",
        "holds; an orphan may lack it",
        _backends,
    ),
    Invariant(
        "INV-3 quiet",
        "when no slot holds anything, every permit in circulation is in its semaphore",
        "all words FREE, pending 0 => value == issued",
        "claim and release; settle and audit",
        "never on a clean view",
        "holds once the rows were reaped and audited",
        _quiet,
    ),
)


def check(view: PoolView) -> list[Violation]:
    """Return what a view violates.  A view that is not clean (taken under load) cannot be judged: nothing.

    Keeps no state and does no I/O.
    """
    if not view.is_clean:
        return []
    return [Violation(inv, found) for inv in INVARIANTS for found in inv.violations(view)]


def check_sequence(earlier: Collect, later: Collect) -> list[str]:
    """Return which slot words moved in a way that no writer may move them.

    seq never falls; while a word stays an orphan its fields only fall: YES, MAYBE, NONE (a field that went NONE may
    have been one semaphore's turn after the other).
    """
    found = []
    for number, (old, new) in enumerate(zip(earlier.words, later.words, strict=True)):
        if old == new:
            continue
        before, after = SlotWord.of(old), SlotWord.of(new)
        if after.seq < before.seq:
            found.append(f"slot {number}: seq fell from {before.seq} to {after.seq}")
        # Each field falls one step per store, and the word is FREE, and its owner's, after the last of them.
        steps = _HEIGHT[before.group_field] + _HEIGHT[before.endpoint_field]
        stayed = old & ORPHAN and new & ORPHAN and after.seq - before.seq < steps
        if stayed and new & FIELDS_MASK and not _fell(before, after):
            found.append(f"slot {number}: orphan moved from {before} to {after}")
    return found


_HEIGHT = {YES: 2, 1: 1, NONE: 0}


def _fell(before: SlotWord, after: SlotWord) -> bool:
    return (
        _HEIGHT[after.group_field] <= _HEIGHT[before.group_field]
        and _HEIGHT[after.endpoint_field] <= _HEIGHT[before.endpoint_field]
    )
