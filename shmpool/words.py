"""The slot word, the control word, the use word and the status word: bit fields of 64-bit words.

The slot word and its one rule are the permit protocol's (tools/model/permit.c explores it): a field is MAYBE before,
and until after, its semaphore is touched.  So for every semaphore x, at every instant:

    certain(w, x) = the field of x in w is YES          unknown(w, x) = the field of x in w is MAYBE
    0 <= issued - value - (number certain) <= (number unknown) + pending

Pure integer arithmetic: usable on any copy of the words, in any process.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from shmpool.states import Admin, Health, Role, Use, Verdict

NONE: Final = 0  # the semaphore of this field was not touched, or its permit is gone for certain
MAYBE: Final = 1  # the semaphore is about to be touched, or was: only counting tells
YES: Final = 2  # one permit is held for certain

# slot word: seq:40 | G index:8 | G field:2 | E index:8 | E field:2 | ORPHAN:1
ORPHAN: Final = 1
MOVE: Final = ORPHAN  # beside a slot word in its recall word, which never speaks of an orphan: see layout.py
E_FIELD_SHIFT: Final = 1
E_INDEX_SHIFT: Final = 3
G_FIELD_SHIFT: Final = 11
G_INDEX_SHIFT: Final = 13
SEQ_SHIFT: Final = 21
SEQ_BITS: Final = 40

SEQ_ONE: Final = 1 << SEQ_SHIFT
SEQ_MASK: Final = ((1 << SEQ_BITS) - 1) << SEQ_SHIFT
FIELDS_MASK: Final = (3 << E_FIELD_SHIFT) | (3 << G_FIELD_SHIFT)
PART_MASK: Final = SEQ_ONE - 1  # all but the sequence
INDEX_MASK: Final = (0xFF << E_INDEX_SHIFT) | (0xFF << G_INDEX_SHIFT)
BOTH_MAYBE: Final = (MAYBE << E_FIELD_SHIFT) | (MAYBE << G_FIELD_SHIFT)
BOTH_YES: Final = (YES << E_FIELD_SHIFT) | (YES << G_FIELD_SHIFT)
G_PART: Final = (3 << G_FIELD_SHIFT) | (0xFF << G_INDEX_SHIFT)
E_PART: Final = (3 << E_FIELD_SHIFT) | (0xFF << E_INDEX_SHIFT)


class Kind(IntEnum):
    """Which of a slot word's two fields a semaphore is recorded in."""

    GROUP = 0
    ENDPOINT = 1


class SlotWord(NamedTuple):
    """A slot word, taken apart."""

    seq: int
    group: int
    group_field: int
    endpoint: int
    endpoint_field: int
    orphan: bool

    @classmethod
    def of(cls, word: int) -> SlotWord:
        """Take a slot word apart."""
        return cls(
            seq=word >> SEQ_SHIFT,
            group=word >> G_INDEX_SHIFT & 0xFF,
            group_field=word >> G_FIELD_SHIFT & 3,
            endpoint=word >> E_INDEX_SHIFT & 0xFF,
            endpoint_field=word >> E_FIELD_SHIFT & 3,
            orphan=bool(word & ORPHAN),
        )

    @property
    def is_free(self) -> bool:
        """Whether no permit is held or in doubt."""
        return self.group_field == NONE and self.endpoint_field == NONE

    def __str__(self) -> str:
        signs = ("-", "?", "", "!")
        group = "-" if self.group_field == NONE else f"g{self.group}{signs[self.group_field]}"
        endpoint = "-" if self.endpoint_field == NONE else f"e{self.endpoint}{signs[self.endpoint_field]}"
        return f"({group},{endpoint}){'|ORPHAN' if self.orphan else ''}"


def group_part(index: int, field: int) -> int:
    """Return the group bits of a slot word."""
    return index << G_INDEX_SHIFT | field << G_FIELD_SHIFT


def endpoint_part(index: int, field: int) -> int:
    """Return the endpoint bits of a slot word."""
    return index << E_INDEX_SHIFT | field << E_FIELD_SHIFT


def field(word: int, kind: Kind, index: int) -> int:
    """Return what a slot word says about one semaphore: NONE, MAYBE or YES."""
    if kind is Kind.GROUP:
        return word >> G_FIELD_SHIFT & 3 if word >> G_INDEX_SHIFT & 0xFF == index else NONE
    return word >> E_FIELD_SHIFT & 3 if word >> E_INDEX_SHIFT & 0xFF == index else NONE


def with_field(word: int, kind: Kind, value: int) -> int:
    """Return the word that follows `word` when one field becomes `value`: the next seq; FREE drops ORPHAN.

    NONE also clears the index.  When both fields are NONE the word is FREE, which is never an orphan.
    """
    part, shift = (G_PART, G_FIELD_SHIFT) if kind is Kind.GROUP else (E_PART, E_FIELD_SHIFT)
    rest = word & ~part if value == NONE else (word & ~(3 << shift)) | value << shift
    if not rest & FIELDS_MASK:
        rest &= SEQ_MASK
    return (rest & ~SEQ_MASK) | next_seq(word)


def next_seq(word: int) -> int:
    """Return the sequence bits for the store after `word` (they wrap after 2**40 stores)."""
    return (word + SEQ_ONE) & SEQ_MASK


class Control(NamedTuple):
    """A semaphore's control word: target:16 | issued:16 | pending:16.  Writer: the coordinator."""

    target: int  # what the configuration wants
    issued: int  # permits in circulation
    pending: int  # permits of a resize whose fate is not counted yet

    @classmethod
    def of(cls, word: int) -> Control:
        """Take a control word apart."""
        return cls(word & 0xFFFF, word >> 16 & 0xFFFF, word >> 32 & 0xFFFF)

    def word(self) -> int:
        """Return the 64-bit word."""
        return self.target | self.issued << 16 | self.pending << 32


class UseWord(NamedTuple):
    """What a slot's owner does with it: use:8 | group:8 | waits for an endpoint:1 | is choosy:1."""

    use: Use
    group: int
    waits_for_endpoint: bool = False
    is_choosy: bool = False  # it waits, and what its process has in the group does not serve it

    @classmethod
    def of(cls, word: int) -> UseWord:
        """Take a use word apart; a code that does not exist reads as FREE."""
        code = word & 0xFF
        use = Use(code) if code < len(Use) else Use.FREE
        return cls(use, word >> 8 & 0xFF, bool(word >> 16 & 1), bool(word >> 17 & 1))

    def word(self) -> int:
        """Return the 64-bit word."""
        return self.use | self.group << 8 | self.waits_for_endpoint << 16 | self.is_choosy << 17


class Status(NamedTuple):
    """An endpoint's status word: one load decides.  Writer: the coordinator.

    epoch:32 | weight:8 | verdict:8 | admin by configuration:2 | admin by operator:2 | role:2 | health:2
    (weight from bit 16, epoch from bit 32).  Epoch 0: the row is not in use.
    """

    epoch: int
    weight: int
    verdict: Verdict
    admin_config: Admin
    admin_operator: Admin
    role: Role
    health: Health

    @classmethod
    def of(cls, word: int) -> Status:
        """Take a status word apart; codes that do not exist read as the harmless 0."""
        verdict, role, health = word >> 8 & 0xFF, word >> 2 & 3, word & 3
        config, operator = word >> 6 & 3, word >> 4 & 3
        return cls(
            epoch=word >> 32,
            weight=word >> 16 & 0xFF,
            verdict=Verdict(verdict) if verdict < len(Verdict) else Verdict.NONE,
            admin_config=Admin(config) if config < len(Admin) else Admin.READY,
            admin_operator=Admin(operator) if operator < len(Admin) else Admin.READY,
            role=Role(role) if role < len(Role) else Role.UNKNOWN,
            health=Health(health) if health < len(Health) else Health.UNKNOWN,
        )

    def word(self) -> int:
        """Return the 64-bit word."""
        return (
            (self.epoch & 0xFFFFFFFF) << 32
            | self.weight << 16
            | self.verdict << 8
            | self.admin_config << 6
            | self.admin_operator << 4
            | self.role << 2
            | self.health
        )

    @property
    def admin(self) -> Admin:
        """The stricter of what the operator and the configuration want."""
        return max(self.admin_config, self.admin_operator)
