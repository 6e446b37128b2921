"""Frozen copies of the segment: what status, invariants and the coordinator look at.

Stale reads.  `collect` takes the slot words twice around the semaphore values and says whether they were
equal; only then do words and values belong to one moment (PROTOCOL: audit).  Other tables are copied once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shmpool.clock import monotonic
from shmpool.layout import (
    ENDPOINTS,
    GROUPS,
    HEADER,
    PERMITS,
    RECALL_WORDS,
    SLOT_WORDS,
    SLOTS,
    USE_WORDS,
    WORKERS,
    Table,
)
from shmpool.segment import Segment
from shmpool.settings import PoolSettings
from shmpool.states import SegmentState, Use
from shmpool.words import FIELDS_MASK, MOVE, ORPHAN, Control, Kind, SlotWord, Status, UseWord

COLLECT_TRIES: Final = 20
_PAUSE_S: Final = 0.0 if platform.machine() in ("x86_64", "AMD64") else 0.001  # weaker memory orders settle


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The slot words, as bytes, and the semaphore values of one moment, if `is_clean`."""

    raw: bytes
    values: tuple[int | None, ...]
    controls: tuple[Control, ...]
    is_clean: bool


@dataclass(frozen=True, slots=True)
class Collect:
    """The slot words and semaphore values of one moment, if `is_clean`."""

    words: tuple[int, ...]  # of all slots of all workers
    values: tuple[int | None, ...]  # by semaphore: groups first, then endpoints; None: row not in use
    controls: tuple[Control, ...]
    is_clean: bool


@dataclass(frozen=True, slots=True)
class PermitRow:
    """One permit semaphore and what its control word says."""

    kind: Kind
    index: int
    value: int | None
    control: Control
    certain: int
    unknown_live: int
    unknown_orphan: int
    last_target: int
    audits: int
    lost_found: int
    out_of_bounds: int

    @property
    def is_in_use(self) -> bool:
        """Whether the row has a semaphore."""
        return self.value is not None


@dataclass(frozen=True, slots=True)
class SlotRow:
    """One slot, its word and its owner's notes."""

    number: int
    word: SlotWord
    use: UseWord
    details: dict[str, Any]
    is_recalled: bool = False  # the coordinator wants its connection back


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker row and its slots that are, or were, used."""

    number: int
    values: dict[str, Any]
    is_held: bool | None  # its lock; None: nobody looked
    slots: tuple[SlotRow, ...]


@dataclass(frozen=True, slots=True)
class PoolView:
    """Everything about a pool at one moment, free of secrets."""

    name: str
    taken_at: float  # CLOCK_MONOTONIC
    taken_wall: float
    state: SegmentState
    header: dict[str, Any]
    settings: PoolSettings
    is_clean: bool
    permits: tuple[PermitRow, ...]
    endpoints: dict[int, dict[str, Any]]  # by index; `status` is a words.Status
    groups: dict[int, dict[str, Any]]
    workers: tuple[WorkerRow, ...]

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the coordinator's last tick."""
        return self.taken_at - float(self.header["heartbeat"])

    def permit(self, kind: Kind, index: int) -> PermitRow:
        """Return the row of one semaphore."""
        return next(p for p in self.permits if p.kind is kind and p.index == index)


def read_row(segment: Segment, table: Table, row: int = 0) -> dict[str, Any]:
    """Copy one row: words as integers, times as floats."""
    at = segment.layout.at(table, row)
    return {
        column.name: (segment.times if column.kind == "time" else segment.words)[at + i]
        for i, column in enumerate(table.columns)
    }


def read_controls(segment: Segment) -> tuple[Control, ...]:
    """Copy the control words of all semaphores, groups first."""
    start, end = segment.layout.span(PERMITS)
    return tuple(Control.of(word) for word in segment.words[start : end : PERMITS.row_words])


def collect(
    segment: Segment, read_values: Callable[[], Sequence[int | None]], *, tries: int = COLLECT_TRIES
) -> Collect:
    """Return a snapshot with its words as integers."""
    found = snap(segment, read_values, tries=tries)
    return Collect(tuple(memoryview(found.raw).cast("Q")), found.values, found.controls, found.is_clean)


def snap(segment: Segment, read_values: Callable[[], Sequence[int | None]], *, tries: int = COLLECT_TRIES) -> Snapshot:
    """Copy slot words, semaphore values, slot words again, until the two copies are equal."""
    start, end = segment.layout.span(SLOT_WORDS)
    for attempt in range(tries):
        controls = read_controls(segment)
        before = segment.words[start:end].tobytes()
        if _PAUSE_S:
            time.sleep(_PAUSE_S)
        values = tuple(read_values())
        if _PAUSE_S:
            time.sleep(_PAUSE_S)
        after = segment.words[start:end].tobytes()
        is_clean = before == after and controls == read_controls(segment)
        if is_clean or attempt == tries - 1:
            break
    return Snapshot(after, values, controls, is_clean)


def permit_rows(segment: Segment, snapshot: Collect) -> tuple[PermitRow, ...]:
    """Count what the copied words say about each semaphore in use."""
    groups = segment.layout.groups
    certain = [0] * segment.layout.semaphores
    live = [0] * segment.layout.semaphores
    orphan = [0] * segment.layout.semaphores
    for word in snapshot.words:
        if not word & FIELDS_MASK:
            continue
        parts = SlotWord.of(word)
        for field, at in ((parts.group_field, parts.group), (parts.endpoint_field, groups + parts.endpoint)):
            if at >= len(certain) or field == 0:
                continue
            if field == 2:
                certain[at] += 1
            elif word & ORPHAN:
                orphan[at] += 1
            else:
                live[at] += 1
    rows = []
    for at, value in enumerate(snapshot.values):
        if value is None:
            continue
        row = read_row(segment, PERMITS, at)
        rows.append(
            PermitRow(
                kind=Kind.GROUP if at < groups else Kind.ENDPOINT,
                index=at if at < groups else at - groups,
                value=value,
                control=snapshot.controls[at],
                certain=certain[at],
                unknown_live=live[at],
                unknown_orphan=orphan[at],
                last_target=row["last_target"],
                audits=row["audits"],
                lost_found=row["lost_found"],
                out_of_bounds=row["out_of_bounds"],
            )
        )
    return tuple(rows)


def read_pool(
    segment: Segment,
    read_values: Callable[[], Sequence[int | None]],
    is_held: Callable[[int], bool] | None = None,
) -> PoolView:
    """Copy a whole pool.

    Args:
        read_values: the semaphores' values (slots.py, semaphores.py own them).
        is_held: whether a worker row's lock is held (rows.py).

    Raises:
        SegmentMismatchError: the published configuration cannot be read.
    """
    _, settings = segment.read_settings()
    snapshot = collect(segment, read_values)
    header = read_row(segment, HEADER)
    endpoints = {}
    for index in range(segment.layout.endpoints):
        row = read_row(segment, ENDPOINTS, index)
        if row["status"]:
            endpoints[index] = row | {"status": Status.of(row["status"])}
    groups = {index: read_row(segment, GROUPS, index) for index in range(segment.layout.groups)}
    return PoolView(
        name=segment.names.pool,
        taken_at=monotonic(),
        taken_wall=time.time(),
        state=segment.state,
        header=header,
        settings=settings,
        is_clean=snapshot.is_clean,
        permits=permit_rows(segment, snapshot),
        endpoints=endpoints,
        groups={index: row for index, row in groups.items() if row["in_use"]},
        workers=_workers(segment, snapshot, is_held),
    )


def _workers(segment: Segment, snapshot: Collect, is_held: Callable[[int], bool] | None) -> tuple[WorkerRow, ...]:
    shape = segment.layout
    per_row = shape.slots_per_worker
    start, end = shape.span(USE_WORDS)
    uses = segment.words[start:end].tolist()
    start, end = shape.span(SLOTS)
    counted = segment.words[start + SLOTS.column("counted_group") : end : SLOTS.row_words].tolist()
    workers = []
    for number in range(shape.workers):
        values = read_row(segment, WORKERS, number)
        if values["generation"] == 0:
            continue
        slots = tuple(
            _slot(segment, slot, snapshot.words[slot])
            for slot in range(number * per_row, (number + 1) * per_row)
            if snapshot.words[slot] & FIELDS_MASK or uses[slot] or counted[slot]
        )
        held = is_held(number) if is_held is not None else None
        workers.append(WorkerRow(number, values, held, slots))
    return tuple(workers)


def _slot(segment: Segment, number: int, word: int) -> SlotRow:
    """Copy the owner's notes to a slot word that was copied before."""
    shape, words = segment.layout, segment.words
    use = UseWord.of(words[shape.at(USE_WORDS, number)])
    details = read_row(segment, SLOTS, number)
    recall = words[shape.at(RECALL_WORDS, number)]
    if word & FIELDS_MASK and words[shape.at(SLOT_WORDS, number)] != word:
        # The notes may be those of the slot's next connection; of this one only its way out is certain.
        use = UseWord(Use.CLOSING, SlotWord.of(word).group)
    return SlotRow(number, SlotWord.of(word), use, details, is_recalled=recall & ~MOVE == word != 0)
