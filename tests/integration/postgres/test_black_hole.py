"""A primary that is there and never answers, while another server takes over its role.

What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from shmpool import Pool
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health, Role
from shmpool.status import EndpointReport, GroupReport
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, is_ready, is_whole, one_value, read_line, worker
from tools.pg_cluster import Cluster

WORKERS = 3
EACH = 2
CAP = WORKERS * EACH
WORKER = f"""
import sys
from shmpool import Pool

pool = Pool(sys.argv[1])
busy, idle = [pool.checkout("write") for _ in range({EACH})]
pool.checkin(idle)
print("ready", flush=True)
with busy.cursor() as cur:
    cur.execute("SELECT pg_sleep(60)")
"""


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """A primary and a standby that nobody else uses."""
    with Cluster(standbys=1) as servers:
        yield servers


@pytest.fixture
def coordinator(pair: Cluster, pool_name: str) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows both, of one group that wants the primary."""
    endpoints = {
        "pg1": endpoint_keys(pair.primary.conninfo()),
        "pg2": endpoint_keys(pair.standbys[0].conninfo()),
    }
    group = f'connections = {CAP}\ntarget = "primary"\nautocommit = true\nper_worker_max = {CAP}\ntimeout = "10s"'
    with running_coordinator(pool_config(pool_name, endpoints, {"write": group}, PROBE), pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


def group(pool: str) -> GroupReport:
    """Return how the group is."""
    (found,) = observe(Names.of(pool)).groups
    return found


def endpoint(pool: str, name: str) -> EndpointReport:
    """Return how an endpoint is."""
    return next(e for e in observe(Names.of(pool)).endpoints if e.name == name)


def is_primary(pool: str, name: str) -> bool:
    """Whether the coordinator knows an endpoint as a primary that is up."""
    found = endpoint(pool, name)
    return (found.health, found.role) == (Health.UP, Role.PRIMARY)


def test_orphans_of_a_frozen_primary_hold_nothing_up_elsewhere(
    pair: Cluster, pool_name: str, coordinator: CoordinatorProcess
) -> None:
    """Black-holed primary, all its workers killed, standby promoted: the group is whole there at once.

    The permits of the frozen endpoint stay with the sessions that it still has, and return after it woke up.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(WORKER, pool_name)) for _ in range(WORKERS)]
        assert [read_line(process) for process in workers] == ["ready"] * WORKERS
        assert group(pool_name).free == 0
        assert endpoint(pool_name, "pg1").free == 20 - CAP
        pair.primary.pause()
        try:
            for process in workers:
                process.kill()
            killed = time.monotonic()
            for process in workers:
                process.wait()
            wait_until(lambda: group(pool_name).free == CAP, every=0.002, what=lambda: coordinator.log)
            back_s = time.monotonic() - killed
            assert back_s < 0.5, f"the group's permits were back after {back_s:.3f} s"
            pair.standbys[0].promote()
            promoted = time.monotonic()
            wait_until(lambda: is_primary(pool_name, "pg2"), every=0.002, what=lambda: coordinator.log)
            known = time.monotonic()
            with pool_of_everything(pool_name, pair.standbys[0].port):
                usable = time.monotonic()
                assert endpoint(pool_name, "pg1").free == 20 - CAP, "orphans of the frozen server keep its permits"
                assert endpoint(pool_name, "pg2").free == 20 - CAP
            known_s, usable_s = known - promoted, usable - known
            assert usable_s < 1, f"all {CAP} were usable {usable_s:.3f} s after the role was known"
            assert endpoint(pool_name, "pg1").free == 20 - CAP
        finally:
            pair.primary.resume()
        resumed = time.monotonic()
        wait_until(lambda: is_whole(pool_name), within=10, what=lambda: coordinator.log)
        whole_s = time.monotonic() - resumed
    print(
        f"\nprimary black-holed, {WORKERS} workers with {CAP} connections killed: the group's permits back after "
        f"{back_s * 1000:.0f} ms; role known {known_s * 1000:.0f} ms after the promotion; all {CAP} connections open "
        f"there {usable_s * 1000:.0f} ms later; the frozen endpoint's permits back {whole_s * 1000:.0f} ms after "
        "it woke up"
    )


@contextlib.contextmanager
def pool_of_everything(pool_name: str, port: int) -> Iterator[None]:
    """Hold all permits of the group, each with a connection to the server on a port."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(pool_name))
        for _ in range(CAP):
            conn = stack.enter_context(pool.connection("write"))
            assert one_value(conn, "SELECT inet_server_port()") == port
        yield
