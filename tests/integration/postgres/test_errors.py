"""What an application is told when the pool cannot serve it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from shmpool import (
    CoordinatorNotRunning,
    NoEligibleEndpoint,
    Pool,
    PoolClosed,
    PoolError,
    PoolTimeout,
    UnknownGroup,
    WouldBlockEventLoop,
)
from shmpool.connection import WrongRoleError
from shmpool.local_group import LocalGroup
from tests.support.coordinator import (
    CoordinatorProcess,
    endpoint_keys,
    pool_config,
    running_coordinator,
)
from tests.support.waiting import wait_until
from tests.support.workers import (
    PROBE,
    backend,
    is_ready,
    is_whole,
    lease_of,
    one_value,
    pool_of,
    sessions,
)
from tools.pg_cluster import Cluster


def test_every_error_is_an_operational_error() -> None:
    """Code that handles a database that is away handles the pool's errors as well."""
    for kind in (PoolTimeout, NoEligibleEndpoint, UnknownGroup, PoolClosed, CoordinatorNotRunning):
        assert issubclass(kind, PoolError)
        assert issubclass(kind, psycopg2.OperationalError)


def test_timeout_tells_cap_held_waiting_and_holders(pool: Pool) -> None:
    """A timeout answers who holds the permits without another question."""
    with pool.connection("one"), pytest.raises(PoolTimeout) as caught:
        pool.checkout("one", timeout=0.1)
    told = str(caught.value)
    for part in ("'one'", "cap 1", "held 1", "waiting", f"pid {os.getpid()}", "no connection within 0."):
        assert part in told
    assert pool.statistics()["one"]["timeouts"] >= 1


def test_unknown_group(pool: Pool) -> None:
    """A group that does not exist is named together with those that do."""
    with pytest.raises(UnknownGroup, match=r"no group 'raed'; it has auto, .*read"):
        pool.checkout("raed")


def test_closed_pool(pool: Pool) -> None:
    """A closed pool says so; closing it again does nothing."""
    pool.close()
    pool.close()
    with pytest.raises(PoolClosed, match="make a new"):
        pool.checkout("auto")


def test_no_eligible_endpoint(pool: Pool) -> None:
    """No endpoint qualifies: the reason for each is told."""
    with pytest.raises(NoEligibleEndpoint) as caught:
        pool.checkout("nowhere", timeout=0.1)
    assert set(caught.value.reasons) == {"pg1", "pg2"}
    assert "is a primary" in caught.value.reasons["pg1"]
    assert "not among" in caught.value.reasons["pg2"]


def test_no_coordinator(pool_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a coordinator the error says how to start one."""
    monkeypatch.delenv("SHMPOOL_CONFIG", raising=False)
    with Pool(pool_name) as pool, pytest.raises(CoordinatorNotRunning, match="shmpool-coordinator run"):
        pool.checkout("auto")


def test_pool_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool needs a name: from the argument or the environment."""
    monkeypatch.delenv("SHMPOOL_NAME", raising=False)
    with pytest.raises(ValueError, match="SHMPOOL_NAME"):
        Pool()
    monkeypatch.setenv("SHMPOOL_NAME", "web")
    assert Pool().name == "web"
    with pytest.raises(TypeError, match=r"shmpool\.Connection"):
        Pool("web", connection_factory=psycopg2.extensions.connection)  # type: ignore[arg-type]


def test_exception_in_on_connect(shared: CoordinatorProcess, cluster: Cluster) -> None:
    """What `on_connect` raises reaches the caller; the session and its permits are gone."""
    fail = [True]

    def on_connect(conn: Any) -> None:
        if fail:
            raise KeyError("on_connect")

    with pool_of(shared.names.pool, on_connect=on_connect) as pool:
        for _ in range(3):
            with pytest.raises(KeyError):
                pool.checkout("one")
            assert sessions(cluster.primary, shared.names.pool) == []
            assert pool.statistics()["one"]["held"] == 0
        fail.clear()
        with pool.connection("one") as conn:
            assert one_value(conn, "SELECT 1") == 1


def closed_port() -> socket.socket:
    """Return a socket whose port refuses connections while it is open."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return holder


@pytest.mark.parametrize("is_coordinated", [True, False])
def test_endpoint_that_refuses(cluster: Cluster, pool_name: str, is_coordinated: bool) -> None:
    """A refused endpoint costs a try, not the request: another one serves, with or without a coordinator."""
    with closed_port() as closed:
        port = closed.getsockname()[1]
        config = pool_config(
            pool_name,
            {
                "bad": endpoint_keys(f"host=127.0.0.1 port={port} dbname=postgres user=postgres"),
                "good": endpoint_keys(cluster.primary.conninfo()),
            },
            {
                "work": 'connections = 4\ntarget = "any"\npolicy = "round-robin"\nautocommit = true',
                "bad": 'connections = 2\ntarget = "any"\nendpoints = ["bad"]',
            },
            # Slow probes: the workers find out first.
            '[probe]\ninter = "60s"\nfastinter = "60s"\nfall = 100\n[coordinator]\nstale_after = "0.5s"',
        )
        with running_coordinator(config, pool_name) as coordinator:
            wait_until(lambda: is_whole(pool_name), within=10)
            with pool_of(pool_name) as pool:
                if not is_coordinated:
                    coordinator.kill()
                conns = [pool.checkout("work", timeout=5.0) for _ in range(4)]
                assert {lease_of(conn).recipe.endpoint.name for conn in conns} == {"good"}
                with pytest.raises(psycopg2.OperationalError, match="refused"):
                    pool.checkout("bad", timeout=0.3)
                assert pool.statistics()["bad"]["held"] == 0
                for conn in conns:
                    conn.close()


def test_wrong_role(cluster: Cluster, pool_name: str) -> None:
    """With stale roles a standby that is tried for a primary group is closed, and the primary serves."""
    config = pool_config(
        pool_name,
        {
            "pg2": endpoint_keys(cluster.standbys[0].conninfo()),
            "pg1": endpoint_keys(cluster.primary.conninfo()),
        },
        {
            "write": 'connections = 4\ntarget = "primary"\npolicy = "round-robin"',
            "lost": 'connections = 1\ntarget = "primary"\nendpoints = ["pg2"]',
        },
        f'{PROBE}\n[coordinator]\nstale_after = "0.5s"',
    )
    with running_coordinator(config, pool_name) as coordinator:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: coordinator.log)
        with pool_of(pool_name) as pool:
            with pool.connection("write"):
                pass
            with pytest.raises(NoEligibleEndpoint, match="is a replica"):
                pool.checkout("lost", timeout=0)
            coordinator.kill()
            state = pool._state
            assert state is not None
            wait_until(lambda: is_stale(state.groups["write"]))
            conns = [pool.checkout("write", timeout=5.0) for _ in range(4)]
            assert {lease_of(conn).recipe.endpoint.name for conn in conns} == {"pg1"}
            assert sessions(cluster.standbys[0], pool_name) == []
            with pytest.raises(WrongRoleError, match="is a replica"):
                pool.checkout("lost", timeout=0.2)
            for conn in conns:
                conn.close()


def is_stale(group: LocalGroup) -> bool:
    """Whether the coordinator's heartbeat is too old to be believed."""
    from shmpool.endpoints import heartbeat_age

    return heartbeat_age(group.attachment.segment) > group.attachment.settings.stale_after


@pytest.mark.parametrize(
    ("conninfo", "told"), [("dbname=nowhere", 'database "nowhere"'), ("user=nobody", 'role "nobody"')]
)
def test_hopeless_failure_is_told_at_once(cluster: Cluster, pool_name: str, conninfo: str, told: str) -> None:
    """What does not pass by itself is raised without waiting for the timeout, and holds nothing."""
    config = pool_config(
        pool_name,
        {"pg1": endpoint_keys(cluster.primary.conninfo())},
        {"work": f'connections = 1\ntarget = "any"\ntimeout = "60s"\nconninfo = "{conninfo}"'},
        PROBE,
    )
    with running_coordinator(config, pool_name):
        wait_until(lambda: is_whole(pool_name), within=10)
        with pool_of(pool_name) as pool:
            for _ in range(2):
                with pytest.raises(psycopg2.OperationalError, match=told):
                    pool.checkout("work")


def test_missing_password_file(cluster: Cluster, pool_name: str, tmp_path: Path) -> None:
    """A password that cannot be read is told by its place, at once; nothing is held."""
    keys = endpoint_keys(cluster.primary.conninfo())
    config = pool_config(
        pool_name,
        {"pg1": keys, "pg1.credentials": f'password_file = "{tmp_path}/secret"'},
        {"work": 'connections = 1\ntarget = "any"\ntimeout = "60s"'},
        PROBE,
    )
    (tmp_path / "secret").write_text("hush")
    (tmp_path / "secret").chmod(0o600)
    with running_coordinator(config, pool_name):
        wait_until(lambda: is_ready(pool_name), within=10)
        with pool_of(pool_name) as pool:
            with pool.connection("work") as conn:
                assert "hush" not in repr(conn)
                assert backend(conn)
                lease = lease_of(conn)
            lease.expires = 0
            (tmp_path / "secret").unlink()
            with pytest.raises(psycopg2.OperationalError, match=r"password_file .*secret cannot be read"):
                pool.checkout("work")
            assert pool.statistics()["work"]["held"] == 0


def test_waiting_in_an_event_loop_is_refused_at_once(pool: Pool) -> None:
    """A call that would block a running event loop raises; one that need not wait is served."""

    async def use() -> None:
        with pool.connection("one") as conn:
            assert one_value(conn, "select 1") == 1
            with pytest.raises(WouldBlockEventLoop, match="asyncio event loop"):
                pool.checkout("one", timeout=5)
            with pytest.raises(PoolTimeout):
                pool.checkout("one", timeout=0)

    asyncio.run(use())
