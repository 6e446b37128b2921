"""The crash sweep: an operation is killed or interrupted at each of its bytecodes; no permit gets lost or invented.

By default a tenth of the points is covered, another one each day; `--every-point` covers all.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from shmpool import rows, semaphores, slots
from shmpool.errors import TableFullError
from shmpool.layout import WORKERS
from shmpool.rows import Locks, Row, leave_row, take_row
from shmpool.segment import private_page
from shmpool.slots import SlotTable
from tests.crash.conftest import Sweep
from tests.crash.scenarios import SCENARIOS, Operation, Scenario
from tests.support.crashing import (
    CAN_RAISE,
    TRACED,
    CountingClock,
    Host,
    InterruptedHereError,
    Point,
    host,
    points_of,
    run_until,
)

BY_NAME = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)


@pytest.fixture
def pool(pool_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A pool whose waits take no time and run the same bytecodes each time."""
    monkeypatch.setattr(slots, "monotonic", CountingClock())
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    with host(pool_name) as made:
        yield made


def interrupt() -> None:
    """Raise what a signal handler might raise."""
    raise InterruptedHereError


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def is_interrupted(operation: Operation, point: Point, files: frozenset[str] = TRACED) -> bool:
    """Interrupt an operation at a point, and drop everything that it knew; return whether it did not complete."""
    try:
        run_until(operation, point.event, interrupt, files)
    except InterruptedHereError:
        return True
    return False


def die_at(work: Callable[[], Operation], event: int, files: frozenset[str] = TRACED) -> None:
    """Fork a process that prepares an operation and is killed in it."""
    pid = os.fork()
    if pid == 0:
        try:
            run_until(work(), event, kill, files)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the operation ended before event {event}, exit {os.waitstatus_to_exitcode(status)}"


def account_for_all(pool: Host, table: SlotTable, where: str) -> None:
    """Let the coordinator clear up, claim every permit, and go back to the state that each point begins with."""
    try:
        pool.settle(table)
        pool.claim_everything(table)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
    pool.begin_anew(table)


@CAN_RAISE
@BY_NAME
def test_interrupted_anywhere(pool: Host, sweep: Sweep, scenario: Scenario) -> None:
    """An exception at any bytecode loses no permit and no slot: the same process can claim everything again."""
    table = pool.add_worker()
    account_for_all(pool, table, "at the beginning")
    points = [point for point in points_of(scenario(pool, table)) if point.can_raise]
    account_for_all(pool, table, "undisturbed")
    for point in sweep.choose(points):
        assert is_interrupted(scenario(pool, table), point), point
        account_for_all(pool, table, f"after {point}")


@BY_NAME
def test_killed_anywhere(pool: Host, sweep: Sweep, scenario: Scenario) -> None:
    """A process killed at any bytecode leaves words that account for every permit: the next one can claim all."""
    table = pool.add_worker()
    account_for_all(pool, table, "at the beginning")
    model = pool.add_worker()
    points = points_of(scenario(pool, model))
    pool.settle(table, model)
    assert leave_row(pool.segment, pool.registry.locks, model.rows[0])
    account_for_all(pool, table, "undisturbed")

    def work() -> Operation:
        mine = SlotTable(pool.segment, private_page())
        mine.add_row(take_row(pool.segment, Locks(pool.registry.names, pool.registry.locks.inode)))
        return scenario(pool, mine)

    for point in sweep.choose(points):
        die_at(work, point.event)
        account_for_all(pool, table, f"after {point}")


def leave_one_row(pool: Host) -> int:
    """Own every row but one, and return that one's number; a dead worker left two orphans in it."""
    mine = [take_row(pool.segment, pool.registry.locks) for _ in range(pool.segment.layout.workers)]
    last = mine[-1]
    assert leave_row(pool.segment, pool.registry.locks, last)

    def work() -> Operation:
        table = SlotTable(pool.segment, private_page())
        table.add_row(take_row(pool.segment, Locks(pool.registry.names, pool.registry.locks.inode)))
        pool.hold(table, "read")
        pool.hold_group(table, "read")
        return kill

    die_at(work, 0)
    assert pool.reaper.tick() == [last.number]
    return last.number


def test_row_taken_over_by_somebody_killed(pool: Host, sweep: Sweep) -> None:
    """A process killed while it takes a dead worker's row leaves the row to the next one, its slot words untouched."""
    last = leave_one_row(pool)
    before = pool.slot_words()

    def take() -> Row:
        return take_row(pool.segment, Locks(pool.registry.names, pool.registry.locks.inode))

    def give_back() -> None:
        assert leave_row(pool.segment, pool.registry.locks, take())

    for point in sweep.choose(points_of(give_back)):
        die_at(lambda: give_back, point.event)
        assert pool.slot_words() == before, point
        generation = pool.segment.words[pool.segment.layout.at(WORKERS, last, "generation")]
        row = take()
        assert (row.number, row.generation, len(row.free), len(row.away)) == (last, generation + 1, 2, 2), point
        assert leave_row(pool.segment, pool.registry.locks, row)
    pool.settle()


@CAN_RAISE
def test_interrupted_taking_a_row(pool: Host, sweep: Sweep) -> None:
    """An exception before a row is entered leaves it free, for this process and for others."""
    last = leave_one_row(pool)
    locks = pool.registry.locks
    points = points_of(lambda: take_row(pool.segment, locks))
    generation = pool.segment.words[pool.segment.layout.at(WORKERS, last, "generation")]
    assert leave_row(pool.segment, locks, Row(last, generation, (), ()))
    entered = max(point.event for point in points if point.code is rows._enter.__code__)
    for point in sweep.choose([point for point in points if point.event <= entered and point.can_raise]):
        assert is_interrupted(lambda: take_row(pool.segment, locks), point), point
        try:
            taken = take_row(pool.segment, locks)
        except TableFullError as error:
            raise AssertionError(f"after {point}: {error}") from error
        assert (len(taken.free), len(taken.away)) == (2, 2), point
        assert leave_row(pool.segment, locks, taken)
    pool.settle()


@CAN_RAISE
def test_interrupted_adding_a_row(pool: Host, sweep: Sweep) -> None:
    """An exception while a table takes a row in leaves none of its slots there, or all of them usable."""
    row = Row(0, 1, (0, 1, 2, 3), ())
    pool.segment.words[pool.segment.layout.at(WORKERS, row.number, "generation")] = row.generation

    def usable(table: SlotTable) -> list[int]:
        found = []
        table.tidy()
        with contextlib.suppress(TableFullError):
            while True:
                found.append(table.take(pool.groups["read"]))
        return sorted(token.number for token in found)

    pool.begin_anew()
    model = SlotTable(pool.segment, private_page())
    points = points_of(lambda: model.add_row(row))
    for point in sweep.choose([point for point in points if point.can_raise]):
        table = SlotTable(pool.segment, private_page())

        def operation(table: SlotTable = table) -> None:
            table.add_row(row)

        pool.begin_anew()
        assert is_interrupted(operation, point), point
        found = usable(table)
        if not found:
            table.add_row(row)
            found = usable(table)
        assert found == [0, 1, 2, 3], point
