"""A segment that is retired under load, and its successor."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from shmpool import Pool
from shmpool.attachment import Attachment
from shmpool.cli import main
from shmpool.errors import MechanismError
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.pool_errors import PoolError
from shmpool.segment import attach
from shmpool.status import RowState
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import backend, end_session, is_ready, one_value, pool_of, read_line, sessions, worker
from tools.pg_cluster import Cluster

CAP = 3
WORKER = """
import sys, shmpool
pool = shmpool.Pool(sys.argv[1])
conn = pool.checkout("work")
print("busy", flush=True)
for line in sys.stdin:
    if line == "checkin\\n":
        pool.checkin(conn)
    elif line == "query\\n":
        with pool.connection("work", timeout=10) as again, again.cursor() as cur:
            cur.execute("select 1")
    print(line.strip(), flush=True)
"""


def config(pool: str, cluster: Cluster, cap: int = CAP, workers: int = 8) -> str:
    """Return a pool of one primary with one group."""
    return pool_config(
        pool,
        {"pg1": endpoint_keys(cluster.primary.conninfo(), max_connections=cap)},
        {"work": f'connections = {cap}\ntarget = "primary"\nautocommit = true'},
        f'[probe]\ninter = "0.2s"\nfastinter = "0.1s"\n[limits]\nworkers = {workers}\nslots_per_worker = 20',
    )


@pytest.fixture
def coordinator(pool_name: str, cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows its endpoint."""
    with running_coordinator(config(pool_name, cluster), pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


def token_of(names: Names) -> int:
    """Return what names the present segment."""
    segment = attach(names)
    try:
        return segment.token
    finally:
        segment.release()


def living(names: Names) -> list[int]:
    """Return the pids of the workers that hold a row."""
    return [one.pid for one in observe(names).workers if one.state is RowState.HELD]


def tell(process: subprocess.Popen[str], line: str) -> str:
    """Send a worker one line and return its answer."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return read_line(process)


def test_an_idle_pool_is_replaced_at_once_with_new_dimensions(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """Idle connections are closed, the successor opens within a second, and the next checkout works there."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        with pool.connection("work") as conn:
            assert one_value(conn, "select 1") == 1
        before = token_of(names)
        coordinator.config.write_text(config(names.pool, cluster, workers=12))
        assert main(["retire", names.pool, "--within", "5"]) == 0
        assert token_of(names) != before
        with pool.connection("work") as conn:
            assert one_value(conn, "select 1") == 1
        segment = attach(names)
        assert segment.layout.workers == 12
        segment.release()
        assert len(sessions(cluster.primary, names.pool)) == 1
    assert coordinator.is_running
    assert coordinator.names.socket.exists()


def test_the_successor_waits_for_a_busy_connection(
    coordinator: CoordinatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """A busy connection stays usable and gives its permits back; checkouts wait for the successor and get it."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        conn = pool.checkout("work")
        before = token_of(names)
        assert main(["retire", names.pool, "--no-wait"]) == 0
        assert main(["retire", names.pool, "--within", "0.3"]) == 1
        told = capsys.readouterr().err
        assert "retired; waiting for rows" in told
        assert f"pid {os.getpid()}" in told
        with pytest.raises(PoolError, match="retired"):
            pool.checkout("work", timeout=0.2)
        served: list[int] = []

        def use() -> None:
            with pool.connection("work", timeout=10) as mine:
                served.append(one_value(mine, "select 1"))

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert one_value(conn, "select 2") == 2
        report = observe(names)
        assert [f.code for f in report.findings if f.code == "segment-retired"]
        assert report.violations == ()
        assert token_of(names) == before
        pool.checkin(conn)
        for thread in threads:
            thread.join(10)
        assert served == [1, 1, 1, 1]
        assert token_of(names) != before


def test_every_worker_moves_and_a_killed_one_is_no_obstacle(coordinator: CoordinatorProcess, cluster: Cluster) -> None:
    """Rows of a worker that checks in, and of one that is killed, come free; then the successor opens."""
    names = coordinator.names
    with worker(WORKER, names.pool) as first, worker(WORKER, names.pool) as second:
        assert (read_line(first), read_line(second)) == ("busy", "busy")
        before = token_of(names)
        assert main(["retire", names.pool, "--no-wait"]) == 0
        assert tell(first, "checkin") == "checkin"
        wait_until(lambda: living(names) == [second.pid], what=lambda: str(observe(names)))
        second.send_signal(signal.SIGKILL)
        wait_until(lambda: observe(names).level == 0 and token_of(names) != before, what=lambda: str(observe(names)))
        assert tell(first, "query") == "query"
    wait_until(lambda: is_ready(names.pool), within=10)


def test_a_coordinator_killed_while_it_retires_is_carried_on(coordinator: CoordinatorProcess) -> None:
    """Whoever adopts a retired segment keeps it retired until it is left, and then opens the successor."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        conn = pool.checkout("work")
        before = token_of(names)
        assert main(["retire", names.pool, "--no-wait"]) == 0
        coordinator.kill()
        coordinator.start()
        assert token_of(names) == before
        assert "segment-retired" in {f.code for f in observe(names).findings}
        pool.checkin(conn)
        wait_until(lambda: "successor of the retired segment is open" in coordinator.log)
        with pool.connection("work") as conn:
            assert one_value(conn, "select 1") == 1
        assert token_of(names) != before


def test_caps_hold_at_the_server_while_segments_follow_each_other(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """Under load no checkout fails and the server never sees more sessions than the cap, over several successors."""
    names = coordinator.names
    until = time.monotonic() + 4
    errors: list[str] = []
    most = served = 0

    def load() -> None:
        nonlocal served
        while time.monotonic() < until:
            try:
                with pool.connection("work", timeout=15) as conn:
                    one_value(conn, "select pg_sleep(0.002)::text")
                served += 1
            except Exception as error:  # noqa: BLE001  named below
                errors.append(repr(error))
                return

    with pool_of(names.pool) as pool, Pool(names.pool) as other:
        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        tokens = set()
        while time.monotonic() < until - 1:
            tokens.add(token_of_when_there(names))
            main(["retire", names.pool, "--within", "10"])
            with other.connection("work", timeout=10) as conn:
                one_value(conn, "select 1")
            most = max(most, len(sessions(cluster.primary, names.pool)))
        for thread in threads:
            thread.join(20)
    assert errors == []
    assert most <= CAP
    assert len(tokens) >= 2
    assert served > 100


def token_of_when_there(names: Names) -> int:
    """Return the token of a segment that may be just opening."""
    found: list[int] = []
    wait_until(lambda: _noted(names, found))
    return found[0]


def _noted(names: Names, found: list[int]) -> bool:
    try:
        found.append(token_of(names))
    except MechanismError:
        return False
    return True


def test_a_bad_file_retires_nothing(coordinator: CoordinatorProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Retiring with a file that no successor could be made from is refused, and says why."""
    names = coordinator.names
    coordinator.config.write_text(coordinator.config.read_text() + "\nnonsense = 1\n")
    assert main(["retire", names.pool]) == 1
    assert "nonsense" in capsys.readouterr().err
    with Pool(names.pool) as pool, pool.connection("work") as conn:
        assert one_value(conn, "select 1") == 1


def test_a_worker_without_a_background_thread_leaves_at_its_next_checkout(
    coordinator: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread runs, a warm checkout notices by the endpoint's epoch, gives back, and gets the successor."""
    monkeypatch.setattr(Attachment, "start_background", lambda _: None)
    names = coordinator.names
    with pool_of(names.pool) as pool:
        with pool.connection("work") as conn:
            first = conn.get_backend_pid()
        with pool.connection("work") as conn:
            assert conn.get_backend_pid() == first
        before = token_of(names)
        assert main(["retire", names.pool, "--no-wait"]) == 0
        with pool.connection("work", timeout=5) as conn:
            assert conn.get_backend_pid() != first
        assert token_of(names) != before


def test_dropped_and_broken_connections_do_not_keep_a_retired_segment(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """A handle that is forgotten and one whose session ended go home as well, and the row with them."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        forgotten, broken = pool.checkout("work"), pool.checkout("work")
        before = token_of(names)
        assert main(["retire", names.pool, "--no-wait"]) == 0
        end_session(cluster.primary, backend(broken))
        pool.checkin(broken)
        del forgotten
        with pool.connection("work", timeout=10) as conn:
            assert one_value(conn, "select 1") == 1
        assert token_of(names) != before


def test_a_closed_pool_leaves_when_its_last_connection_comes_home(coordinator: CoordinatorProcess) -> None:
    """Closing a pool while a connection is in use keeps the row exactly until that one is checked in."""
    names = coordinator.names
    pool = Pool(names.pool)
    conn = pool.checkout("work")
    pool.close()
    assert living(names) == [os.getpid()]
    conn.close()
    assert living(names) == []


def test_a_waiting_thread_gets_the_successor(coordinator: CoordinatorProcess) -> None:
    """Threads that wait for a permit when the segment is retired are served by its successor, in their time."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        held = [pool.checkout("work") for _ in range(CAP)]
        served: list[int] = []

        def use() -> None:
            with pool.connection("work", timeout=10) as mine:
                served.append(one_value(mine, "select 1"))

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: observe(names).groups[0].waiting == 3, what=lambda: str(observe(names).groups))
        assert main(["retire", names.pool, "--no-wait"]) == 0
        for conn in held:
            conn.close()
        for thread in threads:
            thread.join(15)
        assert served == [1, 1, 1]
