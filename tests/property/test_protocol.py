"""The permit protocol under arbitrary histories: workers and a coordinator take turns between any two bytecodes."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmpool import words
from shmpool.errors import TableFullError
from shmpool.layout import SLOT_WORDS, WORKERS
from shmpool.rows import Row
from shmpool.segment import private_page
from shmpool.slots import Outcome, SlotTable, Token
from shmpool.words import FIELDS_MASK, NONE, ORPHAN, Control, Kind, SlotWord
from tests.support.crashing import Host, run_until
from tests.support.strategies import CAPS, EVENTS, FIELDS, controls, slot_words

_numbers = itertools.count()
WORKERS_MAX = 3


class DiedError(BaseException):
    """The worker was killed at this bytecode."""


class Worker:
    """A row and what its process holds."""

    def __init__(self, host: Host, number: int) -> None:
        self.host = host
        self.number = number
        shape, segment = host.segment.layout, host.segment
        self.first = shape.at(SLOT_WORDS, number * shape.slots_per_worker)
        self.generation_at = shape.at(WORKERS, number, "generation")
        segment.words[self.generation_at] += 1
        own = {self.first + i: word for i, word in enumerate(self.slot_words())}
        base = shape.at(SLOT_WORDS, 0)
        free = tuple(at - base for at, word in own.items() if not word & FIELDS_MASK)
        away = tuple(at - base for at, word in own.items() if word & ORPHAN)
        assert len(free) + len(away) == shape.slots_per_worker
        self.table = SlotTable(segment, private_page())
        self.table.add_row(Row(number, segment.words[self.generation_at], free, away))
        self.pairs: list[Token] = []
        self.halves: list[Token] = []

    def slot_words(self) -> list[int]:
        """Return the words of this row."""
        return list(self.host.segment.words[self.first : self.first + self.host.segment.layout.slots_per_worker])

    def bury(self, at_death: list[int]) -> None:
        """Leave the words as they were at death, and mark them as the reaper does."""
        self.table.forget()
        for i, word in enumerate(at_death):
            orphan = word | ORPHAN if word & FIELDS_MASK else word
            self.host.segment.words[self.first + i] = orphan
        self.host.segment.words[self.generation_at] += 1


class Protocol(RuleBasedStateMachine):
    """No history of claims, deaths, interrupts, abandons and resizes, at any bytecode, loses or invents a permit."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(f"p{os.getpid()}-{next(_numbers)}", {"read": 3, "write": 1}, {"pg1": 2, "pg2": 1})
        self.workers = [Worker(self.host, number) for number in range(WORKERS_MAX)]

    @initialize()
    def begin(self) -> None:
        """Begin with everything in circulation."""
        assert self.host.is_settled()

    def teardown(self) -> None:
        """Everybody dies; every permit must come back."""
        try:
            for worker in self.workers:
                worker.bury(worker.slot_words())
            self.host.settle()
        finally:
            self.host.close()

    def _coordinate(self, what: str, gone: bool) -> None:
        permits = self.host.permits
        if what == "settle":
            permits.settle(lambda slot, word: gone)
        elif what == "audit":
            permits.audit()
        elif what == "resize":
            permits.resize()
        else:
            permits.tick(lambda slot, word: gone)

    def _run(self, number: int, operation: Callable[[], Any], event: int, fate: str, gone: bool) -> None:
        """Run a worker's operation; at the given bytecode it dies, is interrupted, or the coordinator acts."""
        worker = self.workers[number]
        at_death: list[int] = []

        def meanwhile() -> None:
            self.host.check()
            if fate == "die":
                at_death[:] = worker.slot_words()
                raise DiedError
            if fate == "interrupt":
                raise DiedError
            self._coordinate(fate, gone)
            self.host.check()

        with contextlib.suppress(DiedError, TableFullError):
            run_until(operation, event, meanwhile)
        if at_death:
            worker.bury(at_death)
            self.workers[number] = Worker(self.host, number)

    moments = st.sampled_from(("die", "interrupt", "settle", "audit", "resize", "tick"))
    numbers = st.integers(0, WORKERS_MAX - 1)

    @rule(number=numbers, group=st.sampled_from(("read", "write")), event=EVENTS, fate=moments, gone=st.booleans())
    def claim(self, number: int, group: str, event: int, fate: str, gone: bool) -> None:
        """Claim a pair, keeping whatever is granted."""
        worker = self.workers[number]

        def operation() -> None:
            token = worker.table.take(self.host.groups[group])
            outcome = worker.table.claim(token, self.host.groups[group], self.host.route())
            if outcome is Outcome.GRANTED:
                worker.pairs.append(token)
            elif outcome is Outcome.ENDPOINTS_BUSY:
                worker.halves.append(token)
            else:
                worker.table.put_back(token)

        self._run(number, operation, event, fate, gone)

    @rule(number=numbers, event=EVENTS, fate=moments, gone=st.booleans())
    def release(self, number: int, event: int, fate: str, gone: bool) -> None:
        """Give the oldest pair back."""
        worker = self.workers[number]
        if worker.pairs:
            token = worker.pairs.pop(0)
            self._run(number, lambda: worker.table.release(token), event, fate, gone)

    @rule(number=numbers, event=EVENTS, fate=moments, gone=st.booleans(), tries=st.booleans())
    def go_on(self, number: int, event: int, fate: str, gone: bool, tries: bool) -> None:
        """Try again for an endpoint, or give the group permit up."""
        worker = self.workers[number]
        if not worker.halves:
            return
        token = worker.halves.pop(0)

        def operation() -> None:
            if not tries:
                worker.table.give_up(token)
                worker.table.put_back(token)
            elif worker.table.claim_endpoint(token, self.host.route()) is Outcome.GRANTED:
                worker.pairs.append(token)
            else:
                worker.halves.append(token)

        self._run(number, operation, event, fate, gone)

    @rule(number=numbers, is_dropped=st.booleans())
    def abandon(self, number: int, is_dropped: bool) -> None:
        """Abandon what is held, or merely drop it and tidy."""
        worker = self.workers[number]
        for held in (worker.pairs, worker.halves):
            if held:
                token = held.pop()
                if not is_dropped:
                    worker.table.abandon(token)
                del token
        assert worker.table.tidy() == []

    @rule(number=numbers)
    def die(self, number: int) -> None:
        """Die between operations; another process takes the row over."""
        worker = self.workers[number]
        worker.bury(worker.slot_words())
        self.workers[number] = Worker(self.host, number)

    @rule(number=st.sampled_from((0, 1, 3, 4)), cap=CAPS)
    def change_cap(self, number: int, cap: int) -> None:
        """Configure another cap."""
        if self.host.permits.control(number).pending == 0:
            self.host.permits.set_target(number, cap)

    @rule(what=st.sampled_from(("settle", "audit", "resize", "tick")), gone=st.booleans())
    def coordinate(self, what: str, gone: bool) -> None:
        """Let the coordinator act between operations."""
        self._coordinate(what, gone)

    @precondition(lambda self: any(worker.pairs for worker in self.workers))
    @rule()
    def live_pairs_stay(self) -> None:
        """What a live worker holds is never taken away."""
        for worker in self.workers:
            for token in worker.pairs:
                word = self.host.word(token)
                assert (word.group_field, word.endpoint_field, word.orphan) == (words.YES, words.YES, False)

    @invariant()
    def every_permit_is_accounted_for(self) -> None:
        """The bounds hold, the words are well formed, sequences only grow, nothing was out of bounds."""
        self.host.check()


Protocol.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


TestProtocol = Protocol.TestCase


@given(slot_words(), st.sampled_from(Kind), FIELDS)
def test_every_store_is_a_new_word(word: int, kind: Kind, value: int) -> None:
    """No store repeats the word before it, so equal copies mean that nothing was stored (ABA)."""
    after = words.with_field(word, kind, value)
    assert after != word
    assert words.next_seq(word) == after & words.SEQ_MASK


@given(slot_words())
def test_orphan_bit_changes_nothing_else(word: int) -> None:
    """Setting ORPHAN keeps what the word says of every semaphore."""
    assert SlotWord.of(word | ORPHAN)._replace(orphan=False) == SlotWord.of(word)._replace(orphan=False)


@given(slot_words())
def test_settling_ends_free(word: int) -> None:
    """Marking both fields NONE leaves a FREE word that is no orphan, two stores later."""
    after = words.with_field(words.with_field(word, Kind.GROUP, NONE), Kind.ENDPOINT, NONE)
    assert after & words.PART_MASK == 0
    assert after >> words.SEQ_SHIFT == ((word >> words.SEQ_SHIFT) + 2) % 2**words.SEQ_BITS


@given(controls)
def test_control_round_trip(control: Control) -> None:
    """A control word gives its three counts back."""
    assert Control.of(control.word()) == control
