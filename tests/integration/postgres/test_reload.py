"""A reload under a worker that holds idle connections."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shmpool import Pool
from tests.support.coordinator import CoordinatorProcess, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import backend, is_connected, is_ready, pool_of, shared_config
from tools.pg_cluster import Cluster

AUTO = '[groups.auto]\nconnections = 4\ntarget = "primary"\n'


@pytest.fixture
def coordinator(pool_name: str, cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows its endpoints."""
    with running_coordinator(shared_config(pool_name, cluster), pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


def reload(coordinator: CoordinatorProcess, pool: Pool, old: str, new: str) -> None:
    """Change the configuration file, and have coordinator and worker follow."""
    text = coordinator.config.read_text()
    assert old in text
    coordinator.config.write_text(text.replace(old, new))
    assert coordinator.request("reload")["changes"]
    pool.look_after_idle()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (AUTO, AUTO.replace("4", "7")),
        (AUTO, AUTO + "timeout = 1.5\n"),
        ("max_connections = 20", "max_connections = 19\nweight = 7"),
    ],
    ids=["cap", "timeout", "endpoint"],
)
def test_what_connections_do_not_depend_on_closes_none(
    coordinator: CoordinatorProcess, cluster: Cluster, old: str, new: str
) -> None:
    """A reload that only changes a cap, a timeout or a weight leaves idle connections open, and takes effect."""
    with pool_of(coordinator.names.pool) as pool:
        with pool.connection("auto") as conn:
            pid = backend(conn)
        reload(coordinator, pool, old, new)
        assert is_connected(cluster.primary, pid)
        assert pool.statistics()["auto"]["idle"] == 1
        with pool.connection("auto") as conn:
            assert backend(conn) == pid
        assert pool._state is not None
        local, told = pool._state.groups["auto"], pool._state.attachment.settings
        assert local.settings in told.groups
        assert local.recipes[0].endpoint in told.endpoints


def test_what_connections_depend_on_replaces_them(coordinator: CoordinatorProcess, cluster: Cluster) -> None:
    """A reload that changes a session's settings opens the next connection with them; the old one goes."""
    with pool_of(coordinator.names.pool) as pool:
        with pool.connection("auto") as conn:
            pid = backend(conn)
        reload(coordinator, pool, AUTO, AUTO + "statement_timeout = 5\n")
        wait_until(lambda: not is_connected(cluster.primary, pid))
        with pool.connection("auto") as conn, conn.cursor() as cur:
            cur.execute("SHOW statement_timeout")
            assert cur.fetchone() == ("5s",)


def test_raised_cap_serves_who_waits_already(coordinator: CoordinatorProcess) -> None:
    """A thread that waits in a group at its cap gets a connection as soon as the cap is raised."""
    one = '[groups.one]\nconnections = 1\ntarget = "primary"\nautocommit = true\nper_worker_max = 1\n'
    with pool_of(coordinator.names.pool) as pool, ThreadPoolExecutor(1) as executor, pool.connection("one") as conn:
        waiting = executor.submit(pool.checkout, "one", 10)
        wait_until(lambda: pool.statistics()["one"]["waiting"] == 1)
        reload(coordinator, pool, one, one.replace("1", "2"))
        other = waiting.result(5)
        assert backend(other) != backend(conn)
        pool.checkin(other)
