"""The bit fields of 64-bit words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool import words
from shmpool.states import Admin, Health, Role, Use, Verdict
from shmpool.words import MAYBE, NONE, ORPHAN, YES, Control, Kind, SlotWord, Status, UseWord

WORDS = st.integers(0, 2**64 - 1)
FIELDS = st.sampled_from((NONE, MAYBE, YES))
INDICES = st.integers(0, 255)


@st.composite
def slot_words(draw: st.DrawFn) -> int:
    """Well-formed slot words."""
    group, endpoint = draw(FIELDS), draw(FIELDS)
    word = draw(st.integers(0, 2**words.SEQ_BITS - 1)) << words.SEQ_SHIFT
    word |= words.group_part(draw(INDICES) if group else 0, group)
    word |= words.endpoint_part(draw(INDICES) if endpoint else 0, endpoint)
    return word | (ORPHAN if (group or endpoint) and draw(st.booleans()) else 0)


def test_fresh_memory_is_harmless() -> None:
    """A word of zeros is FREE, unused, unknown: what fresh shared memory must mean."""
    assert SlotWord.of(0).is_free
    assert not SlotWord.of(0).orphan
    assert UseWord.of(0) == UseWord(Use.FREE, 0)
    assert Control.of(0) == Control(0, 0, 0)
    assert Status.of(0).health is Health.UNKNOWN


def test_the_parts_of_a_slot_word_do_not_overlap_and_leave_no_bit() -> None:
    """Sequence, group part, endpoint part and ORPHAN are disjoint and fill at most 64 bits."""
    parts = (words.SEQ_MASK, words.G_PART, words.E_PART, ORPHAN)
    assert sum(parts) == parts[0] | parts[1] | parts[2] | parts[3]
    assert sum(parts) == words.SEQ_MASK | words.PART_MASK
    assert sum(parts) < 2**64


@given(slot_words())
def test_a_slot_word_survives_taking_apart(word: int) -> None:
    """The parts of a slot word make the same word again."""
    parts = SlotWord.of(word)
    again = (
        parts.seq << words.SEQ_SHIFT
        | words.group_part(parts.group, parts.group_field)
        | words.endpoint_part(parts.endpoint, parts.endpoint_field)
        | parts.orphan
    )
    assert again == word


@given(slot_words(), st.sampled_from(Kind), FIELDS)
def test_with_field_changes_one_field_and_counts(word: int, kind: Kind, value: int) -> None:
    """with_field moves one field, adds one to seq, and leaves a well-formed word."""
    before, after = SlotWord.of(word), SlotWord.of(words.with_field(word, kind, value))
    assert after.seq == (before.seq + 1) % 2**words.SEQ_BITS
    assert (after.group_field if kind is Kind.GROUP else after.endpoint_field) == value
    if kind is Kind.GROUP:
        assert (after.endpoint, after.endpoint_field) == (before.endpoint, before.endpoint_field)
    else:
        assert (after.group, after.group_field) == (before.group, before.group_field)
    assert after.orphan == (before.orphan and not after.is_free)
    assert after.group_field or not after.group
    assert after.endpoint_field or not after.endpoint


@given(slot_words(), st.sampled_from(Kind), INDICES)
def test_field_speaks_of_one_semaphore(word: int, kind: Kind, index: int) -> None:
    """field is what the word says about this semaphore, NONE about any other."""
    parts = SlotWord.of(word)
    own = (parts.group, parts.group_field) if kind is Kind.GROUP else (parts.endpoint, parts.endpoint_field)
    assert words.field(word, kind, index) == (own[1] if own[0] == index else NONE)


@given(WORDS)
def test_seq_wraps_within_its_bits(word: int) -> None:
    """next_seq touches only the sequence and wraps after its last value."""
    following = words.next_seq(word)
    assert following & words.PART_MASK == 0
    assert following >> words.SEQ_SHIFT < 2**words.SEQ_BITS
    assert words.next_seq(words.SEQ_MASK) == 0


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_control_word_round_trip(target: int, issued: int, pending: int) -> None:
    """A control word carries three counts of 16 bits."""
    control = Control(target, issued, pending)
    assert Control.of(control.word()) == control
    assert control.word() < 2**48


@given(
    st.integers(0, 2**32 - 1),
    INDICES,
    st.sampled_from(Verdict),
    st.sampled_from(Admin),
    st.sampled_from(Admin),
    st.sampled_from(Role),
    st.sampled_from(Health),
)
def test_status_word_round_trip(
    epoch: int, weight: int, verdict: Verdict, config: Admin, operator: Admin, role: Role, health: Health
) -> None:
    """A status word carries everything that the hot path decides by; the stricter admin wins."""
    status = Status(epoch, weight, verdict, config, operator, role, health)
    assert Status.of(status.word()) == status
    assert status.admin == max(config, operator)


@given(st.sampled_from(Use), INDICES, st.booleans(), st.booleans())
def test_use_word_round_trip(use: Use, group: int, waits: bool, is_choosy: bool) -> None:
    """A use word carries use, group and what a waiter waits for."""
    word = UseWord(use, group, waits, is_choosy)
    assert UseWord.of(word.word()) == word


@given(WORDS)
def test_any_word_can_be_read(word: int) -> None:
    """Scribbled words read as something, never as an exception."""
    SlotWord.of(word)
    Status.of(word)
    UseWord.of(word)
    Control.of(word)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (0, "(-,-)"),
        (words.group_part(1, MAYBE), "(g1?,-)"),
        (words.group_part(1, YES) | words.endpoint_part(2, MAYBE), "(g1,e2?)"),
        (words.group_part(0, YES) | words.endpoint_part(3, YES) | ORPHAN, "(g0,e3)|ORPHAN"),
    ],
)
def test_slot_words_in_the_protocols_notation(word: int, text: str) -> None:
    """A slot word is printed the way the protocol writes it."""
    assert str(SlotWord.of(word)) == text
