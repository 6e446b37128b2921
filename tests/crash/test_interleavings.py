"""What happens inside a bracket besides death: nested claims, lost wakes, threads that end, references that go."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool import semaphores, slots
from shmpool.clock import monotonic
from shmpool.errors import TableFullError
from shmpool.names import SHM_DIR
from shmpool.rows import Locks, take_row
from shmpool.segment import private_page
from shmpool.slots import SlotTable
from tests.crash.conftest import Sweep
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.support.crashing import CountingClock, Host, host, points_of, run_until
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
EXITING = """
import sys, threading, time
from shmpool.attachment import join
from shmpool.names import Names
from shmpool.states import Use
from shmpool.words import UseWord

joined = join(Names.of(sys.argv[1]))
permits = joined.groups["write"][1]
endpoints = list(joined.endpoints.values())
held = joined.take_token(permits)
assert joined.table.claim_once(held, permits, endpoints)
tokens = [joined.take_token(permits) for _ in range(3)]
for token in tokens:
    threading.Thread(
        target=joined.table.wait, args=(token, permits, lambda: endpoints, time.monotonic() + 60), daemon=True
    ).start()
while any(UseWord.of(joined.segment.words[token.use_at]).use is not Use.WAITING for token in tokens):
    time.sleep(0.001)
"""


@pytest.fixture
def pool(pool_name: str) -> Iterator[Host]:
    """A pool."""
    with host(pool_name) as made:
        yield made


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_claim_inside_another_bracket(
    pool: Host, sweep: Sweep, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler or finalizer that claims and releases inside another bracket of its thread disturbs neither."""
    monkeypatch.setattr(slots, "monotonic", CountingClock())
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    table = pool.add_worker()

    def handler() -> None:
        with contextlib.suppress(TableFullError):
            token = table.take(pool.groups["read"])
            if table.claim_once(token, pool.groups["read"], pool.route()):
                table.release(token)
            else:
                table.put_back(token)

    points = points_of(scenario(pool, table))
    pool.settle(table)
    for point in sweep.choose(points):
        pool.begin_anew(table)
        operation = scenario(pool, table)
        try:
            run_until(operation, point.event, handler)
            del operation
            pool.settle(table)
        except (AssertionError, TableFullError) as error:
            raise AssertionError(f"{scenario.__name__}, after {point}: {error}") from error


def test_killed_between_a_bells_increment_and_its_wake(pool: Host) -> None:
    """A ring that woke nobody, and that keeps others from ringing, delays a waiter by slices only."""
    table = pool.add_worker()
    held = pool.hold(table, "write")
    bell = pool.groups["write"].bell
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            mine = SlotTable(pool.segment, private_page())
            mine.add_row(take_row(pool.segment, Locks(pool.registry.names, pool.registry.locks.inode)))
            token = mine.take(pool.groups["write"])
            granted = mine.wait(token, pool.groups["write"], pool.route, deadline=monotonic() + 30)
            failed = 0 if granted else 2
        finally:
            os._exit(failed)
    with (
        open(SHM_DIR / f"sem.{bell.name[1:]}", "r+b") as file,
        mmap.mmap(file.fileno(), 0) as raw,
        memoryview(raw).cast("I") as parts,  # glibc: the value, then how many sleep
    ):
        wait_until(lambda: parts[1] > 0, what="nobody sleeps on the bell")
        while bell.value == 0:
            parts[0] += 1
    table.release(held)
    del held
    assert os.waitpid(pid, 0)[1] == 0
    pool.settle(table)


def test_threads_that_wait_when_the_interpreter_exits(pool: Host) -> None:
    """Daemon threads inside waits end with the interpreter, promptly; what they held comes back."""
    done = subprocess.run(
        [sys.executable, "-c", EXITING, pool.registry.names.pool],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=30,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    pool.settle()
    pool.claim_everything(pool.add_worker())
