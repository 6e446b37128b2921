"""Texts for people: what a timeout must answer without another question."""

from __future__ import annotations

from collections import Counter

from shmpool.layout import SLOT_WORDS, USE_WORDS, WORKERS
from shmpool.segment import Segment
from shmpool.slots import GroupPermits
from shmpool.states import Use
from shmpool.words import NONE, Control, SlotWord, UseWord

_SHOWN = 8


def describe_group(segment: Segment, name: str, permits: GroupPermits, timeout: float) -> str:
    """Say how a group stands host-wide: cap, held, waiting, and which workers hold the permits."""
    shape, words = segment.layout, segment.words
    holders: Counter[int] = Counter()
    waiting = 0
    start, end = segment.layout.span(SLOT_WORDS)
    for number, word in enumerate(words[start:end].tolist()):
        slot = SlotWord.of(word)
        use = UseWord.of(words[shape.at(USE_WORDS, number)])
        row = number // shape.slots_per_worker
        if slot.group_field != NONE and slot.group == permits.index:
            holders[row] += 1
        if use.use is Use.WAITING and use.group == permits.index:
            waiting += 1
    control = Control.of(words[permits.control_at])
    held = ", ".join(
        f"pid {words[shape.at(WORKERS, row, 'pid')]} (row {row}): {count}" for row, count in holders.most_common(_SHOWN)
    )
    more = f" and {len(holders) - _SHOWN} more workers" if len(holders) > _SHOWN else ""
    return (
        f"group {name!r}: no connection within {round(timeout, 3):g} s; cap {control.target}, held "
        f"{sum(holders.values())}, workers waiting {waiting}; held by {held or 'nobody'}{more}"
    )
