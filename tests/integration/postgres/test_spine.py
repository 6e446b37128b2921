"""The promise as a whole: many processes and threads, few connections, counted at the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest

from shmpool.names import Names
from shmpool.observation import observe
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, is_ready, is_whole, read_line, sessions, worker
from tools.pg_cluster import Cluster, Server

PERMITS = 5
PROCESSES = 16
THREADS = 4
SECONDS = 10


@pytest.fixture
def coordinator(cluster: Cluster, pool_name: str) -> Iterator[CoordinatorProcess]:
    """One endpoint and one group with as many permits."""
    config = pool_config(
        pool_name,
        {"pg1": endpoint_keys(cluster.primary.conninfo(), PERMITS)},
        {"work": f'connections = {PERMITS}\ntarget = "primary"\nautocommit = true'},
        PROBE,
    )
    with running_coordinator(config, pool_name) as coordinator:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: coordinator.log)
        yield coordinator


@contextmanager
def watched(server: Server, pool: str) -> Iterator[tuple[list[int], list[str]]]:
    """Count a pool's sessions at the server all the time, and look at its status; yields counts and violations."""
    counts: list[int] = []
    violations: list[str] = []
    stop = threading.Event()
    query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%shmpool:{pool}:%:%'"

    def sample(look: Callable[[], Any], pause: float) -> threading.Thread:
        def run() -> None:
            while not stop.wait(pause):
                look()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    conn = psycopg2.connect(server.conninfo())
    conn.autocommit = True

    def count() -> None:
        with conn.cursor() as cur:
            cur.execute(query)
            row = cur.fetchone()
        assert row is not None
        counts.append(row[0])

    threads = [
        sample(count, 0.004),
        sample(lambda: violations.extend(observe(Names.of(pool)).violations), 0.2),
    ]
    try:
        yield counts, violations
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        conn.close()


def test_spine(cluster: Cluster, coordinator: CoordinatorProcess) -> None:
    """16 processes of 4 threads share 5 connections: the server never sees 6, all work is done, nothing is lost."""
    name = coordinator.names.pool
    command = [sys.executable, "-m", "tests.support.load", name, "work"]
    options = [f"--processes={PROCESSES}", f"--threads={THREADS}", f"--seconds={SECONDS}"]
    with watched(cluster.primary, name) as (counts, violations):
        ended = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    answers = json.loads(ended.stdout)
    assert [error for answer in answers for error in answer["errors"]] == []
    assert len(answers) == PROCESSES
    assert all(served > 0 for answer in answers for served in answer["served"])
    assert len(counts) > 100
    assert max(counts) == PERMITS
    assert violations == []
    wait_until(lambda: is_whole(name), within=5, what=lambda: str(observe(Names.of(name))))
    assert sessions(cluster.primary, name) == []
    report = observe(Names.of(name))
    assert report.groups[0].free == report.groups[0].issued == PERMITS
    assert report.groups[0].timeouts == 0


VICTIM = """
import sys, threading
import shmpool
pool = shmpool.Pool(sys.argv[1])
idle, busy = pool.checkout("work"), pool.checkout("work")
idle.close()
cur = busy.cursor()
threading.Thread(target=lambda: cur.execute("SELECT pg_sleep(60)"), daemon=True).start()
print(busy.get_backend_pid(), flush=True)
sys.stdin.readline()
"""


def test_killed_worker(cluster: Cluster, coordinator: CoordinatorProcess) -> None:
    """A worker killed with an idle connection and in the middle of a query: both permits are back, bounded."""
    name = coordinator.names.pool
    running = "SELECT 1 FROM pg_stat_activity WHERE pid = {} AND query LIKE 'SELECT pg_sleep(60)' AND state = 'active'"
    with worker(VICTIM, name) as process:
        pid = int(read_line(process))
        wait_until(lambda: cluster.primary.execute(running.format(pid)))
        assert observe(Names.of(name)).groups[0].free == PERMITS - 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: is_whole(name), within=10, what=lambda: str(observe(Names.of(name))))
        assert sessions(cluster.primary, name) == []
