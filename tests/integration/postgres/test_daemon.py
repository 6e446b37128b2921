"""The coordinator as a process, against real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from shmpool import semaphores
from shmpool.layout import ENDPOINTS, HEADER, PERMITS, SLOTS
from shmpool.names import Names
from shmpool.rows import Locks, take_row
from shmpool.segment import Segment, private_page
from shmpool.slots import EndpointPermits, GroupPermits, Outcome, SlotTable
from shmpool.states import Health, Role, Use
from shmpool.words import Control, Status, UseWord
from tests.support.coordinator import (
    CoordinatorProcess,
    endpoint_keys,
    pool_config,
    running_coordinator,
)
from tests.support.waiting import wait_until
from tools.pg_cluster import Cluster

PROBE = '[probe]\ninter = "0.2s"\nfastinter = "0.1s"'


def config(pool: str, cluster: Cluster, connections: int = 5, extra: str = "") -> str:
    """Return a pool of a primary and a standby with one group."""
    return pool_config(
        pool,
        {
            "pg1": endpoint_keys(cluster.primary.conninfo()),
            "pg2": endpoint_keys(cluster.standbys[0].conninfo()),
        },
        {"read": f"connections = {connections}"},
        f"{PROBE}\n{extra}",
    )


@pytest.fixture
def coordinator(pool_name: str, cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A running coordinator."""
    with running_coordinator(config(pool_name, cluster), pool_name) as process:
        yield process


def status(segment: Segment, index: int) -> Status:
    """Return an endpoint's status."""
    return Status.of(segment.words[segment.layout.at(ENDPOINTS, index, "status")])


def control(segment: Segment, group: int = 0) -> Control:
    """Return a group's control word."""
    return Control.of(segment.words[segment.layout.at(PERMITS, group, "control")])


def both_up(segment: Segment) -> bool:
    """Whether both endpoints are UP with their roles."""
    roles = [(s.health, s.role) for s in (status(segment, 0), status(segment, 1))]
    return roles == [(Health.UP, Role.PRIMARY), (Health.UP, Role.REPLICA)]


def test_status_words_become_up_with_roles(coordinator: CoordinatorProcess) -> None:
    """A fresh pool knows health and role of every endpoint within a moment, and what it saw of them."""
    segment = coordinator.attach()
    wait_until(lambda: both_up(segment), what=lambda: coordinator.log)
    at = segment.layout.at(ENDPOINTS, 1)
    assert segment.words[at + ENDPOINTS.column("timeline")] == 1
    wait_until(lambda: segment.times[at + ENDPOINTS.column("lag")] == 0.0)
    assert control(segment) == Control(5, 5, 0)
    segment.release()


def test_successor_adopts_after_a_kill(coordinator: CoordinatorProcess) -> None:
    """A killed coordinator's segment is adopted whole: same inode, same permits, same health."""
    segment = coordinator.attach()
    wait_until(lambda: both_up(segment))
    epoch = status(segment, 0).epoch
    coordinator.kill()
    coordinator.start()
    assert segment.header("coordinator_adoptions") == 2
    assert segment.is_in_place()
    assert both_up(segment)
    assert status(segment, 0).epoch == epoch
    before = segment.times[segment.layout.at(HEADER, 0, "heartbeat")]
    wait_until(lambda: segment.times[segment.layout.at(HEADER, 0, "heartbeat")] > before)
    assert control(segment) == Control(5, 5, 0)
    segment.release()


@pytest.mark.parametrize("how", ["request", "signal"])
def test_reload_changes_a_cap(coordinator: CoordinatorProcess, cluster: Cluster, how: str) -> None:
    """A changed cap grows and shrinks while the pool runs."""
    segment = coordinator.attach()
    for cap in (9, 2):
        coordinator.config.write_text(config(coordinator.names.pool, cluster, cap))
        if how == "request":
            assert any(f"->{cap} connections" in change for change in coordinator.request("reload")["changes"])
        else:
            coordinator.signal(signal.SIGHUP)
        wait_until(lambda cap=cap: control(segment) == Control(cap, cap, 0))  # type: ignore[misc]
        assert segment.read_settings()[1].groups[0].connections == cap
    segment.release()


def test_bad_reload_changes_nothing_and_says_why(coordinator: CoordinatorProcess) -> None:
    """A file with an error leaves the running configuration as it was."""
    segment = coordinator.attach()
    before = segment.read_settings()
    coordinator.config.write_text(coordinator.config.read_text() + "\nnonsense = 1\n")
    coordinator.signal(signal.SIGHUP)
    wait_until(lambda: "nothing changed" in coordinator.log)
    assert "nonsense" in coordinator.log
    assert segment.read_settings() == before
    assert coordinator.is_running
    segment.release()


def test_clean_end_leaves_nothing(coordinator: CoordinatorProcess) -> None:
    """SIGTERM without workers removes every name of the pool."""
    assert coordinator.names.leftovers()
    assert coordinator.terminate() == 0
    assert coordinator.names.leftovers() == []


def test_second_instance_is_refused(coordinator: CoordinatorProcess) -> None:
    """A second coordinator says which one runs, and with which file."""
    second = subprocess.run(
        [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(coordinator.config)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 4
    assert f"already running, pid {coordinator.pid}, with config {coordinator.config}" in second.stderr
    assert coordinator.answers()


def test_lingers_and_ends(pool_name: str, cluster: Cluster) -> None:
    """A coordinator that was started on demand ends itself after a while without workers."""
    with running_coordinator(config(pool_name, cluster), pool_name, "--linger", "500ms") as process:
        assert process.wait() == 0
        assert process.names.leftovers() == []


def test_removed_name_retires_the_segment(coordinator: CoordinatorProcess) -> None:
    """A cleaner that removes a name ends the coordinator loudly, with the segment retired."""
    segment = coordinator.attach()
    Path(coordinator.names.segment).unlink()
    assert coordinator.wait() == 3
    assert segment.state.name == "RETIRED"
    assert "leads elsewhere" in coordinator.log
    segment.release()


def work(names: Names, conninfo: str, ready: int) -> None:
    """Take a row, claim a permit pair and hold a busy server session (in a child process)."""
    segment = _attached(names)
    locks = Locks(names, segment.header("lock_inode"))
    row = take_row(segment, locks)
    table = SlotTable(segment, private_page())
    table.add_row(row)

    def semaphore(kind: str) -> semaphores.Semaphore:
        return semaphores.Semaphore(names.semaphore(segment.token, kind, 0))

    bell, endpoint_bell = semaphore("b"), semaphore("w")
    group = GroupPermits(segment, 0, semaphore("g"), bell, endpoint_bell)
    endpoint = EndpointPermits(segment, 0, semaphore("e"), [endpoint_bell])
    token = table.take(group)
    assert table.claim(token, group, [endpoint]) is Outcome.GRANTED
    place = token.number % segment.layout.slots_per_worker
    name = f"test shmpool:{names.pool}:{row.number}.{row.generation}:{place}"
    connection = psycopg2.connect(f"{conninfo} application_name='{name}'")
    segment.words[token.detail_at + SLOTS.column("backend_pid")] = connection.get_backend_pid()
    segment.words[token.use_at] = UseWord(Use.ACTIVE, 0).word()
    os.write(ready, b"1")
    connection.cursor().execute("SELECT pg_sleep(600)")


def _attached(names: Names) -> Segment:
    from shmpool import segment

    return segment.attach(names)


def forked(task: Callable[[int], None]) -> int:
    """Run a task in a child until it says that it is ready; return the child's pid."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            task(write_fd)
        finally:
            os._exit(1)
    os.close(write_fd)
    assert os.read(read_fd, 1) == b"1"
    os.close(read_fd)
    return pid


def test_killed_workers_busy_session_is_ended_before_its_permit_returns(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """A worker killed in the middle of a long query: its backend is ended, then the endpoint permit is free again."""
    names = coordinator.names
    pid = forked(lambda ready: work(names, cluster.primary.conninfo(), ready))
    segment = coordinator.attach()
    permit = semaphores.Semaphore(names.semaphore(segment.token, "e", 0))
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE application_name ~ 'shmpool:{names.pool}:0'"
    assert permit.value == 19
    assert cluster.primary.execute(sessions) == [(1,)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: permit.value == 20, within=10, what=lambda: coordinator.log)
    assert cluster.primary.execute(sessions) == [(0,)]
    assert "ending session" in coordinator.log
    permit.close()
    segment.release()


def test_end_with_live_workers_leaves_the_segment(coordinator: CoordinatorProcess, cluster: Cluster) -> None:
    """SIGTERM while a worker lives leaves all for the next coordinator, which adopts it."""
    names = coordinator.names
    pid = forked(lambda ready: work(names, cluster.primary.conninfo(), ready))
    try:
        assert coordinator.terminate() == 0
        assert names.segment.exists()
        assert not names.socket.exists()
        coordinator.start()
        segment = coordinator.attach()
        assert segment.header("coordinator_adoptions") == 2
        segment.release()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_detached_coordinator_has_its_own_session(pool_name: str, cluster: Cluster, tmp_path: Path) -> None:
    """With --detach the command returns once the pool is ready, and the coordinator lives in a session of its own."""
    path = tmp_path / "pool.toml"
    path.write_text(config(pool_name, cluster))
    command = [sys.executable, "-m", "shmpool_coordinator"]
    started = [*command, "run", "--detach", "--config", str(path), "--linger", "20s"]
    subprocess.run(started, check=True, timeout=20, capture_output=True)
    info = subprocess.run([*command, "info", pool_name], check=True, timeout=20, capture_output=True, text=True)
    pid = int(info.stdout.split("pid: ")[1].split()[0])
    assert os.getsid(pid) != os.getsid(0)
    again = subprocess.run(started, check=False, timeout=20, capture_output=True, text=True)
    assert again.returncode == 4
    assert f"already running, pid {pid}" in again.stderr
    subprocess.run([*command, "stop", pool_name], check=True, timeout=20, capture_output=True)
    assert Names.of(pool_name).leftovers() == []
