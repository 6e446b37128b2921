"""Traps that no other test steps into, and the table of all of them (TRAPS.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from shmpool import semaphores
from shmpool.attachment import join
from shmpool.errors import MechanismError
from shmpool.layout import SLOT_WORDS, USE_WORDS, WORKERS
from shmpool.rows import take_row
from shmpool.slots import BACKEND_PID
from shmpool.words import BOTH_YES, FIELDS_MASK, MAYBE, ORPHAN, Kind, with_field
from tests.crash.conftest import Sweep
from tests.crash.test_points import leave_one_row
from tests.support.crashing import Host, Tracer, host, points_of, run_until

TESTS = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("TRAPS.md")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@pytest.fixture
def pool(pool_name: str) -> Iterator[Host]:
    """A pool."""
    with host(pool_name) as made:
        yield made


def test_every_trap_has_a_test() -> None:
    """Each row of the table names tests, and each of them exists."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]  # the first names the columns
    assert len(rows) == 21
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for file, function in named:
            tree = ast.parse((TESTS / file).read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, function)


def test_slot_held_and_let_go_while_an_audit_copies(pool: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair claimed and released between the two copies makes the audit unclean: nothing is given back."""
    table = pool.add_worker()
    lost = pool.hold(table, "read")
    doubtful = with_field(pool.segment.words[lost.word_at], Kind.GROUP, MAYBE) | ORPHAN
    pool.segment.words[lost.word_at] = doubtful
    read_values = pool.permits.read_values

    def use_meanwhile() -> list[int | None]:
        values = read_values()
        table.release(pool.hold(table, "read"))
        return values

    before = pool.values()
    with monkeypatch.context() as patched:
        patched.setattr(pool.permits, "read_values", use_meanwhile)
        assert not pool.permits.audit()
    assert pool.values() == before
    assert pool.segment.words[lost.word_at] == doubtful
    del lost
    pool.settle(table)


def test_use_of_connections_does_not_starve_an_audit(pool: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkouts and checkins, which write use words alone, leave every copy of an audit clean."""
    start, end = pool.segment.layout.span(USE_WORDS)
    read_values = pool.permits.read_values

    def use_meanwhile() -> list[int | None]:
        for at in range(start, end):
            pool.segment.words[at] ^= 1
        return read_values()

    with monkeypatch.context() as patched:
        patched.setattr(pool.permits, "read_values", use_meanwhile)
        assert all(pool.permits.audit() for _ in range(50))


def test_no_strangers_pid_beside_a_permit(pool: Host) -> None:
    """At no bytecode of a claim is the backend of the slot's previous connection named beside the new pair."""
    table = pool.add_worker()
    token = table.take(pool.groups["read"])
    Tracer(lambda *_: None).run(lambda: table.claim(token, pool.groups["read"], pool.route()))  # Python 3.13 traces
    table.release(token)  # every bytecode of a function only from its second run on
    token = table.take(pool.groups["read"])
    pool.segment.words[token.detail_at + BACKEND_PID] = 4242
    seen = []

    def look(event: int, frame: FrameType) -> None:
        if pool.segment.words[token.word_at] & FIELDS_MASK == BOTH_YES:
            seen.append(pool.segment.words[token.detail_at + BACKEND_PID])

    Tracer(look).run(lambda: table.claim(token, pool.groups["read"], pool.route()))
    assert seen
    assert set(seen) == {0}
    table.release(token)


def test_slots_freed_during_a_take_over_have_one_owner(pool: Host, sweep: Sweep) -> None:
    """An orphan that the coordinator frees while its row is taken is either free or away for the new owner."""
    last = leave_one_row(pool)
    shape, words = pool.segment.layout, pool.segment.words
    first = shape.at(SLOT_WORDS, last * shape.slots_per_worker)
    places = range(first, first + shape.slots_per_worker)
    left = words[first : first + shape.slots_per_worker].tolist()
    locks = pool.registry.locks
    taken = []

    def take() -> None:
        taken.append(take_row(pool.segment, locks))

    def free() -> None:
        for at in places:
            words[at] &= ~(FIELDS_MASK | ORPHAN)

    def leave() -> None:
        row = taken.pop()
        words[shape.at(WORKERS, row.number, "pid")] = 0
        locks.unlock_row(row.number)

    points = points_of(take)
    leave()
    for point in sweep.choose(points):
        run_until(take, point.event, free)
        row = taken[-1]
        own = range(last * shape.slots_per_worker, (last + 1) * shape.slots_per_worker)
        assert sorted((*row.free, *row.away)) == list(own), point
        leave()
        for at, word in zip(places, left, strict=True):
            words[at] = word
    pool.settle()


@pytest.mark.parametrize("kind", ["g", "e", "b", "w"])
def test_semaphore_made_again_under_its_name(pool: Host, kind: str) -> None:
    """A second semaphore under the name of the first is damage to the coordinator and is refused by a worker."""
    name = pool.registry.names.semaphore(pool.segment.token, kind, 0)
    semaphores.unlink(name)
    semaphores.create(name, mode=0o600).close()
    assert pool.registry.damage() is not None
    with pytest.raises(MechanismError):
        join(pool.registry.names)
