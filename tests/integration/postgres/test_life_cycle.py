"""Coordinators that come and go by themselves, are killed in the middle, or lose their names."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmpool import CoordinatorNotRunning, Pool
from shmpool.cli import main
from shmpool.control_client import ControlError
from shmpool.launch import serving_pid
from shmpool.layout import GROUPS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.pool_errors import PoolError
from shmpool.segment import Segment
from shmpool.semaphores import Semaphore
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.gunicorn import stop_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import is_ready, is_whole, one_value, pool_of, read_line, run_python, sessions, worker
from tools.pg_cluster import Cluster

CAP = 4
PROBE = '[probe]\ninter = "0.2s"\nfastinter = "0.1s"'
USER = """
import sys, shmpool
pool = shmpool.Pool(sys.argv[1])
with pool.connection("work", timeout=10) as conn, conn.cursor() as cur:
    cur.execute("select 1")
print("served", flush=True)
sys.stdin.readline()
"""
LOAD = """
import random, sys, shmpool
pool = shmpool.Pool(sys.argv[1])
print("ready", flush=True)
while True:
    with pool.connection("work", timeout=20) as conn, conn.cursor() as cur:
        cur.execute("select pg_sleep(%s)", (random.random() / 100,))
"""


def config(pool: str, cluster: Cluster, cap: int = CAP, extra: str = "") -> str:
    """Return a pool of one primary with one group."""
    return pool_config(
        pool,
        {"pg1": endpoint_keys(cluster.primary.conninfo(), max_connections=cap)},
        {"work": f'connections = {cap}\ntarget = "primary"\nautocommit = true'},
        f"{PROBE}\n{extra}",
    )


@pytest.fixture
def coordinator(pool_name: str, cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows its endpoint, and that no worker replaces."""
    text = config(pool_name, cluster, extra="[coordinator]\nautostart = false")
    with running_coordinator(text, pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


@pytest.fixture
def known(pool_name: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """A pool without a coordinator whose file SHMPOOL_CONFIG names; it lingers for half a second."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pool.toml"
        path.write_text(config(pool_name, cluster, extra='[coordinator]\nlinger = "500ms"'))
        monkeypatch.setenv("SHMPOOL_CONFIG", str(path))
        yield Names.of(pool_name)
        stop_coordinator(Names.of(pool_name))


# -- autostart and linger


def test_the_first_checkout_starts_a_coordinator_and_waits_for_it(known: Names) -> None:
    """With nothing there at all, a checkout within its timeout is served; one that may not wait fails at once."""
    with Pool(known.pool) as pool:
        began = time.monotonic()
        with pytest.raises(CoordinatorNotRunning):
            pool.checkout("work", timeout=0)
        assert time.monotonic() - began < 0.2
        with pool.connection("work", timeout=10) as conn:
            assert one_value(conn, "select 1") == 1
        assert serving_pid(known) is not None


def test_many_workers_start_one_coordinator_which_ends_after_the_last(known: Names) -> None:
    """Workers that begin together get the same coordinator; it stays while one lives, and goes after the last."""
    with worker(USER, known.pool) as first, worker(USER, known.pool) as second, worker(USER, known.pool) as third:
        for process in (first, second, third):
            assert read_line(process) == "served"
        pid = serving_pid(known)
        assert pid is not None
        for process in (first, second):
            process.communicate("end\n")
        time.sleep(1.2)  # more than twice its linger time: a promise about what does not happen
        assert serving_pid(known) == pid
        third.communicate("end\n")
        wait_until(lambda: serving_pid(known) is None)
        wait_until(lambda: known.leftovers() == [], what=lambda: f"nothing left, but {known.leftovers()}")


def test_workers_that_come_while_it_ends_are_served(known: Names) -> None:
    """Again and again a worker comes at about the time when the coordinator ends: none sees an error."""
    for number in range(6):
        with Pool(known.pool) as pool, pool.connection("work", timeout=15) as conn:
            assert one_value(conn, "select 1") == 1
        time.sleep(0.35 + 0.1 * number)  # from before the end to after it: half a second, looked at every second


def test_an_attached_worker_restarts_a_dead_coordinator(known: Names) -> None:
    """A worker that is served without one replaces a killed coordinator after a while, without a checkout."""
    with Pool(known.pool) as pool:
        with pool.connection("work", timeout=10) as conn:
            assert one_value(conn, "select 1") == 1
            pid = serving_pid(known)
            assert pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: serving_pid(known) not in (None, pid), within=20)
        with pool.connection("work") as conn:
            assert one_value(conn, "select 1") == 1


def test_a_start_that_fails_is_told_and_not_tried_by_every_checkout(known: Names) -> None:
    """A file with an error is named in the error; for some seconds no further checkout pays for it."""
    path = Path(os.environ["SHMPOOL_CONFIG"])
    good = path.read_text()
    path.write_text(good + "\nnonsense = 1\n")
    with Pool(known.pool) as pool:
        with pytest.raises(CoordinatorNotRunning, match="nonsense"):
            pool.checkout("work", timeout=10)
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(CoordinatorNotRunning, match="nonsense"):
                pool.checkout("work", timeout=10)
        assert time.monotonic() - began < 1
        path.write_text(good)


def test_it_is_started_from_a_process_that_forks_and_leaves_no_zombie(known: Names) -> None:
    """A master that uses the pool by accident has no child afterwards, so its own waiting finds nothing strange."""
    program = (
        "import os, sys, shmpool, time\n"
        "pool = shmpool.Pool(sys.argv[1])\n"
        "with pool.connection('work', timeout=10): pass\n"
        "for _ in range(200):\n"
        "    try: os.waitpid(-1, os.WNOHANG)\n"
        "    except ChildProcessError: print('no child', flush=True); break\n"
        "    time.sleep(0.02)\n"
        "sys.stdin.readline()\n"
    )
    with worker(program, known.pool) as process:
        assert read_line(process) == "no child"


# -- names removed under a running pool


def remove_segment(segment: Segment) -> None:
    """As a cleaner does."""
    segment.names.segment.unlink()


def remove_lock(segment: Segment) -> None:
    """As a cleaner does."""
    segment.names.lock.unlink()


def remove_bell(segment: Segment) -> None:
    """As a cleaner does."""
    assert segment.words[segment.layout.at(GROUPS, 0, "in_use")]
    segment.names.semaphore_path(segment.token, "b", 0).unlink()


@pytest.mark.parametrize("remove", [remove_segment, remove_lock, remove_bell])
def test_a_removed_name_ends_the_coordinator_and_workers_finish(
    coordinator: CoordinatorProcess, cluster: Cluster, remove: Callable[[Segment], None]
) -> None:
    """It ends within about a second, loudly; what is in use is finished and closed, then checkouts say what is wrong.

    A coordinator that starts again refuses to while a connection is held, and serves once it is given back.
    """
    names = coordinator.names
    segment = coordinator.attach()
    try:
        with Pool(names.pool) as pool:
            conn = pool.checkout("work")
            remove(segment)
            began = time.monotonic()
            assert coordinator.wait(5) == 3
            assert time.monotonic() - began < 2.5
            assert segment.state.name == "RETIRED"
            assert "retired" in coordinator.log
            assert one_value(conn, "select 1") == 1
            with pytest.raises(CoordinatorNotRunning):
                pool.checkout("work", timeout=0.3)
            if remove is not remove_lock:  # what a worker holds through a removed lock file, its pid tells
                coordinator.start(is_expected_to_serve=False)
                assert coordinator.wait() == 1
                assert "still" in coordinator.log
            pool.checkin(conn)
            wait_until(lambda: not sessions(cluster.primary, names.pool))
            coordinator.start()
            with pool.connection("work", timeout=5) as conn:
                assert one_value(conn, "select 1") == 1
    finally:
        segment.release()


def test_a_removed_socket_is_made_again(coordinator: CoordinatorProcess) -> None:
    """A coordinator whose socket alone was removed listens again within about a second, and goes on."""
    coordinator.names.socket.unlink()
    with pytest.raises(ControlError):
        coordinator.request("info")
    wait_until(coordinator.names.socket.exists, within=3)
    assert coordinator.request("info")["pid"] == coordinator.pid
    assert "made again" in coordinator.log


# -- repair


def test_repair_brings_status_back_to_fine(coordinator: CoordinatorProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """A permit that somebody posted shows up in status and stays, until `shmpool repair --yes` takes it away."""
    names = coordinator.names
    segment = coordinator.attach()
    permit = Semaphore(names.semaphore(segment.token, "g", 0))
    try:
        permit.release()
        wait_until(lambda: "audit-out-of-bounds" in {f.code for f in observe(names).findings})
        assert main(["repair", names.pool]) == 1
        assert "would repair: group work: issued 4, value 5" in capsys.readouterr().out
        assert permit.value == CAP + 1
        assert main(["repair", names.pool, "--yes"]) == 0
        assert permit.value == CAP
        wait_until(lambda: observe(names).level == 0, what=lambda: str(observe(names).findings))
        assert "repair: group work" in coordinator.log
        assert main(["repair", names.pool]) == 0
        coordinator.terminate()
        assert main(["repair", names.pool]) == 2
    finally:
        permit.close()
        segment.release()


# -- adoption


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_coordinators_killed_in_the_middle_of_everything(
    coordinator: CoordinatorProcess, cluster: Cluster, seed: int
) -> None:
    """Under load, with workers killed and caps changing, coordinators are killed at random moments.

    No session too many at the server, no invariant broken, no permit missing at the end.
    """
    names, chance = coordinator.names, random.Random(seed)
    most_allowed = CAP + 2
    seen: list[int] = []
    violations: list[str] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(0.01):
            seen.append(len(sessions(cluster.primary, names.pool)))
            report = observe(names)
            violations.extend(report.violations)

    sampler = threading.Thread(target=sample)
    sampler.start()
    workers: list[subprocess.Popen[str]] = []
    kills = 0

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    try:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            while len(workers) < 4:
                workers.append(run_python(LOAD, names.pool))
            cap = chance.choice([1, 2, CAP, CAP + 2])
            text = config(names.pool, cluster, cap, "[coordinator]\nautostart = false")
            coordinator.config.write_text(text)
            coordinator.signal(signal.SIGHUP)
            if chance.random() < 0.6:
                end(workers.pop(0))
            time.sleep(chance.random() * 0.15)
            coordinator.kill()
            kills += 1
            coordinator.start()
    finally:
        for process in workers:
            end(process)
        is_over.set()
        sampler.join()
    coordinator.config.write_text(config(names.pool, cluster, extra="[coordinator]\nautostart = false"))
    coordinator.request("reload")
    wait_until(lambda: is_whole(names.pool), within=15, what=lambda: f"all back, but {observe(names)}")
    assert all(group.issued == CAP for group in observe(names).groups)
    assert kills >= 4
    assert max(seen) <= most_allowed
    assert violations == []


def test_a_pool_outlives_its_coordinators_without_a_failed_checkout(coordinator: CoordinatorProcess) -> None:
    """While coordinators are killed and replaced, an attached worker is served without an error."""
    names = coordinator.names
    errors: list[str] = []
    is_over = threading.Event()
    with pool_of(names.pool) as pool:

        def load() -> None:
            while not is_over.is_set():
                try:
                    with pool.connection("work", timeout=10) as conn:
                        one_value(conn, "select 1")
                except PoolError as error:
                    errors.append(repr(error))

        thread = threading.Thread(target=load)
        thread.start()
        for _ in range(4):
            coordinator.kill()
            coordinator.start()
        is_over.set()
        thread.join()
    assert errors == []
