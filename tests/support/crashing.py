"""Stopping the permit mechanism between any two bytecodes, and looking whether every permit is accounted for.

`sys.settrace` calls back before each bytecode of the traced modules; what a C call does (a semaphore's acquire) thus
lies between two points, as it does for a signal, an exception or a kill.
"""

from __future__ import annotations

import dis
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest

from shmpool import invariants, rows, semaphores, slots, views
from shmpool.layout import SLOT_WORDS, SLOTS
from shmpool.rows import take_row
from shmpool.segment import private_page
from shmpool.semaphores import Semaphore, ring
from shmpool.slots import COUNTED_GROUP, EndpointPermits, GroupPermits, Outcome, SlotTable, Token
from shmpool.views import Collect
from shmpool.words import FIELDS_MASK, SlotWord
from shmpool_coordinator.reaper import Reaper
from tests.support.desk import close_desk, config_of, open_desk

TRACED = frozenset(str(module.__file__) for module in (slots, rows, semaphores))
TURNS = 2  # how often one bytecode counts as a point of its own: loops are cut there
SETTLE_TICKS = 4  # ticks after which every permit must be back


# A trace function that raises makes newer interpreters keep the frame, and what it refers to, for ever (3.13: at the
# entry of a function and in loops).  Killing is not affected.
CAN_RAISE = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="from Python 3.12 on, raising from a trace function leaks the frame"
)


class InterruptedHereError(BaseException):
    """What a signal handler might raise."""


class Point(NamedTuple):
    """The `event`-th bytecode that an operation runs."""

    event: int
    code: CodeType
    offset: int
    line: int | None  # None: the compiler's own

    @property
    def can_raise(self) -> bool:
        """Whether an exception may come here: not while the interpreter notes or clears a handled one."""
        opname = dis.opname[self.code.co_code[self.offset]]
        return self.line is not None and opname not in ("PUSH_EXC_INFO", "POP_EXCEPT")

    def __str__(self) -> str:
        module = self.code.co_filename.rsplit("/", 1)[-1]
        return f"event {self.event}: {module}:{self.line} {self.code.co_qualname}+{self.offset}"


class Tracer:
    """Runs an operation and calls `act(event, frame)` before each bytecode of the traced modules.

    What `act` raises is raised at that bytecode.  While `act` runs, nothing is traced.
    """

    def __init__(self, act: Callable[[int, FrameType], None], files: frozenset[str] = TRACED) -> None:
        self._act = act
        self._files = files
        self._event = 0

    def run(self, operation: Callable[[], object]) -> None:
        """Run the operation under the tracer."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            operation()
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._local

    def _local(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            number = self._event
            self._event = number + 1
            self._act(number, frame)
        return self._local


def points_of(operation: Callable[[], object], files: frozenset[str] = TRACED) -> list[Point]:
    """Run an operation and return the points at which it could have been stopped."""
    seen: Counter[tuple[CodeType, int]] = Counter()
    points = []

    def note(event: int, frame: FrameType) -> None:
        key = (frame.f_code, frame.f_lasti)
        seen[key] += 1
        if seen[key] <= TURNS:
            points.append(Point(event, *key, frame.f_lineno))

    Tracer(note, files).run(operation)
    return points


def run_until(
    operation: Callable[[], object], event: int, act: Callable[[], None], files: frozenset[str] = TRACED
) -> None:
    """Run an operation and call `act` before its `event`-th bytecode."""

    def at(number: int, _: FrameType) -> None:
        if number == event:
            act()

    Tracer(at, files).run(operation)


def now() -> float:
    """Return the time as the brackets read it: a test may have put another clock in place."""
    return float(vars(slots)["monotonic"]())


def session_gone(slot: int, word: int) -> bool:
    """Say that every orphan's server session has ended."""
    return True


class Host:
    """A pool's coordinator in the test's own process: groups read (4) and write (1), endpoints pg1 and pg2 (1 each)."""

    def __init__(self, pool_name: str, groups: dict[str, int], endpoints: dict[str, int]) -> None:
        self.registry = open_desk(config_of(pool_name, groups, endpoints))
        self.segment = self.registry.segment
        self.permits = self.registry.permits
        self.reaper = Reaper(self.segment, self.registry.locks)
        self._opened: list[Semaphore] = []
        assert self.registry.settings is not None
        self.groups = {g.name: self._group(g.index) for g in self.registry.settings.groups}
        self.endpoints = {
            e.name: EndpointPermits(
                self.segment,
                e.index,
                self._open("e", e.index),
                [group.endpoint_bell for group in self.groups.values()],
            )
            for e in self.registry.settings.endpoints
        }
        self.tables: list[SlotTable] = []
        self.permits.tick(session_gone)
        self._last = self._collect()

    def _open(self, kind: str, index: int) -> Semaphore:
        self._opened.append(Semaphore(self.registry.names.semaphore(self.segment.token, kind, index)))
        return self._opened[-1]

    def _group(self, index: int) -> GroupPermits:
        return GroupPermits(self.segment, index, self._open("g", index), self._open("b", index), self._open("w", index))

    def close(self) -> None:
        """Remove the pool."""
        for table in self.tables:
            table.forget()
        self.reaper.close()
        for one in self._opened:
            one.close()
        close_desk(self.registry)

    # -- a worker's side ---------------------------------------------------------------------------

    def add_worker(self) -> SlotTable:
        """Take a row for this process."""
        table = SlotTable(self.segment, private_page())
        table.add_row(take_row(self.segment, self.registry.locks))
        self.tables.append(table)
        return table

    def route(self, *names: str) -> list[EndpointPermits]:
        """Return endpoints to try; all by default."""
        return [self.endpoints[name] for name in names or self.endpoints]

    def begin_anew(self, *tables: SlotTable) -> None:
        """Bring bells, counters and the order of free tokens to one state, so that bytecodes repeat."""
        for group in self.groups.values():
            for bell in (group.bell, group.endpoint_bell):
                while bell.value:
                    bell.acquire(0)
        start, end = self.segment.layout.span(SLOTS)
        for table in tables:
            everything = [table.take(self.groups["read"]) for _ in range(self.segment.layout.slots_per_worker)]
            for token in sorted(everything, key=lambda token: token.number):
                self.segment.words[token.detail_at + COUNTED_GROUP] = 0
                table.put_back(token)
        for at in range(start + COUNTED_GROUP, end, SLOTS.row_words):
            self.segment.words[at] = 0

    def hold(self, table: SlotTable, group: str, *endpoints: str) -> Token:
        """Claim a permit pair."""
        token = table.take(self.groups[group])
        assert table.claim(token, self.groups[group], self.route(*endpoints)) is Outcome.GRANTED
        return token

    def hold_group(self, table: SlotTable, group: str) -> Token:
        """Claim a group's permit while no endpoint has one."""
        token = table.take(self.groups[group])
        assert table.claim(token, self.groups[group], []) is Outcome.ENDPOINTS_BUSY
        return token

    def ring(self, group: str) -> None:
        """Ring both bells of a group."""
        ring(self.groups[group].bell)
        ring(self.groups[group].endpoint_bell)

    def claim_everything(self, table: SlotTable) -> None:
        """Claim every permit of every semaphore, and give them back."""
        for name, group in self.groups.items():
            cap = self.permits.control(group.index).target
            tokens = [self.hold_group(table, name) for _ in range(min(cap, 4))]
            for token in tokens:
                table.give_up(token)
                table.put_back(token)
        group = self.groups["read"]
        for name, endpoint in self.endpoints.items():
            cap = self.permits.control(self.segment.layout.groups + endpoint.index).target
            tokens = [self.hold(table, "read", name) for _ in range(min(cap, 4))]
            for token in tokens:
                table.release(token)
        everything = [table.take(group) for _ in range(self.segment.layout.slots_per_worker)]
        for token in everything:
            table.put_back(token)
        assert table.is_home()

    # -- looking -----------------------------------------------------------------------------------

    def word(self, token: Token) -> SlotWord:
        """Return a token's slot word, taken apart."""
        return SlotWord.of(self.segment.words[token.word_at])

    def slot_words(self) -> list[int]:
        """Return every slot word."""
        start, end = self.segment.layout.span(SLOT_WORDS)
        return list(self.segment.words[start:end])

    def values(self) -> list[int | None]:
        """Return every permit semaphore's value."""
        return list(self.permits.read_values())

    def bells(self) -> list[int]:
        """Return every bell's value."""
        return [bell.value for group in self.groups.values() for bell in (group.bell, group.endpoint_bell)]

    def shared(self) -> tuple[bytes, list[int | None], list[int]]:
        """Return everything that a process could change: the whole segment, permits and bells."""
        return self.segment.words.tobytes(), self.values(), self.bells()

    def _collect(self) -> Collect:
        return views.collect(self.segment, self.permits.read_values)

    def check(self) -> None:
        """Check the invariants, that no count was impossible, and that the words moved as they may."""
        view = views.read_pool(self.segment, self.permits.read_values)
        assert view.is_clean
        assert [str(found) for found in invariants.check(view)] == []
        assert all(permit.out_of_bounds == 0 for permit in view.permits), view.permits
        collect = self._collect()
        assert invariants.check_sequence(self._last, collect) == []
        self._last = collect

    def tick(self) -> None:
        """Be the coordinator once, and check what it left."""
        self.reaper.tick()
        self.permits.tick(session_gone)
        self.check()

    def is_settled(self) -> bool:
        """Whether every word is FREE and every permit in its semaphore, as many as configured."""
        view = views.permit_rows(self.segment, self._collect())
        return not any(word & FIELDS_MASK for word in self.slot_words()) and all(
            permit.value == permit.control.issued == permit.control.target and permit.control.pending == 0
            for permit in view
        )

    def settle(self, *tables: SlotTable) -> None:
        """Let workers tidy and the coordinator tick until every permit is accounted for."""
        self.check()
        for _ in range(SETTLE_TICKS):
            for table in tables:
                for token in table.tidy():
                    table.release(token)
            self.tick()
            if self.is_settled() and all(table.is_home() for table in tables):
                return
        words = [str(SlotWord.of(word)) for word in self.slot_words() if word & FIELDS_MASK]
        homes = [table.is_home() for table in tables]
        raise AssertionError(f"not settled: {words}, values {self.values()}, tables at home: {homes}")


@contextmanager
def host(
    pool_name: str, groups: dict[str, int] | None = None, endpoints: dict[str, int] | None = None
) -> Iterator[Host]:
    """Make a pool, and remove it again."""
    made = Host(pool_name, groups or {"read": 4, "write": 1}, endpoints or {"pg1": 1, "pg2": 1})
    try:
        yield made
    finally:
        made.close()


class CountingClock:
    """A clock that moves by one at each look, so that a wait runs the same bytecodes every time."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)

    def __call__(self) -> float:
        return float(next(self._ticks))
