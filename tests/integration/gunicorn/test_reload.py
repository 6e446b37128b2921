"""Gunicorn's reloads and upgrades under load, with as many connections as workers: too few for old and new together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool.control_client import request
from shmpool.rows import start_time
from tests.support.gunicorn import Clients, GunicornServer, running_gunicorn
from tests.support.reloads import Reloads, TightRole, tight_config, under_load
from tests.support.waiting import wait_until
from tools.pg_cluster import Server

WORKERS = 4
CLASSES = {"sync": (), "gthread": ("--worker-class", "gthread", "--threads", "2")}
# WINCH is for daemons: these are such ones that keep log and parent.
DAEMONS = """
from shmpool.hooks import gunicorn as shmpool_hooks
from shmpool.hooks.gunicorn import *

def be_daemon(server):
    server.cfg.set("daemon", True)

on_starting = shmpool_hooks.chain(shmpool_hooks.on_starting, be_daemon)
"""
STUCK = "SELECT pg_sleep(60%"


@pytest.fixture
def role(primary: Server, pool_name: str) -> Iterator[TightRole]:
    """What the pool works as."""
    with TightRole(primary, pool_name, WORKERS) as made:
        yield made


@pytest.mark.parametrize("preload", [False, True], ids=["plain", "preload"])
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_hup_fails_no_request_and_keeps_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path, worker_class: str, preload: bool
) -> None:
    """All new workers start before the old ones end; together they have no more sessions than there are workers."""
    options = ("--workers", str(WORKERS), *CLASSES[worker_class], *["--preload"] * preload)
    with running_gunicorn(tmp_path, pool_name, tight_config(pool_name, role), *options) as server:
        with under_load(server, role, f"HUP, {worker_class}{', preload' * preload}") as reloads:
            for _ in range(2):
                reloads.watch.begin()
                server.reload()
                reloads.wait_for_more()
        assert reloads.clients.failures == []
        assert ended_in_order(server)
    assert "Traceback" not in server.log


def ended_in_order(server: GunicornServer) -> bool:
    """Whether no worker left anything to the coordinator."""
    coordinator = server.status().coordinator
    return coordinator is not None and coordinator.reaped_rows == 0


def upgrade(reloads: Reloads, server: GunicornServer, *, stuck: int = 0) -> int:
    """USR2; return the old master's pid once all workers have answered, old ones last, but for those that are stuck."""
    reloads.watch.begin()
    old_workers = server.workers()
    old = server.upgrade()
    for workers, silent in ((server.workers(), 0), (old_workers, stuck)):
        reloads.clients.workers.clear()
        reloads.wait_until(lambda w=workers, n=silent: len(w - reloads.clients.workers) <= n)  # type: ignore[misc]
    return old


def end_by(reloads: Reloads, pid: int, *numbers: signal.Signals) -> None:
    """Send signals to a master, the last of which ends it; return after further requests."""
    for number in numbers:
        os.kill(pid, number)
        reloads.wait_for_more()
    reloads.wait_until(lambda: start_time(pid) is None)
    reloads.wait_for_more()


@pytest.mark.parametrize(("worker_class", "per_worker_min"), [("sync", 1), ("gthread", 0)])
def test_usr2_fails_no_request_and_keeps_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path, worker_class: str, per_worker_min: int
) -> None:
    """Two masters serve with one coordinator, none of the workers starves, then the old one's end, then that master."""
    options = ("--workers", str(WORKERS), *CLASSES[worker_class])
    config = tight_config(pool_name, role, per_worker_min=per_worker_min)
    with running_gunicorn(tmp_path, pool_name, config, *options, hooks=DAEMONS) as server:
        with under_load(server, role, f"USR2, WINCH, TERM, {worker_class}") as reloads:
            coordinator = request(server.names, "info")["pid"]
            end_by(reloads, upgrade(reloads, server), signal.SIGWINCH, signal.SIGTERM)
            assert request(server.names, "info")["pid"] == coordinator
        assert reloads.clients.failures == []
        assert ended_in_order(server)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_an_upgrade_taken_back_fails_no_request_and_keeps_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path, worker_class: str
) -> None:
    """The old master's workers end, it starts others, and the new master ends: these others are the newest."""
    options = ("--workers", str(WORKERS), *CLASSES[worker_class])
    config = tight_config(pool_name, role)
    with running_gunicorn(tmp_path, pool_name, config, *options, hooks=DAEMONS) as server:
        with under_load(server, role, f"USR2, WINCH, HUP, {worker_class}") as reloads:
            old = upgrade(reloads, server)
            new, server.pid = server.pid, old
            os.kill(old, signal.SIGWINCH)
            reloads.wait_until(lambda: not server.workers())
            reloads.watch.begin()
            os.kill(old, signal.SIGHUP)
            reloads.wait_until(lambda: len(server.workers()) == WORKERS)
            reloads.wait_for_more()
            end_by(reloads, new, signal.SIGTERM)
        assert reloads.clients.failures == []
        assert ended_in_order(server)
    assert "Traceback" not in server.log


def test_a_worker_that_outlives_its_grace_is_killed_within_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path
) -> None:
    """An old worker in the middle of a long query is killed: only its own request fails, its session goes first."""
    options = ("--workers", str(WORKERS), "--graceful-timeout", "1")
    with running_gunicorn(tmp_path, pool_name, tight_config(pool_name, role), *options) as server:
        with (
            under_load(server, role, "USR2, a worker killed in a query") as reloads,
            Clients(server, "/slow?ms=60000", 1, often=False) as stuck,
        ):
            wait_until(lambda: role.queries(STUCK) == 1)
            end_by(reloads, upgrade(reloads, server, stuck=1), signal.SIGTERM)
            wait_until(lambda: stuck.failures)
        assert reloads.clients.failures == []
        assert role.queries(STUCK) == 0
    assert "Traceback" not in server.log
