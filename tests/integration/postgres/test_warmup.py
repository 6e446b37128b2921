"""What each worker keeps of a group (`per_worker_min`): opened ahead of need, in turns, and kept."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

import pytest

from shmpool import Pool, attachment, warmup
from shmpool.layout import SLOTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.status import GroupReport
from shmpool.warmup import PACE_S
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, end_session, is_ready, lease_of, pool_of, read_line, sessions, worker
from tools.pg_cluster import Cluster

BASE = 'target = "primary"\nautocommit = true'
GROUPS = {
    "warm": f"connections = 9\nper_worker_min = 3\n{BASE}",
    "small": f"connections = 2\nper_worker_min = 2\n{BASE}",
    "kept": f"connections = 4\nper_worker_min = 4\nreserve = 2\n{BASE}",
}

WORKER = """
import sys
from shmpool import Pool

with Pool(sys.argv[1]) as pool:
    pool.checkout(sys.argv[2], 30.0).close()
    print("ready", flush=True)
    sys.stdin.read()
"""

WITHOUT_THREADS = """
import sys, threading, time
from shmpool import Pool, attachment, warmup

attachment.be_without_threads()
with Pool(sys.argv[1]) as pool:
    pool.checkout("warm").close()
    while pool.statistics()["warm"]["idle"] < 3:
        attachment.do_rounds()
        time.sleep(0.02)
    print(threading.active_count(), flush=True)
"""

MASTER = """
import os, sys, time
from shmpool import Pool

with Pool(sys.argv[1]) as pool:
    pool.checkout("warm").close()
    pid = os.fork()
    if pid == 0:
        pool.checkout("warm").close()
        while pool.statistics()["warm"]["idle"] < 3:
            time.sleep(0.02)
        pool.close()
        os._exit(0)
    pool.checkout("warm").close()
    status = None
    while not status:
        for local in pool._state.groups.values():
            local.warmup._due = 0.0
        pool.look_after_idle()
        time.sleep(0.05)
        status = os.waitpid(pid, os.WNOHANG)[0]
    print(pool.statistics()["warm"]["idle"], flush=True)
"""


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator on GROUPS that knows its endpoint."""
    name = f"warm{os.getpid()}"
    endpoints = {"pg1": endpoint_keys(cluster.primary.conninfo())}
    with running_coordinator(pool_config(name, endpoints, GROUPS, PROBE), name) as coordinator:
        wait_until(lambda: is_ready(name), within=10, what=lambda: coordinator.log)
        yield coordinator
        wait_until(lambda: is_ready(name), within=10)


@pytest.fixture
def pool(shared: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool of this process, taken for one that has never forked; every permit is back afterwards."""
    monkeypatch.setattr(attachment, "_forking_pid", 0)
    monkeypatch.setattr(warmup, "START_S", 1000.0)  # not beside the test, but when it says so
    monkeypatch.setattr(warmup, "PACE_S", 0.0)
    with pool_of(shared.names.pool) as pool:
        yield pool


def group_of(pool: str, name: str) -> GroupReport:
    """Return a group as status shows it."""
    return next(group for group in observe(Names.of(pool)).groups if group.name == name)


def look(pool: Pool, name: str) -> None:
    """Let this process open a connection of a group ahead of need, if it does so at all."""
    group = pool._joined().groups[name]
    group.warmup._due = 0.0
    group.warmup.look(group)
    group.warmup._due = float("inf")


def opening_times(coordinator: CoordinatorProcess) -> list[float]:
    """Return when the connections that are open now were claimed, in order."""
    segment = coordinator.attach()
    try:
        start, end = segment.layout.span(SLOTS)
        times = segment.times[start + SLOTS.column("opened_at") : end : SLOTS.row_words].tolist()
        pids = segment.words[start + SLOTS.column("backend_pid") : end : SLOTS.row_words].tolist()
    finally:
        segment.release()
    return sorted(time for time, pid in zip(times, pids, strict=True) if time and pid)


def test_workers_open_in_turns_and_replace_what_died(shared: CoordinatorProcess, cluster: Cluster) -> None:
    """Each of three workers comes to its connections without being asked, one open after the other over the whole
    host, never beyond the cap; one that died at rest is replaced."""
    name = shared.names.pool
    with (
        worker(WORKER, name, "warm") as one,
        worker(WORKER, name, "warm") as two,
        worker(WORKER, name, "warm") as three,
    ):
        assert [read_line(process) for process in (one, two, three)] == ["ready"] * 3
        wait_until(lambda: group_of(name, "warm").idle == 9, within=15)
        ahead = opening_times(shared)[-6:]
        gaps = [after - before for before, after in itertools.pairwise(ahead)]
        assert sum(gap < 0.8 * PACE_S for gap in gaps) <= 1, gaps  # two may look in the same instant
        rows = [[slot.group for slot in w.slots if slot.is_held] for w in observe(shared.names).workers if w.held]
        assert [row.count("warm") for row in rows] == [3, 3, 3]
        victim = sessions(cluster.primary, name)[-1]
        end_session(cluster.primary, victim)
        wait_until(
            lambda: sessions(cluster.primary, name)[-1:] != [victim] and group_of(name, "warm").idle == 9, within=15
        )
        assert not observe(shared.names).violations
    wait_until(lambda: is_ready(name), within=10)


def test_what_a_worker_keeps_outlives_max_idle(pool: Pool) -> None:
    """Unused connections go at max_idle, but for as many as the worker keeps; those go at the end of their lifetime."""
    handles = [pool.checkout("warm") for _ in range(5)]
    leases = [lease_of(handle) for handle in handles]
    for handle in handles:
        handle.close()
    local = leases[0].group
    for lease in leases:
        lease.since -= local.settings.max_idle
    local.look_after_idle()
    assert pool.statistics()["warm"]["idle"] == 3
    for lease in leases:
        lease.expires = 0.0
    del lease, handle
    handles.clear()
    local.look_after_idle()
    assert pool.statistics()["warm"]["idle"] == 0


def test_reserve_is_left_free(pool: Pool) -> None:
    """No connection is opened ahead of need with a permit of the reserve."""
    pool.checkout("kept").close()
    for _ in range(4):
        look(pool, "kept")
    assert pool.statistics()["kept"]["idle"] == 2


def test_none_while_somebody_waits(pool: Pool) -> None:
    """A permit that came back is a waiting worker's, also while that one is stopped: none is used ahead of need."""
    handles = [pool.checkout("small"), pool.checkout("small")]
    name = pool.name
    with worker(WORKER, name, "small") as other:
        wait_until(lambda: group_of(name, "small").waiting == 1)
        os.kill(other.pid, signal.SIGSTOP)
        handle = handles.pop()
        handle.close()
        pool.rest()
        assert group_of(name, "small").free == 1
        opens = pool.statistics()["small"]["opens"]
        look(pool, "small")
        assert pool.statistics()["small"]["opens"] == opens
        os.kill(other.pid, signal.SIGCONT)
        assert read_line(other) == "ready"
        handles.pop().close()


def test_without_threads_it_is_done_in_rounds(shared: CoordinatorProcess) -> None:
    """Where no threads run, a worker opens what it keeps while it does its rounds."""
    with worker(WITHOUT_THREADS, shared.names.pool) as process:
        assert read_line(process) == "1"


def test_master_opens_nothing(shared: CoordinatorProcess) -> None:
    """A process that has forked opens nothing ahead of need; its child does."""
    with worker(MASTER, shared.names.pool) as process:
        assert read_line(process) == "1"
