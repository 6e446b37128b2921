"""Counting slot words anew only where they changed."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from shmpool.words import MAYBE, NONE, ORPHAN, SEQ_ONE, YES, endpoint_part, group_part
from shmpool_coordinator.tally import CHUNK_BYTES, Tally

GROUPS = 3
SLOTS = 3 * CHUNK_BYTES // 8 - 5  # the last chunk is not whole

fields = st.sampled_from([NONE, MAYBE, YES])


@st.composite
def words(draw: st.DrawFn) -> int:
    """A well-formed slot word."""
    group_field, endpoint_field = draw(fields), draw(fields)
    word = draw(st.integers(0, 5)) * SEQ_ONE
    word |= group_part(draw(st.integers(0, GROUPS - 1)), group_field) if group_field else 0
    word |= endpoint_part(draw(st.integers(0, 3)), endpoint_field) if endpoint_field else 0
    return word | (ORPHAN if (group_field or endpoint_field) and draw(st.booleans()) else 0)


changes = st.dictionaries(st.integers(0, SLOTS - 1), words(), max_size=8)


@given(st.lists(changes, max_size=6))
def test_every_copy_is_counted_as_if_it_were_the_first(history: list[dict[int, int]]) -> None:
    """After any history of copies the counts are those of the last copy alone."""
    tally, copy = Tally(SLOTS, GROUPS), array("Q", bytes(8 * SLOTS))
    for step in history:
        for slot, word in step.items():
            copy[slot] = word
        tally.update(copy.tobytes())
        anew = Tally(SLOTS, GROUPS)
        anew.update(copy.tobytes())
        assert +tally.certain == +anew.certain
        assert tally.open == anew.open
        assert tally.orphans() == [(slot, word) for slot, word in enumerate(copy) if word & ORPHAN]


def test_both_permits_of_a_slot_are_counted() -> None:
    """A held slot counts for its group and its endpoint; a doubtful one is open, by its slot."""
    copy = array("Q", bytes(8 * SLOTS))
    copy[1] = group_part(2, YES) | endpoint_part(0, YES)
    copy[SLOTS - 1] = group_part(1, MAYBE)
    tally = Tally(SLOTS, GROUPS)
    tally.update(copy.tobytes())
    assert +tally.certain == {2: 1, GROUPS: 1}
    assert tally.open == {SLOTS - 1: group_part(1, MAYBE)}
    assert tally.orphans() == []
