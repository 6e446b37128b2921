"""Fork: nothing is shared, and nothing of the parent is harmed."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest

from shmpool import ConnectionGivenBackError, Pool, PoolClosed
from shmpool.names import Names
from shmpool.observation import observe
from tests.support.coordinator import CoordinatorProcess
from tests.support.waiting import wait_until
from tests.support.workers import (
    backend,
    in_child,
    is_connected,
    is_whole,
    lease_of,
    one_value,
    pool_of,
    sessions,
)
from tools.pg_cluster import Cluster


def fork_without_handlers() -> int:
    """Fork as a C program does: no at-fork handler of Python runs."""
    return int(ctypes.PyDLL(None).fork())


def test_handle_is_refused_in_a_child(pool: Pool, cluster: Cluster) -> None:
    """A handle checked out before a fork raises in the child, whose checkin does nothing; the parent works on."""
    conn = pool.checkout("auto")
    pid = backend(conn)

    def work() -> list[str]:
        told = []
        for use in (conn.cursor, lambda: conn.commit(), lambda: conn.autocommit, lambda: backend(conn)):
            try:
                use()
                told.append("worked")
            except ConnectionGivenBackError as error:
                told.append(str(error))
        conn.close()
        return told

    for told in in_child(work):
        assert "child" in told
    assert one_value(conn, "SELECT pg_backend_pid()") == pid
    conn.close()
    with pool.connection("auto") as again:
        assert backend(again) == pid
    assert is_connected(cluster.primary, pid)


@pytest.mark.parametrize("fork", [os.fork, fork_without_handlers])
def test_child_gets_a_connection_of_its_own(pool: Pool, cluster: Cluster, fork: Any) -> None:
    """An idle connection of the parent never serves its child, whether or not at-fork handlers ran."""
    with pool.connection("auto") as conn:
        pid = backend(conn)

    def work() -> tuple[int, bool]:
        with pool.connection("auto") as conn:
            child = one_value(conn, "SELECT pg_backend_pid()")
        pool.close()
        return child, is_connected(cluster.primary, pid)

    child, is_parents_alive = in_child(work, fork)
    assert child != pid
    assert is_parents_alive is (fork is fork_without_handlers)  # os.fork gives back what rests, before
    with pool.connection("auto") as conn:
        assert one_value(conn, "SELECT 1") == 1
        assert (backend(conn) == pid) is (fork is fork_without_handlers)


def test_parent_in_the_middle_of_a_transaction_is_unharmed(pool: Pool) -> None:
    """A child that drops all its copies does not touch its parent's transaction."""
    held = {"conn": pool.checkout("tx")}
    pid = backend(held["conn"])
    held["cur"] = held["conn"].cursor()  # type: ignore[assignment]
    held["cur"].execute("CREATE TEMP TABLE kept (n int)")

    def work() -> int:
        held.clear()
        gc.collect()
        with pool.connection("tx") as mine:
            found = backend(mine)
        pool.close()
        return found

    assert in_child(work) != pid
    held["cur"].execute("INSERT INTO kept VALUES (1)")
    assert one_value(held["conn"], "SELECT count(*) FROM kept") == 1
    held["conn"].close()


def test_background_thread_survives_a_fork_beside_a_connection_in_use(pool: Pool) -> None:
    """A process that forks with a connection in use still answers recalls afterwards."""
    conn = pool.checkout("auto")
    attachment = lease_of(conn).group.attachment
    in_child(lambda: None)
    wait_until(lambda: attachment._background is not None)
    conn.close()


def test_statistics_and_close_in_a_child(pool: Pool) -> None:
    """A child may ask for statistics and close the pool that it inherited, without a connection of its own."""
    with pool.connection("auto"):
        pass
    with pool.connection("auto") as conn:

        def work() -> Any:
            told = pool.statistics()
            pool.close()
            return told

        assert in_child(work) == {}
        assert in_child(work, fork_without_handlers) == {}
        assert one_value(conn, "SELECT 1") == 1


def test_closed_pool_stays_closed_in_a_child(pool: Pool) -> None:
    """A pool closed before a fork is closed in the child."""
    pool.close()

    def work() -> str:
        try:
            pool.checkout("auto")
        except PoolClosed as error:
            return str(error)
        return "worked"

    assert "closed" in in_child(work)


def serve(pool: Pool, answers: Any) -> None:
    """Tell which server process serves this one."""
    with pool.connection("auto") as conn:
        answers.put((os.getpid(), one_value(conn, "SELECT pg_backend_pid()")))
    pool.close()


def test_multiprocessing(shared: CoordinatorProcess, pool: Pool) -> None:
    """A pool made before multiprocessing forks serves every child from the same budget."""
    context = multiprocessing.get_context("fork")
    with pool.connection("auto") as conn, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mine = backend(conn)
        answers = context.SimpleQueue()
        children = [context.Process(target=serve, args=(pool, answers)) for _ in range(3)]
        for child in children:
            child.start()
        served = [answers.get() for _ in children]
        for child in children:
            child.join()
            child.close()
        answers.close()
        assert one_value(conn, "SELECT pg_backend_pid()") == mine
    assert len({pid for pid, _ in served}) == len(children)
    assert mine not in [server for _, server in served]


EXITS = """
import sys
import shmpool
pool = shmpool.Pool(sys.argv[1])
kept = [pool.checkout("auto") for _ in range(2)]
for conn in kept:
    conn.close()
with pool.connection("tx") as conn, conn.cursor() as cur:
    cur.execute("SELECT 1")
print(sum(numbers["idle"] for numbers in pool.statistics().values()))
"""


def test_normal_exit_gives_everything_back(shared: CoordinatorProcess, cluster: Cluster) -> None:
    """A process that ends in order has given back its permits and its row when it is gone."""
    name = shared.names.pool
    before = observe(Names.of(name)).coordinator
    ended = subprocess.run([sys.executable, "-c", EXITS, name], capture_output=True, text=True, check=True)
    assert (ended.stdout.strip(), ended.stderr) == ("3", "")
    assert is_whole(name)
    assert sessions(cluster.primary, name) == []
    report = observe(Names.of(name))
    assert [worker for worker in report.workers if worker.pid] == []
    assert before is not None
    assert report.coordinator is not None
    assert report.coordinator.reaped_rows == before.reaped_rows


def test_preloading_master_holds_nothing(shared: CoordinatorProcess, caplog: pytest.LogCaptureFixture) -> None:
    """A process that used the pool and then forks gives everything back first, and says what made it attach."""
    with pool_of(shared.names.pool) as pool:
        with pool.connection("auto"):
            pass
        in_child(lambda: None)
        assert is_whole(shared.names.pool)
        assert "gave back 1 idle" in caplog.text
        with pool.connection("auto") as conn:
            assert one_value(conn, "SELECT 1") == 1
