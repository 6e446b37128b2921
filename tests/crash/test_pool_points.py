"""The crash sweep of a worker's pool: checkout and checkin are killed or interrupted at each of their bytecodes.

The driver alone is replaced (stand_in.py): a real connect at each of these points would take hours.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from shmpool import (
    Pool,
    attachment,
    connection,
    lease,
    local_group,
    opening,
    pool,
    router,
    semaphores,
    session,
    slots,
    waiting,
    warmup,
)
from shmpool import handle as handle_module
from shmpool.layout import ENDPOINTS, RECALL_WORDS
from tests.crash.conftest import Sweep
from tests.crash.pool_scenarios import POOL_SCENARIOS, Operation, Scenario, Scene, lease_of, recalled
from tests.crash.test_points import account_for_all, die_at, is_interrupted
from tests.support.crashing import CAN_RAISE, SETTLE_TICKS, CountingClock, Host, Point, host, points_of
from tests.support.pools import healthy
from tests.support.stand_in import Server, replace_driver

MODULES: tuple[ModuleType, ...] = (
    pool,
    local_group,
    lease,
    waiting,
    router,
    opening,
    warmup,
    handle_module,
    slots,
    connection,
    session,
)
FILES = frozenset(str(module.__file__) for module in MODULES)
CLOCKED: tuple[ModuleType, ...] = (pool, local_group, lease, waiting, router, opening, warmup, slots)
KILLED_SHARE = 40  # one point of so many by default: each costs a process that joins the pool
LOOKS_PER_S = 1024  # of the clock: far more than an operation takes within the shortest limit
BY_NAME = pytest.mark.parametrize("scenario", POOL_SCENARIOS, ids=lambda scenario: scenario.__name__)


class Silent:
    """A background thread that does nothing: it would run beside the operation, at other moments each time."""

    def __init__(self, *args: object) -> None:
        pass

    def say(self, kind: str, **fields: Any) -> None:
        """Tell nobody."""

    def stop(self, within: float) -> bool:
        """End at once."""
        return True


class Stage:
    """Makes the same scene again and again."""

    def __init__(self, made: Host, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = made
        self.server = server
        self._monkeypatch = monkeypatch

    def scene(self) -> Scene:
        """Return a pool that has not joined yet, at the beginning of time."""
        clock = CountingClock()
        for module in CLOCKED:
            self._monkeypatch.setattr(module, "monotonic", lambda: clock() / LOOKS_PER_S)
        for index in range(len(self.host.endpoints)):
            at = self.host.segment.layout.at(ENDPOINTS, index, "status")
            self.host.segment.words[at] = healthy(epoch=1).word()
        self.server.failures = []
        self.host.begin_anew()
        return Scene(self.host, Pool(self.host.registry.names.pool), self.server)

    def end(self, scene: Scene, where: str) -> None:
        """Let the same process go on: it can use every permit, lends nothing twice, and leaves with nothing."""
        try:
            self._go_on(scene)
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error

    def _go_on(self, scene: Scene) -> None:
        self.server.failures = []
        gc.collect()  # an exception may have come where frames refer to each other
        start, end = self.host.segment.layout.span(RECALL_WORDS)
        for at in range(start, end):
            self.host.segment.words[at] = 0
        for _ in range(SETTLE_TICKS):  # as a worker and a coordinator that live beside each other do
            for one in attachment.attached():
                lease.tidy(one.table)
            self.host.tick()
        handles = [scene.pool.checkout("read") for _ in range(4)]
        lent = [lease_of(one).connection for one in handles]
        assert len({id(one) for one in lent}) == 4, "a connection was lent twice"
        assert not any(one.closed for one in lent)
        assert len({lease_of(one).number for one in handles}) == 4
        for handle in handles:
            handle.close()
        numbers = scene.pool.statistics()["read"]
        assert (numbers["idle"], numbers["held"], numbers["waiting"]) == (4, 4, 0), numbers
        assert scene.pool.rest() == 4
        scene.pool.checkout("write").close()
        del handles, lent
        scene.pool.close()
        assert self.server.open() == [], "a session was left open"
        assert not [one for one in attachment.attached() if one.names == self.host.registry.names]
        self.host.settle()


@pytest.fixture
def stage(pool_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A pool without waits, without threads of its own, and with the driver replaced."""
    monkeypatch.setattr(attachment, "Background", Silent)
    monkeypatch.setattr(attachment, "_forking_pid", 0)  # whatever other tests did in this process
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    for module, pause in (
        (local_group, "SLICE_S"),
        (waiting, "SLICE_S"),
        (local_group, "POLITE_S"),
        (opening, "REFUSED_PAUSE_S"),
        (slots, "ASIDE_S"),
        (warmup, "PACE_S"),
    ):
        monkeypatch.setattr(module, pause, 0.0)
    server = replace_driver(monkeypatch, cap=4)
    with host(pool_name, {"read": 4, "write": 1}, {"pg1": 2, "pg2": 2}) as made:
        gc.freeze()  # looking for garbage at each point costs little then
        yield Stage(made, server, monkeypatch)
        gc.unfreeze()


def prepare(stage: Stage, scenario: Scenario) -> tuple[Scene, Operation]:
    """Return a scene and the operation to stop in it."""
    scene = stage.scene()
    return scene, scenario(scene)


def points(stage: Stage, scenario: Scenario) -> list[Point]:
    """Run an operation undisturbed, and return its points."""
    scene, operation = prepare(stage, scenario)
    found = points_of(operation, FILES)
    del operation
    stage.end(scene, "undisturbed")
    return found


@CAN_RAISE
@BY_NAME
def test_pool_interrupted_anywhere(stage: Stage, sweep: Sweep, scenario: Scenario) -> None:
    """An exception at any bytecode of checkout and checkin: the same process can use every permit, each once."""
    for point in sweep.choose([point for point in points(stage, scenario) if point.can_raise]):
        scene, operation = prepare(stage, scenario)
        assert is_interrupted(operation, point, FILES), point
        del operation
        stage.end(scene, f"after {point}")


@BY_NAME
def test_pool_killed_anywhere(stage: Stage, sweep: Sweep, scenario: Scenario) -> None:
    """A worker killed at any bytecode of checkout and checkin: every permit can be claimed by the next one."""
    found = points(stage, scenario)
    table = stage.host.add_worker()

    def work() -> Operation:
        return prepare(stage, scenario)[1]

    for point in sweep.choose(found, KILLED_SHARE):
        die_at(work, point.event, FILES)
        account_for_all(stage.host, table, f"after {point}")


def test_politeness_takes_no_ring(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a connection was given up for others the next claim is a short sleep later, and the bell stays rung."""
    naps: list[float] = []
    monkeypatch.setattr(local_group, "POLITE_S", 0.5)
    monkeypatch.setattr(time, "sleep", naps.append)
    scene, operation = prepare(stage, recalled)
    operation()
    bell = stage.host.groups["read"].bell
    assert bell.value == 1
    handle = scene.pool.checkout("read")
    assert len(naps) == 1
    assert 0 < naps[0] <= 0.5
    assert bell.value == 1
    handle.close()
    del operation, handle
    stage.end(scene, "polite")
