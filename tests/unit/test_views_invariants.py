"""Frozen copies of a pool, and the invariants over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shmpool import views
from shmpool.invariants import check, check_sequence
from shmpool.layout import RECALL_WORDS, SLOT_WORDS, SLOTS
from shmpool.states import Use
from shmpool.views import Collect, PoolView, SlotRow
from shmpool.words import MAYBE, NONE, ORPHAN, SEQ_ONE, YES, Control, Kind, SlotWord, UseWord
from shmpool.words import endpoint_part as e
from shmpool.words import group_part as g
from tests.support.pools import OfflinePool, offline_pool, permit_row, slot_row, view, worker_row


@pytest.fixture
def pool() -> Iterator[OfflinePool]:
    """A pool that nobody coordinates."""
    with offline_pool() as pool:
        yield pool


def values(pool: OfflinePool) -> list[int | None]:
    """Return the semaphores' values by row."""
    return [pool.opened["g"].value, None, pool.opened["e"].value, None]


def take(pool: OfflinePool) -> PoolView:
    """Copy the pool."""
    return views.read_pool(pool.segment, lambda: values(pool))


def broken(**changes: Any) -> set[str]:
    """Return the names of the invariants that a view breaks."""
    return {violation.invariant.name for violation in check(view(**changes))}


def test_a_pool_at_rest_holds_everything(pool: OfflinePool) -> None:
    """A fresh pool is clean and breaks nothing; rows that nobody ever took are left out."""
    seen = take(pool)
    assert (seen.is_clean, seen.workers, check(seen)) == (True, (), [])
    assert [(p.kind, p.value, p.control.issued) for p in seen.permits] == [
        (Kind.GROUP, 3, 3),
        (Kind.ENDPOINT, 3, 3),
    ]


def test_claims_and_releases_hold_everything(pool: OfflinePool) -> None:
    """At each step of a worker's life the counts add up."""
    table = pool.attach_worker()
    tokens = [pool.open_connection(table) for _ in range(3)]
    seen = take(pool)
    assert check(seen) == []
    assert seen.permit(Kind.GROUP, 0).certain == seen.permit(Kind.ENDPOINT, 0).certain == 3
    assert [s.use.use for s in seen.workers[0].slots] == [Use.ACTIVE] * 3
    table.abandon(tokens.pop())
    assert check(take(pool)) == []
    for token in tokens:
        table.release(token)
    assert check(take(pool)) == []


def test_unknown_words_are_counted_apart(pool: OfflinePool) -> None:
    """MAYBE counts as unknown: live, or an orphan's."""
    table = pool.attach_worker()
    tokens = [pool.open_connection(table) for _ in range(2)]
    for token, orphan in zip(tokens, (0, ORPHAN), strict=True):
        pool.segment.words[token.word_at] = g(0, MAYBE) | e(0, MAYBE) | orphan
    row = take(pool).permit(Kind.ENDPOINT, 0)
    assert (row.certain, row.unknown_live, row.unknown_orphan) == (0, 1, 1)
    assert check(take(pool)) == []


def test_a_recall_is_seen_while_it_is_current(pool: OfflinePool) -> None:
    """A recall word counts only for the very slot word that it names."""
    table = pool.attach_worker()
    token = pool.open_connection(table, Use.IDLE)
    at = pool.segment.layout.at(RECALL_WORDS, token.number)
    pool.segment.words[at] = pool.segment.words[token.word_at]
    assert take(pool).workers[0].slots[0].is_recalled
    pool.segment.words[at] -= SEQ_ONE
    assert not take(pool).workers[0].slots[0].is_recalled


def test_words_that_move_while_copied_are_not_judged(pool: OfflinePool) -> None:
    """When no two copies agree the view is not clean, and check finds nothing."""
    word = pool.segment.layout.at(SLOT_WORDS)

    def moving() -> list[int | None]:
        pool.segment.words[word] += SEQ_ONE
        return [0, None, 0, None]

    seen = views.read_pool(pool.segment, moving)
    assert not seen.is_clean
    assert check(seen) == []


def test_a_slot_that_moves_on_while_copied_has_no_false_notes(
    pool: OfflinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes of the slot's next connection are not shown beside the word of the last one."""
    table = pool.attach_worker()
    token = pool.open_connection(table, Use.IDLE)
    read_row = views.read_row

    def late(segment: Any, table: Any, row: int = 0) -> dict[str, Any]:
        if table is SLOTS:
            pool.segment.words[token.word_at] += SEQ_ONE
            pool.segment.words[token.detail_at + 1] = 0
        return read_row(segment, table, row)

    monkeypatch.setattr(views, "read_row", late)
    seen = take(pool)
    assert seen.workers[0].slots[0].use.use is Use.CLOSING
    assert check(seen) == []


def test_a_lost_permit_is_out_of_bounds() -> None:
    """A permit that nothing accounts for breaks the bounds, and so does one too many."""
    held = worker_row(slot_row(0, "yy", Use.IDLE))
    for value in (1, 3):
        assert broken(
            workers=(held,),
            permits=(permit_row(Kind.GROUP, value=value, certain=1), permit_row(Kind.ENDPOINT)),
        ) == {"INV-1/2/3 bounds"}


@pytest.mark.parametrize("unknown", ["unknown_live", "unknown_orphan", "control"])
def test_a_permit_in_doubt_is_within_bounds(unknown: str) -> None:
    """An unknown field, or a pending resize, accounts for one missing permit."""
    doubt: Any = Control(3, 3, 1) if unknown == "control" else 1
    row = permit_row(Kind.GROUP, value=2, **{unknown: doubt})
    held = worker_row(slot_row(0, "?-"))
    assert not broken(workers=(held,), permits=(row, permit_row(Kind.ENDPOINT)))


def test_more_than_configured_breaks_circulation() -> None:
    """issued above both targets is a violation; above the new one alone is a shrink in work."""
    row = permit_row(Kind.GROUP, value=4, control=Control(3, 4, 0))
    assert broken(permits=(row,)) == {"INV-1 circulation"}
    row = permit_row(Kind.GROUP, value=4, control=Control(3, 4, 0), last_target=4)
    assert not broken(permits=(row,))


@pytest.mark.parametrize(
    "word",
    [
        SlotWord(1, 1, YES, 0, NONE, False),  # a group that does not exist
        SlotWord(1, 0, YES, 9, NONE, False),  # an index beside NONE
        SlotWord(1, 0, NONE, 0, NONE, True),  # FREE and an orphan
    ],
)
def test_malformed_words_are_found(word: SlotWord) -> None:
    """A slot word that no writer makes is a violation."""
    slot = SlotRow(0, word, UseWord(Use.FREE, 0), slot_row().details)
    assert "INV-5 words" in broken(workers=(worker_row(slot),))


def test_a_connection_without_a_backend_is_found() -> None:
    """IDLE and ACTIVE need a backend pid, an orphan does not."""
    rows = tuple(permit_row(kind, value=2, certain=1) for kind in Kind)
    for word, expected in (("yy", {"INV-6 backends"}), ("yyo", set())):
        slot = slot_row(0, word, Use.IDLE, backend_pid=0)
        assert broken(workers=(worker_row(slot),), permits=rows) == expected


def test_sequences_only_grow() -> None:
    """seq never falls, and an orphan's fields only fall."""

    def found(old: int, new: int) -> int:
        return len(check_sequence(*(Collect((w,), (), (), True) for w in (old, new))))

    held = g(0, YES) | e(0, YES) | 5 * SEQ_ONE
    assert found(held, held) == 0
    assert found(held, held - SEQ_ONE) == 1
    orphan = g(0, MAYBE) | e(0, YES) | ORPHAN | 5 * SEQ_ONE
    assert found(orphan, (e(0, MAYBE) | ORPHAN) + 7 * SEQ_ONE) == 0
    assert found(orphan, (g(0, YES) | e(0, YES) | ORPHAN) + 6 * SEQ_ONE) == 1
    claimed_and_abandoned_anew = g(0, MAYBE) | ORPHAN | 8 * SEQ_ONE
    assert found(e(0, YES) | ORPHAN | 5 * SEQ_ONE, claimed_and_abandoned_anew) == 0
