"""`commit_position` and `after=`: on a primary and a standby whose replay is paused."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from psycopg2 import ProgrammingError

from shmpool import CommitPosition, ConnectionGivenBackError, Handle, Pool, PositionNotReached, WouldBlockEventLoop
from shmpool.endpoints import heartbeat_age
from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, backend, is_connected, is_ready, one_value, pool_of
from tools.pg_cluster import Cluster, Server

GROUPS = {
    "write": 'connections = 4\ntarget = "primary"',
    "read": 'connections = 4\ntarget = "prefer-replica"',
    "patient": 'connections = 4\ntarget = "prefer-replica"\nafter_wait = "60s"\ntimeout = "60s"',
    "single": 'connections = 4\ntarget = "prefer-replica"\nper_worker_max = 1',
    "replica": 'connections = 4\ntarget = "replica"',
}
STALE_AFTER_S = 0.5
ALONE = f'{PROBE}\n[coordinator]\nautostart = false\nstale_after = "{STALE_AFTER_S}s"'
AFTER_WAIT_S = 0.05  # the default
SLACK_S = 2.0  # of a loaded machine


def config_of(name: str, cluster: Cluster, extra: str) -> str:
    """Return the configuration of a primary `pg1`, its standbys `pg2` and so on, GROUPS."""
    endpoints = {f"pg{n}": endpoint_keys(server.conninfo()) for n, server in enumerate(cluster.servers, 1)}
    return pool_config(name, endpoints, GROUPS, extra)


@pytest.fixture(scope="module")
def coordinator(cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows the primary and the standby, and a table to write to."""
    name = "ryw"
    cluster.primary.execute("CREATE TABLE written (n int)")
    with running_coordinator(config_of(name, cluster, PROBE), name) as coordinator:
        wait_until(lambda: is_ready(name), within=10, what=lambda: coordinator.log)
        yield coordinator
    cluster.primary.execute("DROP TABLE written")


@pytest.fixture
def pool(coordinator: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process; every permit is back afterwards."""
    with pool_of(coordinator.names.pool) as pool:
        yield pool


@contextmanager
def replay_paused(cluster: Cluster, number: int = 0) -> Iterator[None]:
    """Let a standby receive and not replay."""
    standby = cluster.standbys[number]
    standby.execute("SELECT pg_wal_replay_pause()")
    try:
        wait_until(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
        yield
    finally:
        standby.execute("SELECT pg_wal_replay_resume()")


def written(pool: Pool, n: int, *, by: str = "on") -> CommitPosition:
    """Write a row and return the position of its commit."""
    with pool.connection("write") as conn:
        with conn.cursor() as cur:
            cur.execute(f"SET LOCAL synchronous_commit = {by}")
            cur.execute("INSERT INTO written VALUES (%s)", (n,))
        conn.commit()
        return conn.commit_position()


def sees(conn: Handle, n: int) -> bool:
    """Whether a row can be read."""
    return bool(one_value(conn, "SELECT count(*) FROM written WHERE n = %s", n))


def is_on_replica(conn: Handle) -> bool:
    """Whether a connection leads to a standby; no statement."""
    return bool(conn.get_parameter_status("in_hot_standby") == "on")


def last_statement(server: Server, conn: Handle) -> Any:
    """Return the last statement of a connection's session and when it began, as the server knows it."""
    (row,) = server.execute(f"SELECT query, query_start FROM pg_stat_activity WHERE pid = {backend(conn)}")
    return row


def wait_until_seen_past(coordinator: CoordinatorProcess, position: CommitPosition, number: int = 0) -> None:
    """Wait until a probe that began now or later saw a standby past a position."""
    segment = coordinator.attach()
    at, now = segment.layout.at(ENDPOINTS, 1 + number), time.monotonic()

    def is_seen() -> bool:
        is_past: bool = segment.words[at + ENDPOINTS.column("lsn")] >= position.lsn
        return is_past and bool(segment.times[at + ENDPOINTS.column("probed_at")] > now)

    try:
        wait_until(is_seen, within=10)
    finally:
        segment.release()


def is_up(name: str) -> bool:
    """Whether both servers are."""
    return all(endpoint.health is Health.UP for endpoint in observe(Names.of(name)).endpoints)


def test_every_read_sees_the_write_before_it(pool: Pool) -> None:
    """Writes and reads in turn: each read sees its write, whoever serves it; also one that is not flushed at commit."""
    for n in range(100, 150):
        with pool.connection("read", after=written(pool, n)) as conn:
            assert sees(conn, n)
    for n in range(150, 155):
        with pool.connection("patient", after=written(pool, n, by="off")) as conn:
            assert is_on_replica(conn)
            assert sees(conn, n)


def test_replica_that_was_seen_past_the_position_is_asked_nothing(
    pool: Pool, coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """What the coordinator's probe saw decides in memory: the session executes no statement at checkout."""
    (standby,) = cluster.standbys
    with pool.connection("read") as conn:
        assert is_on_replica(conn)
        pid, before = backend(conn), last_statement(standby, conn)
    position = written(pool, 1)
    wait_until_seen_past(coordinator, position)
    with pool.connection("read", after=position) as conn:
        assert backend(conn) == pid
        assert last_statement(standby, conn) == before
        assert sees(conn, 1)


def test_replica_that_is_ahead_of_what_was_seen_is_asked_once(
    pool: Pool, coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """Without news from the coordinator the connection at hand is asked; its answer is remembered with it."""
    (standby,) = cluster.standbys
    with pool.connection("patient") as conn:
        pid = backend(conn)
    coordinator.signal(signal.SIGSTOP)
    try:
        position = written(pool, 2)
        with pool.connection("patient", after=position) as conn:
            assert (backend(conn), is_on_replica(conn)) == (pid, True)
            asked = last_statement(standby, conn)
            assert "pg_last_wal_replay_lsn" in asked[0]
        with pool.connection("patient", after=position) as conn:
            assert (backend(conn), last_statement(standby, conn)) == (pid, asked)
            assert sees(conn, 2)
    finally:
        coordinator.signal(signal.SIGCONT)


def test_primary_serves_after_the_moment(pool: Pool, cluster: Cluster) -> None:
    """A replica that stands still is not used: after `after_wait` the primary is; the replica's connection rests."""
    with pool.connection("read") as conn:
        pid = backend(conn)
    with replay_paused(cluster):
        position = written(pool, 3)
        began = time.monotonic()
        with pool.connection("read", after=position) as conn:
            took = time.monotonic() - began
            assert not is_on_replica(conn)
            assert sees(conn, 3)
            with pool.connection("read") as other:
                assert backend(other) == pid
                assert not sees(other, 3)
        assert AFTER_WAIT_S <= took < AFTER_WAIT_S + SLACK_S
        again = time.monotonic()
        with pool.connection("read", after=position) as conn:
            assert not is_on_replica(conn)
        assert time.monotonic() - again < AFTER_WAIT_S  # the connection to the primary rests


def test_replica_that_catches_up_within_the_moment_serves(pool: Pool, cluster: Cluster) -> None:
    """A checkout that waits gets the replica as soon as it has replayed, and not before."""
    served: list[tuple[bool, bool]] = []

    def read() -> None:
        with pool.connection("patient", after=position) as conn:
            served.append((is_on_replica(conn), sees(conn, 4)))

    with replay_paused(cluster):
        position = written(pool, 4)
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.3)
        assert served == []
    thread.join(10)
    assert served == [(True, True)]


def test_group_without_the_primary_waits_and_says_why(pool: Pool, cluster: Cluster) -> None:
    """Where only replicas serve it is waited for up to the timeout; the error names position and replicas."""
    with replay_paused(cluster):
        position = written(pool, 5)
        began = time.monotonic()
        with pytest.raises(PositionNotReached, match=rf"(?s){position}.*pg2: a replica at"):
            pool.checkout_after("replica", position, timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 0.3 + SLACK_S
    with pool.connection("replica", timeout=10, after=position) as conn:
        assert sees(conn, 5)


def test_own_idle_connection_makes_room_for_one_to_the_primary(pool: Pool, cluster: Cluster) -> None:
    """A worker whose only connection of the group rests with the replica that is behind still gets to the primary."""
    with pool.connection("single") as conn:
        assert is_on_replica(conn)
        pid = backend(conn)
    with replay_paused(cluster):
        with pool.connection("single", after=written(pool, 6)) as conn:
            assert not is_on_replica(conn)
            assert sees(conn, 6)
        assert not is_connected(cluster.standbys[0], pid)


def test_frozen_replica_does_not_keep_the_reader(pool: Pool, cluster: Cluster) -> None:
    """A replica that does not answer is cut off in time, and the primary serves."""
    (standby,) = cluster.standbys
    with pool.connection("read") as conn:
        assert is_on_replica(conn)
    standby.pause()  # before the write: no probe can have seen it there
    try:
        position = written(pool, 7)
        began = time.monotonic()
        with pool.connection("read", after=position) as conn:
            assert not is_on_replica(conn)
            assert sees(conn, 7)
        assert time.monotonic() - began < 3.0
    finally:
        standby.resume()
    wait_until(lambda: is_up(pool.name), within=10)


def test_position_behind_a_segment_switch_is_reached(pool: Pool, cluster: Cluster) -> None:
    """On a server where nothing more happens, a position right behind a page's end is one that a replica reaches."""
    with pool.connection("write") as conn:
        with conn.cursor() as cur:
            cur.execute("INSERT INTO written VALUES (0)")
        conn.commit()
        with conn.cursor() as cur:
            cur.execute("SELECT pg_switch_wal()")
        conn.rollback()
        position = conn.commit_position()
    replayed = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::bigint"
    wait_until(lambda: cluster.standbys[0].execute(replayed)[0][0] >= position.lsn, within=5)


def test_commit_position_is_asked_where_and_when_it_makes_sense(pool: Pool) -> None:
    """Inside a transaction, on a replica or after checkin there is none; asking opens no transaction."""
    with pool.connection("write") as conn:
        with conn.cursor() as cur:
            cur.execute("SELECT 1")
        with pytest.raises(ProgrammingError, match="open transaction"):
            conn.commit_position()
        conn.commit()
        first = conn.commit_position()
        assert conn.get_transaction_status() == 0
        assert conn.commit_position() >= first
    with pytest.raises(ConnectionGivenBackError):
        conn.commit_position()
    with pool.connection("replica") as conn, pytest.raises(ProgrammingError, match="replica"):
        conn.commit_position()


def test_position_of_a_system_that_was_replaced_is_ignored(pool: Pool) -> None:
    """A cookie from before a migration by dump and restore costs nothing."""
    position = written(pool, 8)._replace(system_identifier=1, lsn=2**60)
    with pool.connection("replica", timeout=1, after=position) as conn:
        assert is_on_replica(conn)


def test_text_is_refused_as_a_position(pool: Pool) -> None:
    """What was not parsed is told at once."""
    with pytest.raises(TypeError, match=r"parse\(\)"):
        pool.checkout_after("read", str(written(pool, 9)))  # type: ignore[arg-type]


def test_event_loop_is_not_blocked(pool: Pool, cluster: Cluster) -> None:
    """In a running event loop nothing waits for a replica; the connection that was asked is kept."""

    async def read() -> None:
        with pytest.raises(WouldBlockEventLoop):
            pool.checkout_after("read", position)

    with pool.connection("read") as conn:
        pid = backend(conn)
    with replay_paused(cluster):
        position = written(pool, 10)
        asyncio.run(read())
        with pool.connection("read") as conn:
            assert backend(conn) == pid


def test_replica_that_was_seen_past_the_position_goes_before_one_that_is_behind(pool_name: str) -> None:
    """With one of two replicas behind, nobody waits for it: a connection to the other one is opened."""
    require_postgres()
    with Cluster(standbys=2) as cluster:
        cluster.primary.execute("CREATE TABLE written (n int)")
        with running_coordinator(config_of(pool_name, cluster, PROBE), pool_name) as coordinator:
            wait_until(lambda: is_ready(pool_name), within=10, what=lambda: coordinator.log)
            with pool_of(pool_name) as pool:
                with pool.connection("patient") as conn:
                    port = one_value(conn, "SELECT inet_server_port()")
                behind = [standby.port for standby in cluster.standbys].index(port)
                with replay_paused(cluster, behind):
                    position = written(pool, 1)
                    wait_until_seen_past(coordinator, position, 1 - behind)
                    began = time.monotonic()
                    with pool.connection("patient", timeout=20, after=position) as conn:
                        assert time.monotonic() - began < SLACK_S
                        assert one_value(conn, "SELECT inet_server_port()") == cluster.standbys[1 - behind].port
                        assert sees(conn, 1)


def test_old_primary_is_not_taken_for_the_new_one(pool_name: str) -> None:
    """After a promotion that no coordinator saw, with both primaries up, the one of the older timeline never serves."""
    require_postgres()
    with Cluster(standbys=1) as cluster:
        (standby,) = cluster.standbys
        with (
            running_coordinator(config_of(pool_name, cluster, ALONE), pool_name) as coordinator,
            Pool(pool_name) as pool,  # whose permits are not looked at afterwards: nobody is there to settle them
        ):
            wait_until(lambda: is_ready(pool_name), within=10, what=lambda: coordinator.log)
            with pool.connection("write") as conn:
                position = conn.commit_position()
            segment = coordinator.attach()
            try:
                coordinator.kill()
                wait_until(lambda: heartbeat_age(segment) > STALE_AFTER_S, within=5)
            finally:
                segment.release()
            with pool.connection("read", after=position) as conn:
                assert is_on_replica(conn)
            standby.promote()
            ((end,),) = standby.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
            after = position._replace(timeline=2, lsn=end)
            for _ in range(4):
                with pool.connection("read", timeout=10, after=after) as conn:
                    assert one_value(conn, "SELECT inet_server_port()") == standby.port
            with pytest.raises(PositionNotReached):
                pool.checkout_after("write", after._replace(timeline=3), timeout=0.2)
