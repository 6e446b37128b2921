"""Where connections of a group go on real servers: a replica that lags, a primary with little room for reads."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from shmpool import NoEligibleEndpoint, Pool, PoolTimeout
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from shmpool.status import EndpointReport
from tests.support.coordinator import endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import pool_of
from tools.pg_cluster import Cluster, Server

INTER_S = 0.1
EXTRA = f'[probe]\ninter = "{INTER_S}s"\nfastinter = "0.1s"\ndowninter = "0.1s"\n[coordinator]\nautostart = false'
NOBODY = "host=127.0.0.1 port=1 dbname=none"
MAX_LAG_S = 0.3
# Lag counts since the replica was level; a probe is jittered by a tenth, and the one that shows it follows.
LATE_S = MAX_LAG_S + 2 * 1.1 * INTER_S
SLACK_S = 1.0
WHERE = "select pg_is_wal_replay_paused(), pg_last_wal_replay_lsn(), pg_last_wal_receive_lsn()"


def endpoints(pool: str) -> tuple[EndpointReport, ...]:
    """Return what status says of the endpoints."""
    return observe(Names.of(pool)).endpoints


def serves(pool: Pool, group: str, server: Server) -> bool:
    """Whether the next checkout leads to this server."""
    with pool.connection(group) as conn:
        return bool(conn.info.port == server.port)


def test_replica_that_lags_loses_its_reads_and_gets_them_back(pool_name: str, cluster: Cluster) -> None:
    """Replay paused: reads leave within max_lag and 2 probes, but for what is over the bound; resumed: all return."""
    primary, standby = cluster.primary, cluster.standbys[0]
    lag = f'connections = 8\nmax_lag = "{MAX_LAG_S:g}s"'
    text = pool_config(
        pool_name,
        {name: endpoint_keys(s.conninfo()) for name, s in (("pg1", primary), ("pg2", standby))},
        {"read": f"{lag}\nfallback_connections = 2", "replica": f'{lag}\ntarget = "replica"'},
        EXTRA,
    )
    with running_coordinator(text, pool_name) as coordinator, pool_of(pool_name) as pool:

        def is_level() -> bool:
            return all(e.health is Health.UP for e in endpoints(pool_name)) and endpoints(pool_name)[1].lag == 0.0

        wait_until(is_level, within=10, what=lambda: coordinator.log)
        assert serves(pool, "read", standby)
        assert serves(pool, "replica", standby)
        standby.execute("select pg_wal_replay_pause()")
        try:
            primary.execute("create table lag_of_replay ()")
            written = time.monotonic()
            wait_until(
                lambda: (endpoints(pool_name)[1].lag or 0.0) > MAX_LAG_S,
                within=LATE_S + SLACK_S,
                what=lambda: f"{endpoints(pool_name)} {standby.execute(WHERE)} {coordinator.log}",
            )
            late_s = time.monotonic() - written
            pool.look_after_idle()
            assert not serves(pool, "read", standby)
            with ExitStack() as held:
                ports = [held.enter_context(pool.connection("read")).info.port for _ in range(4)]
            assert ports.count(primary.port) == 2
            assert ports.count(standby.port) == 2
            assert serves(pool, "replica", standby)
        finally:
            standby.execute("select pg_wal_replay_resume()")
            primary.execute("drop table if exists lag_of_replay")
        resumed = time.monotonic()
        wait_until(is_level, within=2 * 1.1 * INTER_S + SLACK_S)
        level_s = time.monotonic() - resumed

        def has_returned() -> bool:
            pool.look_after_idle()
            return serves(pool, "read", standby)

        wait_until(has_returned, within=10, every=0.05)
    print(f"\nreplay paused: late after {late_s:.3f} s (bound {LATE_S:.2f}); resumed: level after {level_s:.3f} s")


def test_workers_are_told_of_lag(pool_name: str, cluster: Cluster) -> None:
    """When a replica passes max_lag its idle connections leave within half a second of that, and come back after it."""
    primary, standby = cluster.primary, cluster.standbys[0]
    text = pool_config(
        pool_name,
        {name: endpoint_keys(s.conninfo()) for name, s in (("pg1", primary), ("pg2", standby))},
        {"read": f'connections = 8\nmax_lag = "{MAX_LAG_S:g}s"'},
        EXTRA,
    )
    with running_coordinator(text, pool_name) as coordinator, pool_of(pool_name) as pool:

        def is_level() -> bool:
            return all(e.health is Health.UP for e in endpoints(pool_name)) and endpoints(pool_name)[1].lag == 0.0

        def is_late() -> bool:
            return (endpoints(pool_name)[1].lag or 0.0) > MAX_LAG_S

        wait_until(is_level, within=10, what=lambda: coordinator.log)
        for conn in [pool.checkout("read") for _ in range(3)]:
            assert conn.info.port == standby.port
            conn.close()
        standby.execute("select pg_wal_replay_pause()")
        try:
            primary.execute("create table lag_of_idle ()")
            wait_until(is_late, within=10, every=0.005, what=lambda: coordinator.log)
            wait_until(lambda: pool.statistics()["read"]["idle"] == 0, within=0.5, every=0.005)
            for conn in [pool.checkout("read") for _ in range(2)]:
                assert conn.info.port == primary.port
                conn.close()
        finally:
            standby.execute("select pg_wal_replay_resume()")
            primary.execute("drop table if exists lag_of_idle")
        wait_until(is_level, within=10, every=0.005)
        wait_until(lambda: pool.statistics()["read"]["idle"] == 1, within=0.5, every=0.005)


def test_reads_without_a_replica_leave_room_on_the_primary(pool_name: str, cluster: Cluster) -> None:
    """Without a replica a group gets half of what primary groups leave; each endpoint tells why there is no more."""
    text = pool_config(
        pool_name,
        {"pg1": endpoint_keys(cluster.primary.conninfo(), max_connections=6), "pg2": endpoint_keys(NOBODY)},
        {
            "read": 'connections = 6\ntimeout = "300ms"',
            "write": 'connections = 2\ntarget = "primary"',
        },
        EXTRA,
    )
    with (
        running_coordinator(text, pool_name) as coordinator,
        pool_of(pool_name) as pool,
        Pool(pool_name) as other,
    ):
        wait_until(
            lambda: [e.health for e in endpoints(pool_name)] == [Health.UP, Health.DOWN],
            within=10,
            what=lambda: coordinator.log,
        )
        with ExitStack() as held:
            for _ in range(2):
                held.enter_context(pool.connection("read"))
            with pytest.raises(NoEligibleEndpoint) as caught, pool.connection("read"):
                pass
            assert "pg1: is a primary, where the group holds 2 connections and may hold 2" in str(caught.value)
            assert "pg2: DOWN (refused)" in str(caught.value)
            with pool.connection("write"):
                pass

        def is_shared() -> bool:
            pool.look_after_idle()
            return pool.statistics()["read"]["idle"] < 2

        wait_until(is_shared, within=10, every=0.05)
        with other.connection("read"):
            pass


@pytest.mark.parametrize("is_there", [True, False], ids=["full", "refused"])
def test_backup_serves_for_an_endpoint_that_refuses_and_for_none_that_is_full(
    pool_name: str, cluster: Cluster, is_there: bool
) -> None:
    """A backup stays unused while the other endpoint is full, and serves at once where that takes no connection."""
    conninfo = cluster.primary.conninfo() if is_there else NOBODY
    text = pool_config(
        pool_name,
        {
            "pg1": endpoint_keys(conninfo, max_connections=1),
            "pg2": endpoint_keys(cluster.standbys[0].conninfo()) + "\nbackup = true",
        },
        {"read": 'connections = 4\ntarget = "any"\ntimeout = "1s"'},
        EXTRA.replace("[probe]", "[probe]\nfall = 100"),
    )
    with running_coordinator(text, pool_name) as coordinator, pool_of(pool_name) as pool:
        wait_until(lambda: endpoints(pool_name)[1].health is Health.UP, within=10, what=lambda: coordinator.log)
        if is_there:
            with pool.connection("read") as conn:
                assert conn.info.port == cluster.primary.port
                with pytest.raises(PoolTimeout), pool.connection("read", timeout=0.3):
                    pass
        else:
            assert serves(pool, "read", cluster.standbys[0])
