"""Whose connections are recalled: of old workers and new ones, of requests that are short and long."""

from __future__ import annotations

import threading
import time

from shmpool import Pool
from shmpool_coordinator.arbiter import PATIENCE_S
from tests.support.coordinator import running_coordinator
from tests.support.endpoints import coordinating
from tests.support.reloads import TightRole, tight_config
from tests.support.waiting import wait_until
from tests.support.workers import is_connected, one_value, pool_of, read_line, worker
from tools.pg_cluster import Server

KEPT = 2
KEEPER = f"""
import sys
from shmpool import Pool
from shmpool.attachment import set_server
from shmpool.states import ServerKind

set_server(ServerKind.GUNICORN, 1, int(sys.argv[2]))
with Pool(sys.argv[1]) as pool:
    held = [pool.checkout("read") for _ in range({KEPT})]
    print(*[connection.get_backend_pid() for connection in held], flush=True)
    while held:
        held.pop().close()
    print("rest", flush=True)
    sys.stdin.readline()
"""


def test_idle_connections_of_old_workers_are_recalled_first(primary: Server, pool_name: str) -> None:
    """Those of workers from before the reload go, although the newer worker's have rested for longer."""
    with (
        TightRole(primary, pool_name, 2 * KEPT) as role,
        running_coordinator(tight_config(pool_name, role), pool_name),
        worker(KEEPER, pool_name, "2") as new,
    ):
        new_sessions = {int(pid) for pid in read_line(new).split()}
        assert read_line(new) == "rest"
        with worker(KEEPER, pool_name, "1") as old, Pool(pool_name) as pool:
            old_sessions = {int(pid) for pid in read_line(old).split()}
            assert read_line(old) == "rest"
            held = []
            for taken in range(1, 2 * KEPT + 1):
                held.append(pool.checkout("read"))
                assert left(primary, old_sessions) == max(0, KEPT - taken)
                assert left(primary, new_sessions) == min(KEPT, 2 * KEPT - taken)
            while held:
                held.pop().close()
        assert role.refusals == 0


HOLDER = """
import sys
from shmpool import Pool

with Pool(sys.argv[1]) as pool, pool.connection("read"):
    print("held", flush=True)
    sys.stdin.readline()
"""
WAITER = """
import sys, time
from shmpool import Pool

with Pool(sys.argv[1]) as pool:
    began = time.monotonic()
    with pool.connection("read"):
        print(time.monotonic() - began, flush=True)
"""


def test_a_waiter_does_not_wait_for_a_connection_in_long_use(primary: Server, pool_name: str) -> None:
    """Of one connection in a long request and one in short ones without a pause, the latter is given up."""
    with (
        TightRole(primary, pool_name, 2) as role,
        running_coordinator(tight_config(pool_name, role), pool_name),
        worker(HOLDER, pool_name) as holder,
        Pool(pool_name) as pool,
    ):
        assert read_line(holder) == "held"
        is_over = threading.Event()

        def work() -> None:
            while not is_over.is_set():
                with pool.connection("read") as conn, conn.cursor() as cursor:
                    cursor.execute("SELECT pg_sleep(0.005)")

        busy = threading.Thread(target=work)
        busy.start()
        try:
            with worker(WAITER, pool_name) as waiter:
                waited = float(read_line(waiter))
        finally:
            is_over.set()
            busy.join()
        assert waited < PATIENCE_S / 2
        assert role.refusals == 0


BUSY = """
import sys, threading
from shmpool import Pool

with Pool(sys.argv[1]) as pool:
    is_over = threading.Event()

    def work():
        while not is_over.is_set():
            with pool.connection("read"):
                is_over.wait(0.0005)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    is_over.set()
    for thread in threads:
        thread.join()
"""


def test_waits_that_are_short_are_seen_too(primary: Server, pool_name: str) -> None:
    """Threads that queue all the time, each for a moment, get what rests in other workers."""
    with (
        TightRole(primary, pool_name, 3) as role,
        running_coordinator(tight_config(pool_name, role), pool_name),
        Pool(pool_name) as pool,
    ):
        held = [pool.checkout("read") for _ in range(3)]
        held.pop().close()
        with worker(BUSY, pool_name) as busy:
            wait_until(lambda: pool.statistics()["read"]["held"] == 2)
            while held:
                held.pop().close()
            wait_until(lambda: pool.statistics()["read"]["held"] == 0, within=3)
            assert busy.stdin is not None
            busy.stdin.write("\n")
            busy.stdin.flush()
            busy.wait(10)
        assert role.refusals == 0


def left(server: Server, sessions: set[int]) -> int:
    """Return how many of these sessions the server still has."""
    return sum(is_connected(server, pid) for pid in sessions)


def test_pools_of_one_process_do_not_starve_each_other(primary: Server, pool_name: str) -> None:
    """Threads that keep all connections of a group busy leave one to another pool object of their process."""
    until = time.monotonic() + 3

    def work(pool: Pool) -> None:
        while time.monotonic() < until:
            with pool.connection("only", timeout=10) as conn:
                one_value(conn, "select pg_sleep(0.002)::text")

    groups = {"only": 'connections = 2\ntarget = "primary"\nautocommit = true'}
    with (
        coordinating(pool_name, {"pg1": primary.port}, groups),
        pool_of(pool_name) as busy,
        Pool(pool_name) as other,
    ):
        threads = [threading.Thread(target=work, args=(busy,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: busy.statistics().get("only", {}).get("waiting", 0) > 0)
        with other.connection("only", timeout=2) as conn:
            assert one_value(conn, "select 'served'") == "served"
        for thread in threads:
            thread.join()
