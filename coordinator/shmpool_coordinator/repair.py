"""Bring permits back in line that stay out of bounds: somebody wrote past the protocol to words or semaphores.

No crash of a worker or coordinator leads here; the audit sees to those.  It touches nothing that is impossible, and
so an impossible count stays until somebody asks for this.

The rule: never do more permits circulate than the cap.  What is surplus is first counted into `issued` up to the
cap, then taken out of the semaphore; what is missing is first counted off an `issued` beyond the cap, then posted.

Assumptions.  The slot words tell the truth about who holds what: a word that was scribbled over to FREE while its
    worker holds a connection cannot be told from a free one, and its permit is issued again; restart that worker.  The
    targets come from the configuration, not from the segment.  A semaphore is repaired only by a clean copy in which
    none of its slots is in doubt: then the difference is exact, and no step of a worker changes it.
If a process dies.  Each step leaves less to repair than before; the next audit and the next repair go on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final

from shmpool.words import NONE, YES, Kind, SlotWord, with_field
from shmpool_coordinator.permits import Balance, Permits

TRIES: Final = 20  # copies under load until one is clean

log = logging.getLogger(__name__)


class RepairError(Exception):
    """Nothing can be said now; the message says why."""


def repair(permits: Permits, targets: Mapping[int, int], names: Mapping[int, str], *, apply: bool) -> list[str]:
    """Say what is out of bounds and what brings it in line, a line for each; with `apply`, do it.

    Args:
        targets: what the configuration wants to circulate, by semaphore.
        names: what to call them.

    Raises:
        RepairError: no clean copy under this load.
    """
    lines = []
    for number, target in targets.items():
        found = permits.control(number).target
        if found != target:
            lines.append(f"{names[number]}: target {found}, configured {target}: store it")
            if apply:
                permits.set_target(number, target)
    for number, balance in _balances(permits).items():
        if not balance.is_possible:
            lines.append(_settle(permits, number, balance, targets.get(number, 0), names.get(number), apply=apply))
    lines += _foreign_words(permits, apply=apply)
    if apply:
        for line in lines:
            log.critical("repair: %s", line)
    return lines


def _balances(permits: Permits) -> dict[int, Balance]:
    for _ in range(TRIES):
        found = permits.balances()
        if found is not None:
            return found
    raise RepairError("the pool is under load and its words could not be copied whole; ask again")


def _settle(permits: Permits, number: int, balance: Balance, target: int, name: str | None, *, apply: bool) -> str:
    """Bring one semaphore in line, as far as its certain words allow."""
    control, value = balance.control, balance.value
    seen = (
        f"{name or f'semaphore {number}'}: issued {control.issued}, value {value}, held {balance.certain}, "
        f"in doubt {balance.doubtful}"
    )
    if balance.doubtful:
        return f"{seen}: left alone until nothing is in doubt; ask again, and see `shmpool slots` for who holds that"
    missing = balance.missing
    if missing > 0:
        shift = -min(missing, max(0, control.issued - target))
        posts = missing + shift
    else:
        shift = min(-missing, max(0, target - control.issued))
        posts = missing + shift
    if not apply:
        return f"{seen}: issued {shift:+d}, value {posts:+d}"
    if shift:
        permits.shift_issued(number, shift)
    done = permits.post(number, posts) if posts > 0 else -permits.take(number, -posts)
    if done == posts:
        permits.forget_faults(number)
        return f"{seen}: issued {shift:+d}, value {done:+d}"
    return (
        f"{seen}: issued {shift:+d}, value {done:+d}; {done - posts} too many are with workers: "
        "ask again when they have given back"
    )


def _foreign_words(permits: Permits, *, apply: bool) -> Iterator[str]:
    """Look for words that speak of semaphores that do not exist; those of orphans are the coordinator's to clear."""
    for slot, word in enumerate(permits.slot_words()):
        parts = SlotWord.of(word)
        for kind, state, index in (
            (Kind.GROUP, parts.group_field, parts.group),
            (Kind.ENDPOINT, parts.endpoint_field, parts.endpoint),
        ):
            if state == NONE or (state <= YES and permits.has(kind, index)):
                continue
            seen = f"slot {slot}: {kind.name.lower()} field {state} of index {index}, which does not exist"
            if not parts.orphan:
                yield f"{seen}: left alone, it is a live worker's; restart that worker"
                continue
            if apply:
                word = with_field(word, kind, NONE)
                permits.mark(slot, word)
            yield f"{seen}: clear it"
