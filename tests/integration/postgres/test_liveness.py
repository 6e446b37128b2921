"""The checks of a warm checkout and checkin, each broken once; lifetimes, recall and lost rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shmpool import Pool, background, local_group
from shmpool.connection import Connection, answers
from shmpool.layout import WORKERS
from shmpool.lease import BYPASS_S
from shmpool.segment import Segment
from shmpool.slots import BACKEND_PID
from shmpool.states import Use
from shmpool.words import Status, UseWord
from tests.support.coordinator import CoordinatorProcess, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import (
    backend,
    end_session,
    is_connected,
    is_ready,
    lease_of,
    one_value,
    pool_of,
    read_line,
    shared_config,
    worker,
)
from tools.pg_cluster import Cluster


@pytest.fixture
def segment(shared: CoordinatorProcess) -> Iterator[Segment]:
    """The segment, as the coordinator's writer would see it."""
    segment = shared.attach()
    yield segment
    segment.release()


def test_changed_epoch_is_not_handed_out(pool: Pool, segment: Segment, cluster: Cluster) -> None:
    """An idle connection whose endpoint changed is closed, and another one is opened."""
    with pool.connection("auto") as conn:
        pid, lease = backend(conn), lease_of(conn)
    word = segment.words[lease.status_at]
    segment.words[lease.status_at] = Status.of(word)._replace(epoch=Status.of(word).epoch + 1).word()
    try:
        with pool.connection("auto") as conn:
            assert backend(conn) != pid
        assert not is_connected(cluster.primary, pid)
    finally:
        segment.words[lease.status_at] = word


def test_changed_weight_keeps_the_connection(pool: Pool, segment: Segment) -> None:
    """What does not concern an open connection does not cost it."""
    with pool.connection("auto") as conn:
        pid, lease = backend(conn), lease_of(conn)
    word = segment.words[lease.status_at]
    segment.words[lease.status_at] = Status.of(word)._replace(weight=77).word()
    try:
        with pool.connection("auto") as conn:
            assert backend(conn) == pid
    finally:
        segment.words[lease.status_at] = word


def test_session_that_ended_while_idle_is_not_handed_out(pool: Pool, cluster: Cluster) -> None:
    """A connection idle for longer than the bypass window is looked at before it is handed out."""
    with pool.connection("auto") as conn:
        pid, lease = backend(conn), lease_of(conn)
    end_session(cluster.primary, pid)
    lease.since -= BYPASS_S
    with pool.connection("auto") as conn:
        assert one_value(conn, "SELECT 1") == 1


def test_notice_on_an_idle_connection_keeps_it(pool: Pool, cluster: Cluster) -> None:
    """Something to read is not an end: a notification leaves the connection as it is."""
    with pool.connection("auto") as conn:
        pid, lease = backend(conn), lease_of(conn)
        with conn.cursor() as cur:
            cur.execute("LISTEN shmpool_liveness")
    cluster.primary.execute("NOTIFY shmpool_liveness")
    lease.since -= BYPASS_S
    with pool.connection("auto") as conn:
        assert backend(conn) == pid


def test_ping_after(pool: Pool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection idle for longer than `ping_after` is tried with a round trip; one that answers is kept."""
    with pool.connection("auto") as conn:
        pid, lease = backend(conn), lease_of(conn)
    lease.since -= 31
    pings: list[int] = []

    def counted(conn: Connection, seconds: float) -> bool:
        pings.append(conn.get_backend_pid())
        return answers(conn, seconds)

    monkeypatch.setattr(local_group, "answers", counted)
    with pool.connection("auto") as conn:
        assert backend(conn) == pid
        assert pings == [pid]
    end_session(cluster.primary, pid)
    lease.since -= 31
    with pool.connection("auto") as conn:
        assert backend(conn) != pid
        assert one_value(conn, "SELECT 1") == 1


def test_server_that_does_not_answer_a_ping(cluster: Cluster, pool_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ping that gets no answer is cut off in time; the permit waits until the session has gone at the server."""
    monkeypatch.setattr(local_group, "PING_TIMEOUT_S", 0.2)
    with running_coordinator(shared_config(pool_name, cluster), pool_name), pool_of(pool_name) as pool:
        wait_until(lambda: is_ready(pool_name), within=10)
        with pool.connection("read") as conn:
            lease = lease_of(conn)
        lease.since -= 31
        standby = cluster.standbys[0]
        standby.pause()
        try:
            assert not lease.group.is_fit(lease.idle.pop())
            assert lease.group.permits.semaphore.value == 3
        finally:
            standby.resume()
        wait_until(lambda: lease.group.permits.semaphore.value == 4)


def test_sweep_sends_no_pings(pool: Pool, cluster: Cluster) -> None:
    """Looking after idle connections costs their servers nothing."""
    with pool.connection("auto") as conn:
        pid, lease = one_value(conn, "SELECT pg_backend_pid()"), lease_of(conn)
    lease.since -= 31
    changed = f"SELECT state_change FROM pg_stat_activity WHERE pid = {pid}"
    wait_until(lambda: cluster.primary.execute(f"SELECT state FROM pg_stat_activity WHERE pid = {pid}") == [("idle",)])
    before = cluster.primary.execute(changed)
    pool.look_after_idle()
    assert cluster.primary.execute(changed) == before
    assert pool.statistics()["auto"]["idle"] == 1


def test_max_lifetime(pool: Pool) -> None:
    """A connection past its lifetime is replaced; lifetimes differ a little, so that they do not end together."""
    with pool.connection("auto") as conn, pool.connection("auto") as other:
        pid, lease = backend(conn), lease_of(conn)
        assert lease.expires - lease.connection.opened_at < 3600
        assert (
            lease_of(other).expires - lease_of(other).connection.opened_at != lease.expires - lease.connection.opened_at
        )
        other.close()
    lease.expires = 0
    with pool.connection("auto") as conn:
        assert backend(conn) != pid


def test_max_idle_and_dead_ones_by_the_sweep(pool: Pool, cluster: Cluster) -> None:
    """The sweep closes what nobody used for `max_idle`, and what died; the rest stays."""
    conns = [pool.checkout("auto") for _ in range(3)]
    old, dead, good = (lease_of(conn) for conn in conns)
    end_session(cluster.primary, backend(conns[1]))
    for conn in conns:
        conn.close()
    old.since -= 601
    dead.since -= BYPASS_S
    pool.look_after_idle()
    assert list(good.idle) == [good]
    assert pool.statistics()["auto"]["held"] == 1


def test_background_thread_sweeps(shared: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any checkout, an idle connection goes by itself."""
    monkeypatch.setattr(background, "SWEEP_S", 0.05)
    with pool_of(shared.names.pool) as pool:
        with pool.connection("auto") as conn:
            lease = lease_of(conn)
        lease.since -= 601
        wait_until(lambda: pool.statistics()["auto"]["held"] == 0)


def test_recall_is_answered_at_checkin(pool: Pool, segment: Segment, cluster: Cluster) -> None:
    """A connection that is asked for goes at checkin; an outdated recall asks for nothing."""
    conn = pool.checkout("auto")
    lease, pid = lease_of(conn), backend(conn)
    segment.words[lease.recall_at] = segment.words[lease.word_at] + 1
    conn.close()
    conn = pool.checkout("auto")
    assert backend(conn) == pid
    segment.words[lease.recall_at] = segment.words[lease.word_at]
    conn.close()
    segment.words[lease.recall_at] = 0
    assert not is_connected(cluster.primary, pid)
    assert pool.statistics()["auto"]["held"] == 0


WAITS = """
import sys
import shmpool
with shmpool.Pool(sys.argv[1]) as pool:
    print("ready", flush=True)
    sys.stdin.readline()
    with pool.connection("one", timeout=5.0):
        print("served", flush=True)
        sys.stdin.readline()
"""


def test_idle_connection_is_recalled_for_another_process(shared: CoordinatorProcess, pool: Pool) -> None:
    """What rests in one process serves a waiter of another within a moment."""
    with pool.connection("one"):
        pass
    with worker(WAITS, shared.names.pool) as process:
        assert process.stdin is not None
        assert read_line(process) == "ready"
        process.stdin.write("\n")
        process.stdin.flush()
        assert read_line(process) == "served"
        assert pool.statistics()["one"]["held"] == 0
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(10)


def lose_row(segment: Segment, pool: Pool, group: str) -> None:
    """Raise the generation of the row that a pool works through, as a reap by mistake would."""
    state = pool._state
    assert state is not None
    segment.words[segment.layout.at(WORKERS, state.attachment.table.rows[0].number, "generation")] += 1


@pytest.mark.parametrize("when", ["idle", "in use"])
def test_lost_row(cluster: Cluster, pool_name: str, when: str) -> None:
    """A process whose row was taken away stores nothing in it, closes what it had, and joins anew."""
    with running_coordinator(shared_config(pool_name, cluster), pool_name) as coordinator, pool_of(pool_name) as pool:
        wait_until(lambda: is_ready(pool_name), within=10)
        segment = coordinator.attach()
        conn = pool.checkout("auto")
        lease, pid = lease_of(conn), backend(conn)
        if when == "idle":
            conn.close()
        lose_row(segment, pool, "auto")
        before = (segment.words[lease.word_at], segment.words[lease.use_at])
        with pool.connection("auto") as other:
            assert backend(other) != pid
            row, _, _ = lease_of(other).group.attachment.slot_name(lease_of(other))
            assert row != lease.number // segment.layout.slots_per_worker
            if when == "in use":
                conn.close()
            assert (segment.words[lease.word_at], segment.words[lease.use_at]) == before
            word_at = lease.word_at
            del conn, lease
            wait_until(lambda: not is_connected(cluster.primary, pid))
        segment.words[word_at] |= 1  # what the reaper had done: the coordinator gives the permits back
        segment.release()


def test_words_of_a_slot_follow_its_use(pool: Pool, segment: Segment) -> None:
    """Status sees who uses what: use, server process and time of every slot."""
    conn = pool.checkout("auto")
    lease = lease_of(conn)

    def use() -> Use:
        return UseWord.of(segment.words[lease.use_at]).use

    assert use() is Use.ACTIVE
    assert segment.words[lease.detail_at + BACKEND_PID] == backend(conn)
    conn.close()
    assert use() is Use.IDLE
    pool.close()
    assert use() is Use.FREE


def test_checkins_by_many_threads_share_what_rests(pool: Pool) -> None:
    """Threads that take turns never see each other's connection while they hold it."""
    held: set[int] = set()
    mistakes: list[int] = []

    def run() -> None:
        for _ in range(200):
            with pool.connection("auto", timeout=20) as conn:
                pid = id(lease_of(conn))
                if pid in held:
                    mistakes.append(pid)
                held.add(pid)
                held.discard(pid)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mistakes == []
