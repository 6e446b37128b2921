"""Containers that share only /dev/shm: workers in two of them and the coordinator in a third are one budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool.launch import serving_pid
from shmpool.observation import observe
from shmpool.status import Report, RowState
from tests.integration.containers.conftest import CAP, PASSWORD, RUN, Host, running_host
from tests.support.containers import FILES, PYTHON, Container
from tests.support.waiting import wait_until
from tests.support.workers import is_connected, is_whole, sessions
from tools.pg_cluster import Server

BACK_S = 2.0  # a dead worker's permits


@pytest.fixture(params=["user namespaces", "root"])
def host(request: pytest.FixtureRequest, pool_name: str, guarded: Server, tmp_path: Path) -> Iterator[Host]:
    """A host for containers such as every user may make them, and such as only root may."""
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("only root makes containers without a user namespace")
    with running_host(pool_name, guarded, tmp_path, has_user_namespaces=request.param != "root") as made:
        yield made


def held_by_the_living(report: Report) -> list[tuple[int, int]]:
    """Return pid and number of connections of each worker that a report knows to live."""
    return sorted((row.pid, row.held) for row in report.workers if row.state is RowState.HELD)


def status_in(container: Container, pool: str) -> tuple[int, dict[str, Any]]:
    """Return what `shmpool status` says in a container: exit code and document."""
    code, text = container.output(*PYTHON, "shmpool.cli", "status", pool, "--json")
    return code, json.loads(text)


def test_workers_of_two_containers_share_one_budget(host: Host) -> None:
    """Both have pid 1 and cannot see each other; together they hold the cap, and everybody's status agrees."""
    third = host.coordinator()
    (_, a), (_, b) = host.worker(), host.worker()
    who = [a.ask("who"), b.ask("who")]
    assert [each["pid"] for each in who] == [1, 1]
    assert who[0]["namespace"] != who[1]["namespace"]
    assert all(each["processes"] == [1] for each in who)
    a.ask("hold", group="read", count=3)
    b.ask("hold", group="read", count=CAP - 3)
    with pytest.raises(AssertionError, match="PoolTimeout"):
        b.ask("hold", group="read", count=1, timeout=0.2)
    assert len(sessions(host.server, host.names.pool)) == CAP
    assert held_by_the_living(observe(host.names)) == [(1, CAP - 3), (1, 3)]
    code, told = status_in(third, host.names.pool)
    assert [row["state"] for row in told["workers"] if row["held"]] == ["held", "held"]
    assert (code, told["coordinator"]["pid"], told["violations"]) == (0, 1, [])
    a.ask("release")
    b.ask("hold", group="read", count=3)


def test_caps_hold_at_the_server_under_load_from_both(host: Host) -> None:
    """Never more sessions than the cap, both containers are served, and nothing is missing afterwards."""
    host.coordinator()
    answers: list[dict[str, Any]] = []

    def load(worker: Any) -> None:
        answers.append(worker.ask("load", group="read", threads=4, seconds=1.0))

    threads = [threading.Thread(target=load, args=(host.worker()[1],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(sessions(host.server, host.names.pool)))
    for thread in threads:
        thread.join()
    assert 0 < most <= CAP
    assert [answer["errors"] for answer in answers] == [[], []]
    assert all(min(answer["served"]) > 0 for answer in answers)
    wait_until(lambda: is_whole(host.names.pool))


def test_dead_workers_of_each_container_are_told_from_the_living(host: Host) -> None:
    """One is killed beside its container's first process, another with its whole container in the middle of a query:
    what they held is back within seconds, though live processes elsewhere have the same pids."""
    host.coordinator()
    (box, a), (doomed, b) = host.worker(), host.worker()
    a2, b2 = host.worker_beside(box), host.worker_beside(doomed)
    twin = a2.ask("who")["pid"]
    assert b2.ask("who")["pid"] == twin
    kept = a.ask("hold", group="read", count=1)
    gone = a2.ask("hold", group="read", count=2)
    b2.ask("hold", group="read", count=1)
    (busy,) = b.ask("hold", group="read", count=1)

    a2.kill()
    wait_until(lambda: held_by_the_living(observe(host.names)) == [(1, 1), (1, 1), (twin, 1)], within=BACK_S)
    wait_until(lambda: not any(is_connected(host.server, pid) for pid in gone), within=BACK_S)
    assert len(a.ask("hold", group="read", count=2, timeout=BACK_S)) == 3

    b.ask("sleep")
    wait_until(lambda: host.server.execute(f"SELECT 1 FROM pg_stat_activity WHERE pid = {busy} AND state = 'active'"))
    doomed.kill()
    wait_until(lambda: held_by_the_living(observe(host.names)) == [(1, 3)], within=BACK_S)
    assert len(a.ask("hold", group="read", count=2, timeout=BACK_S)) == CAP
    assert a.ask("select")[:1] == kept
    assert len(sessions(host.server, host.names.pool)) == CAP


def test_coordinator_is_replaced_by_one_in_another_container(host: Host) -> None:
    """What workers hold is theirs across the death of the coordinator's container; the next one adopts, and reaps."""
    first = host.coordinator()
    (_, a), (doomed, b) = host.worker(), host.worker()
    kept = a.ask("hold", group="read", count=2)
    b.ask("hold", group="read", count=2)
    first.kill()
    doomed.kill()
    assert a.ask("hold", group="read", count=1)[:2] == kept
    host.container(*PYTHON, *RUN)
    wait_until(lambda: "segment adopted" in host.log.read_text(), within=5)
    assert held_by_the_living(observe(host.names)) == [(1, 3)]
    assert len(a.ask("hold", group="read", count=2, timeout=BACK_S)) == CAP


def test_coordinator_is_stopped_from_outside_its_container(host: Host) -> None:
    """`stop` waits for the end of a coordinator whose pid means something else where it is called."""
    host.coordinator()
    command = [sys.executable, "-m", "shmpool_coordinator", "stop", host.names.pool]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=5)
    assert done.stdout == f"pool {host.names.pool}: pid 1 ended\n"
    assert not host.names.leftovers()


def test_nothing_but_shared_memory_has_to_be_writable(host: Host) -> None:
    """On a read-only root a worker starts a coordinator on demand; both read the password from a read-only mount."""
    _, worker = host.worker(f"SHMPOOL_CONFIG={FILES}/pool.toml")
    assert worker.ask("writable") == ["/dev/shm"]
    worker.ask("hold", group="read", count=2)
    coordinator = serving_pid(host.names)
    assert coordinator
    assert os.stat(f"/proc/{coordinator}/ns/pid").st_ino == worker.ask("who")["namespace"]
    (host.files / "password").write_text("outdated")
    with pytest.raises(AssertionError, match="password authentication failed") as caught:
        worker.ask("hold", group="read", count=1, timeout=1.0)
    assert "outdated" not in str(caught.value)
    assert PASSWORD.encode() not in host.names.segment.read_bytes()


@pytest.mark.parametrize("size", ["64k", "776k"], ids=["no room for the segment", "no room for the semaphores"])
def test_small_shared_memory_is_a_clear_error(host: Host, size: str) -> None:
    """The coordinator says what it needs and what to do; it leaves nothing, and no SIGBUS ends it."""
    script = f'{" ".join((*PYTHON, *RUN))}; echo "exit $?"; ls -A /dev/shm'
    container = host.container("sh", "-c", script, shm=f"size={size}", stdout=subprocess.PIPE)
    printed, _ = container.process.communicate(timeout=10)
    assert printed.decode().splitlines() == ["exit 1"]
    error = host.log.read_text()
    assert ("786432 bytes, 65536 are free" if size == "64k" else "no page or no inode is left") in error
    assert "enlarge /dev/shm" in error
    assert not host.names.leftovers()
