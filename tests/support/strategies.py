"""Hypothesis strategies of the mechanism: slot words, control words, and when to stop an operation."""

from __future__ import annotations

from hypothesis import strategies as st

from shmpool import words
from shmpool.words import MAYBE, NONE, ORPHAN, YES, Control

FIELDS = st.sampled_from((NONE, MAYBE, YES))
INDICES = st.integers(0, 255)
CAPS = st.integers(0, 4)
EVENTS = st.integers(0, 160)  # a bytecode of a claim or release; beyond the last one: undisturbed


@st.composite
def slot_words(draw: st.DrawFn) -> int:
    """Well-formed slot words."""
    group, endpoint = draw(FIELDS), draw(FIELDS)
    word = draw(st.integers(0, 2**words.SEQ_BITS - 1)) << words.SEQ_SHIFT
    word |= words.group_part(draw(INDICES) if group else 0, group)
    word |= words.endpoint_part(draw(INDICES) if endpoint else 0, endpoint)
    return word | (ORPHAN if (group or endpoint) and draw(st.booleans()) else 0)


controls = st.builds(Control, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
