"""Gunicorn with one import in its configuration: real masters, workers, servers; test_reload.py has its reloads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool.control_client import request
from shmpool.rows import start_time
from shmpool.states import ServerKind
from shmpool.status import RowState
from tests.support.gunicorn import Clients, GunicornServer, Sampler, example_config, guest_book, running_gunicorn
from tests.support.waiting import wait_until
from tests.support.workers import sessions
from tools.pg_cluster import Cluster

CAP = 3


@pytest.fixture(scope="module")
def servers(cluster: Cluster) -> Iterator[Cluster]:
    """A primary and a standby with the guest book's table."""
    with guest_book(cluster):
        yield cluster


@pytest.mark.parametrize("preload", [False, True], ids=["plain", "preload"])
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_reads_reach_the_replica_and_writes_the_primary(
    servers: Cluster, pool_name: str, tmp_path: Path, worker_class: str, preload: bool
) -> None:
    """One import serves both worker classes, with and without preloading."""
    options = ["--workers", "2", "--worker-class", worker_class, *(["--preload"] if preload else [])]
    if worker_class == "gthread":
        options += ["--threads", "4"]
    with running_gunicorn(tmp_path, pool_name, example_config(pool_name, servers), *options) as server:
        written = server.request("/entries", form="name=Ann&said=<hello>")
        assert (written[0], written[1]["role"]) == (201, "primary")
        wait_until(lambda: {"name": "Ann", "said": "<hello>"} in server.request("/")[1]["entries"])
        assert server.request("/")[1]["role"] == "replica"
        server.use_all_workers()
        assert len(set(server.rows().values())) == 1, "workers of one start have one server generation"
        held = [w for w in server.status().workers if w.state is RowState.HELD]
        assert {(w.server, w.server_pid) for w in held} == {(ServerKind.GUNICORN, server.pid)}
        assert server.is_whole()
        assert server.status().violations == ()
    assert "Traceback" not in server.log


def test_the_cap_of_a_group_holds_across_workers_and_threads(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Sixteen threads in two workers never have more sessions at the servers than the group's cap."""
    config = example_config(pool_name, servers, read=CAP)
    options = ("--workers", "2", "--worker-class", "gthread", "--threads", "8")
    with running_gunicorn(tmp_path, pool_name, config, *options) as server:
        with Sampler(servers, pool_name) as sampler, Clients(server, "/slow?ms=10", 16) as clients:
            wait_until(lambda: clients.served > 300 and sampler.samples > 50, within=30)
        assert clients.failures == []
        assert sampler.most == CAP


def test_a_killed_workers_permits_return_and_its_replacement_works(
    servers: Cluster, pool_name: str, tmp_path: Path
) -> None:
    """SIGKILL costs no permit."""
    with running_gunicorn(tmp_path, pool_name, example_config(pool_name, servers), "--workers", "2") as server:
        server.use_all_workers()
        victim = server.kill_worker()
        wait_until(lambda: victim not in server.rows() and server.is_whole(), within=10, what=lambda: server.log)
        wait_until(lambda: len(server.workers()) == 2, within=10)
        server.use_all_workers()
        assert server.status().violations == ()
    assert "Traceback" not in server.log


def test_a_preloading_master_gives_back_what_it_opened(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """An application that queries at import leaves nothing with the master, and the log says who did it."""
    (tmp_path / "eager.py").write_text("from app import application, read_entries\nread_entries()\n")
    config = tmp_path / "before.toml"
    config.write_text(example_config(pool_name, servers))
    # With --preload the application is imported before any hook runs: the coordinator must be there already.
    hooks = (
        f"from shmpool.launch import ensure_coordinator\nensure_coordinator({str(config)!r})\n"
        "from shmpool.hooks.gunicorn import *\n"
    )
    options = ("--workers", "2", "--preload")
    with running_gunicorn(
        tmp_path, pool_name, config.read_text(), *options, hooks=hooks, app="eager:application"
    ) as server:
        server.use_all_workers()
        assert server.pid not in server.rows()
        assert "gave back 1 idle connections" in server.log
        assert "in read_entries" in server.log, "the log says who attached it"
        assert server.is_whole()


def test_a_worker_that_ends_in_order_gives_back_everything(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """With --max-requests workers come and go under load: no request fails, and none of them needs the reaper."""
    options = ("--workers", "2", "--max-requests", "20")
    with running_gunicorn(tmp_path, pool_name, example_config(pool_name, servers, read=CAP), *options) as server:
        first = server.workers()
        with Sampler(servers, pool_name) as sampler, Clients(server, "/slow?ms=5", 4) as clients:
            wait_until(lambda: clients.served > 200 and not server.workers() & first, within=20)
        assert clients.failures == []
        assert sampler.most <= CAP
        wait_until(server.is_whole)
        coordinator = server.status().coordinator
        assert coordinator is not None
        assert coordinator.reaped_rows == 0


def stuck_sessions(cluster: Cluster, pool: str) -> set[int]:
    """Return the server processes in the middle of a pool's long query."""
    query = (
        f"SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%shmpool:{pool}:%' "
        "AND state = 'active' AND query LIKE 'SELECT pg_sleep(60%'"
    )
    return {pid for server in cluster.servers for (pid,) in server.execute(query)}


def test_a_worker_that_times_out_in_a_query_leaves_no_session(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Gunicorn aborts and kills a stuck worker: its session at the server ends within a second, all permits return."""
    config = example_config(pool_name, servers, read=CAP)
    options = ("--workers", "2", "--timeout", "2")
    with (
        running_gunicorn(tmp_path, pool_name, config, *options) as server,
        Sampler(servers, pool_name) as sampler,
        Clients(server, "/slow?ms=60000", 1, often=False) as stuck,
        Clients(server, "/slow?ms=5", 2) as others,
    ):
        wait_until(lambda: stuck_sessions(servers, pool_name), within=10, what=lambda: server.log)
        victim = holder_of(stuck_sessions(servers, pool_name), server)
        wait_until(lambda: start_time(victim) is None, within=10, every=0.005, what=lambda: server.log)
        died = time.monotonic()
        wait_until(lambda: not stuck_sessions(servers, pool_name), every=0.005)
        ended_s = time.monotonic() - died
        wait_until(lambda: victim not in server.rows() and server.has_no_orphans(), every=0.005)
        back_s = time.monotonic() - died
        assert ended_s < 1, f"the session ended {ended_s:.3f} s after its worker"
        assert back_s < 1, f"its permits were back {back_s:.3f} s after its worker's end"
        seen = others.served
        wait_until(lambda: others.served > seen + 50, within=10)
    print(f"\nworker killed at its timeout: session gone after {ended_s * 1000:.0f} ms, permits {back_s * 1000:.0f} ms")
    assert len(stuck.failures) == 1
    assert others.failures == []
    assert sampler.most <= CAP
    assert f"WORKER TIMEOUT (pid:{victim})" in server.log


def holder_of(sessions: set[int], server: GunicornServer) -> int:
    """Return the pid of the worker that holds the only one of these sessions."""
    (victim,) = {w.pid for w in server.status().workers for slot in w.slots if slot.backend_pid in sessions}
    return victim


def test_a_killed_masters_workers_leave_nothing(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """SIGKILL of the master under load: its workers end when they notice, the coordinator follows, nothing is left."""
    config = example_config(pool_name, servers, read=CAP, linger="1s")
    with (
        running_gunicorn(tmp_path, pool_name, config, "--workers", "2", "--timeout", "2") as server,
        Sampler(servers, pool_name) as sampler,
    ):
        server.use_all_workers()
        coordinator = request(server.names, "info")["pid"]
        workers = server.workers()
        with Clients(server, "/slow?ms=5", 4) as clients:
            wait_until(lambda: clients.served > 50, within=10)
            os.kill(server.pid, signal.SIGKILL)
            seen = clients.served
            wait_until(lambda: clients.served > seen + 20, within=10)  # a busy sync worker does not look up
        wait_until(lambda: not any(start_time(pid) for pid in workers), within=10, what=lambda: server.log)
        wait_until(lambda: start_time(coordinator) is None, within=10)
        assert server.names.leftovers() == []
        for postgres in servers.servers:
            assert sessions(postgres, pool_name) == []
    assert sampler.most <= CAP


def test_hooks_chain_with_the_users_own(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """A chain calls both functions, and Gunicorn accepts it."""
    hooks = """
from shmpool.hooks.gunicorn import *
from shmpool.hooks.gunicorn import chain

def note(server, worker):
    server.log.info("my own hook in %d", worker.pid)

post_fork = chain(post_fork, note)
"""
    config = example_config(pool_name, servers)
    with running_gunicorn(tmp_path, pool_name, config, "--workers", "1", hooks=hooks) as server:
        server.use_all_workers()
        (worker,) = server.workers()
        assert f"my own hook in {worker}" in server.log
        assert server.rows()[worker] > 0


def test_the_coordinator_lingers_and_ends_by_itself(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Gunicorn's end stops nothing; after the linger time nothing of the pool is left."""
    config = example_config(pool_name, servers, linger="1s")
    with running_gunicorn(tmp_path, pool_name, config, "--workers", "1") as server:
        server.request("/")
        pid = request(server.names, "info")["pid"]
        server.stop()
        assert start_time(pid) is not None
        wait_until(lambda: start_time(pid) is None, within=10)
        assert server.names.leftovers() == []


def test_gunicorn_does_not_start_on_a_wrong_configuration(pool_name: str, tmp_path: Path) -> None:
    """What is wrong with the file is in Gunicorn's log."""
    with (
        pytest.raises(AssertionError, match="max_connection"),
        running_gunicorn(tmp_path, pool_name, f'name = "{pool_name}"\n[endpoints.pg1]\nmax_connection = 1\n'),
    ):
        pass


def test_a_worker_starts_a_coordinator_that_ended_unused(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Gunicorn served nobody for longer than the linger time: the first request finds a coordinator all the same."""
    config = example_config(pool_name, servers, linger="0.5s")
    with running_gunicorn(tmp_path, pool_name, config, "--workers", "2") as server:
        wait_until(lambda: server.names.leftovers() == [], within=10)
        with Clients(server, "/slow?ms=20", 4) as clients:
            wait_until(lambda: clients.served > 50, within=15)
        assert clients.failures == []
        assert len(server.rows()) > 0
