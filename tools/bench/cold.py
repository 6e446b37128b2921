"""Cold claim and release, the whole protocol, beside acquire and release of the same two semaphores."""

from __future__ import annotations

import os
import timeit
from collections.abc import Iterator
from contextlib import contextmanager

from shmpool.layout import WORKERS, Layout
from shmpool.names import Names
from shmpool.rows import Row
from shmpool.segment import create, private_page
from shmpool.semaphores import Semaphore
from shmpool.semaphores import create as create_semaphore
from shmpool.semaphores import unlink as unlink_semaphore
from shmpool.slots import EndpointPermits, GroupPermits, SlotTable
from shmpool.states import SegmentState
from shmpool.words import Control
from tools.bench.rounds import ROUNDS, Quartiles, alternate, ratio

CALLS = 10_000
SHAPES = (  # rows, slots per row
    (1, 16),
    (64, 16),
    (16, 256),
    (64, 64),
)
_NS = 1e9


class Bracket:
    """A segment of some size with one group and one endpoint of one permit each; no coordinator."""

    def __init__(self, rows: int, slots_per_row: int) -> None:
        shape = Layout(workers=rows, slots_per_worker=slots_per_row, endpoints=1, groups=1)
        self._names = Names.of(f"bench-{os.getpid()}-{rows}x{slots_per_row}")
        self._segment = create(self._names, shape)
        self._semaphores: list[str] = []
        self._segment.set_header("state", SegmentState.OPEN)
        self.group = GroupPermits(self._segment, 0, self._new("g", 1), self._new("b", 0), self._new("w", 0))
        self.endpoint = EndpointPermits(self._segment, 0, self._new("e", 1), [self.group.endpoint_bell])
        for at in (self.group.control_at, self.endpoint.control_at):
            self._segment.words[at] = Control(target=1, issued=1, pending=0).word()
        last = rows - 1
        self._segment.words[shape.at(WORKERS, last, "generation")] = 1
        self._slots = SlotTable(self._segment, private_page())
        first = last * slots_per_row
        self._slots.add_row(Row(last, 1, tuple(range(first, first + slots_per_row)), ()))

    def _new(self, kind: str, value: int) -> Semaphore:
        name = self._names.semaphore(self._segment.token, kind, 0)
        semaphore = create_semaphore(name, mode=0o600)
        self._semaphores.append(name)
        for _ in range(value):
            semaphore.release()
        return semaphore

    def protocol(self) -> None:
        """Take a token, claim, release: every store and check of the protocol, bells included."""
        token = self._slots.take(self.group)
        if not self._slots.claim_once(token, self.group, (self.endpoint,)):
            raise RuntimeError("the permit is not free")
        self._slots.release(token)

    def bare(self) -> None:
        """What the two semaphores alone cost."""
        self.group.acquire(0)
        self.endpoint.acquire(0)
        self.endpoint.release()
        self.group.release()

    def remove(self) -> None:
        """Leave nothing behind."""
        for name in self._semaphores:
            unlink_semaphore(name)
        self._segment.unlink()


@contextmanager
def _brackets() -> Iterator[dict[str, Bracket]]:
    made: dict[str, Bracket] = {}
    try:
        for rows, slots in SHAPES:
            made[f"{rows} rows, {rows * slots} slots"] = Bracket(rows, slots)
        yield made
    finally:
        for bracket in made.values():
            bracket.remove()


def _ns(call: object) -> float:
    return timeit.timeit(call, number=CALLS) / CALLS * _NS  # type: ignore[arg-type]


def cold(rounds: int = ROUNDS) -> None:
    """Print nanoseconds, the ratio to bare semaphores, and how flat it is over sizes."""
    with _brackets() as brackets:
        smallest, *others = brackets
        measures = {name: (lambda b=bracket: _ns(b.protocol)) for name, bracket in brackets.items()}
        found = alternate({"bare": lambda: _ns(brackets[smallest].bare), **measures}, rounds)
        print(f"  {'bare acquire and release of both':40} {Quartiles.of(found['bare']):.0f} ns")
        for name in brackets:
            print(f"  {name:40} {Quartiles.of(found[name]):.0f} ns")
        print(f"  {'ratio to bare':40} {ratio(found, smallest, 'bare'):.2f}")
        for name in others:
            print(f"  {name + ' / ' + smallest:40} {ratio(found, name, smallest):.3f}")
