"""How many may wait (`max_waiting`), and what normal work leaves to checkouts of high priority (`reserve`)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from shmpool import Handle, Pool, PoolTimeout, TooManyWaiting
from shmpool.names import Names
from shmpool.observation import observe
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, is_ready, lease_of, one_value, pool_of, read_line, worker
from tools.pg_cluster import Cluster

BASE = 'target = "primary"\nautocommit = true'
GROUPS = {
    "bounded": f"connections = 1\nmax_waiting = 2\n{BASE}",
    "kept": f"connections = 3\nreserve = 1\n{BASE}",
    "free": f"connections = 3\n{BASE}",
}

NORMAL_WORKER = """
import sys, threading, time
from shmpool import Pool

def run(pool):
    while True:
        with pool.connection("kept", timeout=30.0):
            time.sleep(0.002)

with Pool(sys.argv[1]) as pool:
    pool.checkout("kept", 30.0).close()
    print("ready", flush=True)
    for _ in range(3):
        threading.Thread(target=run, args=(pool,), daemon=True).start()
    sys.stdin.read()
"""

RESTING_WORKER = """
import sys
from shmpool import Pool

with Pool(sys.argv[1]) as pool:
    handles = [pool.checkout("kept", 30.0) for _ in range(2)]
    for handle in handles:
        handle.close()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator on GROUPS that knows its endpoint."""
    name = f"limits{os.getpid()}"
    endpoints = {"pg1": endpoint_keys(cluster.primary.conninfo())}
    with running_coordinator(pool_config(name, endpoints, GROUPS, PROBE), name) as coordinator:
        wait_until(lambda: is_ready(name), within=10, what=lambda: coordinator.log)
        yield coordinator


@pytest.fixture
def pool(shared: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process; every permit is back afterwards."""
    with pool_of(shared.names.pool) as pool:
        yield pool


class Caller(threading.Thread):
    """A thread that checks out, notes its name in `served`, and gives the connection back when told to."""

    def __init__(self, pool: Pool, group: str, served: list[str], name: str, priority: str = "normal") -> None:
        super().__init__(name=name, daemon=True)
        self._pool, self._group, self._served, self._priority = pool, group, served, priority
        self.may_end = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Check out, wait, check in."""
        try:
            with self._pool.connection(self._group, 20.0, priority=self._priority):  # type: ignore[arg-type]
                self._served.append(self.name)
                self.may_end.wait(20)
        except PoolTimeout as error:
            self.error = error

    def end(self) -> None:
        """Let it give the connection back, and wait for its end."""
        self.may_end.set()
        self.join(30)
        assert not self.is_alive()


def end_all(callers: list[Caller]) -> None:
    """Let them all give back, whoever is served first."""
    for caller in callers:
        caller.may_end.set()
    for caller in callers:
        caller.end()


def waiting(pool: Pool, group: str) -> int:
    """Return how many threads of this process wait for a group."""
    return int(pool.statistics()[group]["waiting"])


def queue(pool: Pool, group: str, served: list[str], *names: str, priority: str = "normal") -> list[Caller]:
    """Let threads wait, one after the other."""
    callers = []
    for name in names:
        before = waiting(pool, group)
        callers.append(Caller(pool, group, served, name, priority))
        wait_until(lambda before=before: waiting(pool, group) == before + 1)  # type: ignore[misc]
    return callers


def test_one_more_than_may_wait_fails_at_once(pool: Pool) -> None:
    """Of threads that come at the same instant as many wait as may, the others fail at once and are counted."""
    refused_before = pool.statistics().get("bounded", {}).get("refused", 0)
    served: list[str] = []
    conn = pool.checkout("bounded")
    began = time.monotonic()
    callers = [Caller(pool, "bounded", served, str(number)) for number in range(12)]
    wait_until(lambda: sum(caller.error is not None for caller in callers) == 10, within=5)
    assert time.monotonic() - began < 5
    refused = [caller.error for caller in callers if caller.error is not None]
    assert all(isinstance(error, TooManyWaiting) for error in refused)
    assert "max_waiting" in str(refused[0])
    assert waiting(pool, "bounded") == 2
    assert pool.statistics()["bounded"]["refused"] - refused_before == 10
    group = next(g for g in observe(Names.of(pool.name)).groups if g.name == "bounded")
    assert group.refused >= 10
    conn.close()
    end_all(callers)
    assert len(served) == 2


def test_who_does_not_wait_is_not_refused(pool: Pool) -> None:
    """A checkout without waiting says PoolTimeout as ever, and one of high priority does not count normal ones."""
    served: list[str] = []
    conn = pool.checkout("bounded")
    callers = queue(pool, "bounded", served, "a", "b")
    with pytest.raises(PoolTimeout) as caught:
        pool.checkout("bounded", 0)
    assert not isinstance(caught.value, TooManyWaiting)
    callers += queue(pool, "bounded", served, "high 1", "high 2", priority="high")
    with pytest.raises(TooManyWaiting):
        pool.checkout("bounded", 5.0, "high")
    conn.close()
    wait_until(lambda: served == ["high 1"])
    end_all(callers)
    assert served[:2] == ["high 1", "high 2"]
    assert sorted(served[2:]) == ["a", "b"]


def test_unknown_priority_is_refused(pool: Pool) -> None:
    """A priority that does not exist is an error, not a normal one."""
    with pytest.raises(ValueError, match="priority"):
        pool.checkout("free", 0, "hihg")  # type: ignore[arg-type]


def test_high_priority_is_served_first(pool: Pool) -> None:
    """A connection that comes back goes to who waits with high priority, in order of arrival, then to the others."""
    served: list[str] = []
    handles = [pool.checkout("free") for _ in range(3)]
    callers = queue(pool, "free", served, "a", "b")
    callers += queue(pool, "free", served, "high 1", "high 2", priority="high")
    callers += queue(pool, "free", served, "c")
    by_name = {caller.name: caller for caller in callers}
    time.sleep(0.15)  # several slices: whoever sleeps on the bell for all has changed
    handles.pop().close()
    for name in ("high 1", "high 2"):
        wait_until(lambda name=name: name in served)  # type: ignore[misc]
        by_name[name].end()
    wait_until(lambda: len(served) == 3)
    assert served[:2] == ["high 1", "high 2"]
    for handle in handles:
        handle.close()
    end_all(callers)
    assert sorted(served[2:]) == ["a", "b", "c"]


def take_normal_share(pool: Pool) -> list[Handle]:
    """Check out everything that normal work may have."""
    handles = [pool.checkout("kept"), pool.checkout("kept")]
    with pytest.raises(PoolTimeout, match="1 reserved for high priority"):
        pool.checkout("kept", 0.1)
    return handles


def test_reserve_is_left_to_high_priority(pool: Pool) -> None:
    """Normal checkouts leave the reserve, also while they wait; one of high priority gets it at once."""
    served: list[str] = []
    handles = take_normal_share(pool)
    callers = queue(pool, "kept", served, "a", "b")
    for _ in range(3):
        with pool.connection("kept", 5.0, priority="high") as conn:
            assert one_value(conn, "SELECT 1") == 1
            assert served == []
    for handle in handles:
        handle.close()
    end_all(callers)
    assert sorted(served) == ["a", "b"]


def test_reserve_does_not_become_normal_work_s(pool: Pool) -> None:
    """What was opened with a permit of the reserve serves no normal thread afterwards, nor does it rest."""
    served: list[str] = []
    handles = take_normal_share(pool)
    high = pool.checkout("kept", 5.0, "high")
    (caller,) = queue(pool, "kept", served, "normal")
    high.close()
    assert pool.statistics()["kept"]["idle"] == 0
    assert lease_of(handles[0]).group.permits.semaphore.value == 1
    with pytest.raises(PoolTimeout):
        pool.checkout("kept", 0)
    assert served == []
    handles.pop().close()
    caller.end()
    assert served == ["normal"]
    handles.pop().close()


def test_connection_of_the_reserve_is_handed_on_to_high_priority(pool: Pool) -> None:
    """A second thread of high priority gets the reserve's connection itself, before normal ones that came first."""
    served: list[str] = []
    handles = take_normal_share(pool)
    high = pool.checkout("kept", 5.0, "high")
    backend = high.get_backend_pid()
    (normal,) = queue(pool, "kept", served, "normal")
    (second,) = queue(pool, "kept", served, "high", priority="high")
    opens = pool.statistics()["kept"]["opens"]
    high.close()
    wait_until(lambda: served == ["high"])
    assert pool.statistics()["kept"]["opens"] == opens, f"opened anew instead of handing {backend} over"
    second.end()
    for handle in handles:
        handle.close()
    normal.end()


def test_connection_rests_where_the_reserve_is_whole_without_it(pool: Pool) -> None:
    """A connection opened with high priority serves normal work afterwards, if as much as is reserved is free."""
    high = pool.checkout("kept", 5.0, "high")
    backend = high.get_backend_pid()
    high.close()
    with pool.connection("kept", 0) as conn:
        assert conn.get_backend_pid() == backend
        assert not lease_of(conn).is_reserved


def test_waiting_beside_a_reserve_costs_no_processor(pool: Pool) -> None:
    """Threads that may not take what is free sleep, in one process and beside another that does the same."""
    handles = take_normal_share(pool)
    with worker(
        NORMAL_WORKER.replace("pool.checkout", "print('ready', flush=True); pool.checkout"), pool.name
    ) as other:
        assert read_line(other) == "ready"
        name = Names.of(pool.name)
        wait_until(lambda: any(g.waiting for g in observe(name).groups if g.name == "kept"))
        began = time.thread_time()
        with pytest.raises(PoolTimeout):
            pool.checkout("kept", 1.0)
        assert time.thread_time() - began < 0.25
        for handle in handles:
            handle.close()


def test_normal_work_of_other_processes_leaves_the_reserve(pool: Pool) -> None:
    """Under load from several processes one of high priority is served whenever it asks, and normal work never
    holds a permit of the reserve."""
    with worker(NORMAL_WORKER, pool.name) as one, worker(NORMAL_WORKER, pool.name) as two:
        assert (read_line(one), read_line(two)) == ("ready", "ready")
        until = time.monotonic() + 1.5
        most = 0
        while time.monotonic() < until:
            report = observe(Names.of(pool.name))
            assert not report.violations
            most = max(most, next(g.held for g in report.groups if g.name == "kept"))
        assert most == 2
        waits = []
        for _ in range(15):
            began = time.monotonic()
            with pool.connection("kept", 10.0, priority="high"):
                waits.append(time.monotonic() - began)
        assert sorted(waits)[len(waits) // 2] < 0.04, waits  # a connect, not a slice or a tenure


def test_normal_waiter_gets_what_rests_elsewhere(pool: Pool) -> None:
    """A free permit of the reserve does not keep the coordinator from recalling for a normal thread."""
    with worker(RESTING_WORKER, pool.name) as resting:
        assert read_line(resting) == "ready"
        with pool.connection("kept", 5.0) as conn:
            assert one_value(conn, "SELECT 1") == 1
