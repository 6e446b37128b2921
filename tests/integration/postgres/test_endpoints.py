"""Faults of real servers, and of the network before them: which state follows, and how soon.

`pg1` is a server, `pg2` the same server behind a relay.  The bounds are computed from the settings of the probes;
SLACK_S is for a busy machine.  What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import psycopg2
import pytest

from shmpool import NoEligibleEndpoint
from shmpool.control_client import tell
from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.states import Health, Verdict
from shmpool.words import Status
from tests.support.coordinator import CoordinatorProcess
from tests.support.endpoints import (
    ANY,
    FALL,
    FAST_S,
    INTER_S,
    JITTER,
    LATE_DOWN_S,
    PROBE,
    REFUSED_DOWN_S,
    SILENT_DOWN_S,
    SLACK_S,
    TIMEOUT_S,
    UP_S,
    WATCHER,
    WRITE,
    after_probes,
    coordinating,
    endpoint,
    findings,
    is_in,
    killed,
    probes_of,
    seconds_until,
    stopped,
)
from tests.support.postgres import frozen
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import is_whole, one_value, pool_of, read_line, worker
from tools.pg_cluster import Cluster, Server


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that each test may stop, freeze and break, and leaves running and in order."""
    with Cluster(settings={"max_connections": "30"}) as own:
        own.primary.execute(f"CREATE ROLE {WATCHER} LOGIN SUPERUSER")
        own.primary.execute("CREATE DATABASE watched")
        yield own.primary


@pytest.fixture
def relay(victim: Server) -> Iterator[Relay]:
    """A relay in front of the victim."""
    with Relay(victim.port) as relay:
        yield relay


@pytest.fixture
def coordinator(pool_name: str, victim: Server, relay: Relay) -> Iterator[CoordinatorProcess]:
    """A coordinator of `pg1`, the victim, and `pg2`, the same behind the relay."""
    with coordinating(pool_name, {"pg1": victim.port, "pg2": relay.port}, ANY) as process:
        yield process


# -- a server, or the way to it, that fails


Fault = Callable[[Server, Relay], AbstractContextManager[None]]
FAULTS: Final[dict[str, tuple[Fault, str, float]]] = {
    "stopped": (lambda server, _: stopped(server), "pg1", REFUSED_DOWN_S),
    "postmaster killed": (lambda server, _: killed(server), "pg1", REFUSED_DOWN_S),
    "frozen": (lambda server, _: frozen(server), "pg1", SILENT_DOWN_S),
    "black hole": (lambda _, relay: relay.black_hole(), "pg2", SILENT_DOWN_S),
    "delay": (lambda _, relay: relay.delay(2 * TIMEOUT_S), "pg2", LATE_DOWN_S),
    "resets": (lambda _, relay: relay.resets(), "pg2", REFUSED_DOWN_S),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_down_and_up(victim: Server, relay: Relay, pool_name: str, coordinator: CoordinatorProcess, fault: str) -> None:
    """DOWN within the time that the settings imply for the fault, UP again after its cure."""
    inject, name, down_s = FAULTS[fault]
    with inject(victim, relay):
        took = seconds_until(is_in(pool_name, name, Health.DOWN), down_s, coordinator)
        if name == "pg2":
            assert endpoint(pool_name, "pg1").health is Health.UP
    came_back = seconds_until(is_in(pool_name, name, Health.UP), UP_S, coordinator)
    print(f"\n{fault}: DOWN after {took:.3f} s (bound {down_s:.2f}), UP after {came_back:.3f} s (bound {UP_S:.2f})")


def test_slow_is_not_down(relay: Relay, pool_name: str, coordinator: CoordinatorProcess) -> None:
    """A delay within the timeout takes nothing out; the latency shows it."""
    with relay.delay(TIMEOUT_S / 6):
        wait_until(lambda: (endpoint(pool_name, "pg2").latency or 0) > TIMEOUT_S / 4, what=lambda: coordinator.log)
        after_probes(coordinator, FALL)
        assert endpoint(pool_name, "pg2").health is Health.UP


@pytest.mark.parametrize("fault", ["stopped", "frozen", "black hole"])
def test_idle_connections_of_a_down_endpoint(
    victim: Server, relay: Relay, pool_name: str, coordinator: CoordinatorProcess, fault: str
) -> None:
    """Idle connections are closed within half a second of DOWN, without a checkout; none is handed out again."""
    inject, name, down_s = FAULTS[fault]
    with pool_of(pool_name) as pool:
        conns = [pool.checkout("any") for _ in range(6)]
        backends = {conn.get_backend_pid() for conn in conns}
        for conn in conns:
            conn.close()
        resting = int(pool.statistics()["any"]["idle"])
        there = endpoint(pool_name, name).idle
        assert there >= 3
        with inject(victim, relay):
            seconds_until(is_in(pool_name, name, Health.DOWN), down_s, coordinator)
            closed_s = seconds_until(lambda: pool.statistics()["any"]["idle"] <= resting - there, 0.5, coordinator)
            assert closed_s < 0.5
            if fault == "black hole":
                again = [pool.checkout("any", timeout=1) for _ in range(6)]
                assert endpoint(pool_name, name).active == 0
                for conn in again:
                    conn.close()
        seconds_until(is_in(pool_name, name, Health.UP), UP_S, coordinator)
        if fault == "stopped":
            with pool.connection("any") as conn:
                assert conn.get_backend_pid() not in backends
    print(f"\n{fault}: {there} idle connections closed {closed_s * 1000:.0f} ms after DOWN was seen")


# -- servers that answer, but not as one would like


@contextmanager
def configured_wrong(server: Server, how: str) -> Iterator[None]:
    """Break what the coordinator's own user needs, and end its session."""
    hba = server.data / "pg_hba.conf"
    before = hba.read_text()
    cures = [f"ALTER ROLE {WATCHER} PASSWORD NULL VALID UNTIL 'infinity'"]
    if how in ("wrong password", "expired password"):
        hba.write_text(f"host all {WATCHER} 127.0.0.1/32 scram-sha-256\n{before}")
        server.execute(f"ALTER ROLE {WATCHER} PASSWORD 'now-another'")
        if how == "expired password":
            server.execute(f"ALTER ROLE {WATCHER} PASSWORD 'of-the-passfile' VALID UNTIL '2000-01-01'")
    else:
        server.execute("DROP DATABASE watched WITH (FORCE)")
        cures.append("CREATE DATABASE watched")
    server.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        hba.write_text(before)
        for cure in cures:
            server.execute(cure)
        server.execute("SELECT pg_reload_conf()")


def end_watchers(server: Server) -> None:
    """End the coordinator's sessions."""
    server.execute(f"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE usename = '{WATCHER}'")


@pytest.mark.parametrize("how", ["wrong password", "expired password", "missing database"])
def test_misconfigured_coordinator(victim: Server, pool_name: str, tmp_path: Path, how: str) -> None:
    """A coordinator that may not look takes nothing out: the endpoint is UP, misconfigured and loud; workers go on."""
    passfile = tmp_path / "passwords"
    passfile.write_text("*:*:*:*:of-the-passfile\n")
    passfile.chmod(0o600)
    probe = f"{PROBE}\nconninfo = 'user={WATCHER} dbname=watched passfile={passfile}'"
    with (
        coordinating(pool_name, {"pg1": victim.port}, ANY, probe) as coordinator,
        pool_of(pool_name) as pool,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(configured_wrong(victim, how))
        end_watchers(victim)
        is_told = lambda: endpoint(pool_name, "pg1").verdict is Verdict.MISCONFIGURED  # noqa: E731
        took = seconds_until(is_told, JITTER * (INTER_S + FAST_S), coordinator)
        for _ in range(FALL + 1):
            after_probes(coordinator, 1)
            with pool.connection("any") as conn:
                assert one_value(conn, "SELECT 1") == 1
        assert endpoint(pool_name, "pg1").health is Health.UP
        assert "endpoint-misconfigured" in findings(pool_name)
        assert "of-the-passfile" not in coordinator.log
        stack.close()
        seconds_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.OK, UP_S, coordinator)
    print(f"\n{how}: misconfigured after {took:.3f} s")


def test_full_server_is_up(victim: Server, pool_name: str) -> None:
    """`too many clients` is UP and full, never DOWN; a slot that frees shows on the next probe."""
    held: list[psycopg2.extensions.connection] = []
    try:
        while True:
            try:
                held.append(psycopg2.connect(victim.conninfo()))
            except psycopg2.OperationalError:
                break
        with coordinating(pool_name, {"pg1": victim.port}, ANY) as coordinator:
            after_probes(coordinator, FALL + 2)
            found = endpoint(pool_name, "pg1")
            assert (found.health, found.verdict) == (Health.UP, Verdict.FULL)
            assert "endpoint-full" in findings(pool_name)
            assert "DOWN" not in coordinator.log
            for connection in held:
                connection.close()
            seconds_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.OK, JITTER * INTER_S, coordinator)
    finally:
        for connection in held:
            connection.close()


def test_recovery(victim: Server, pool_name: str, coordinator: CoordinatorProcess) -> None:
    """A server that starts in recovery (57P03) is DOWN as starting, and UP soon after it takes connections."""
    victim.execute("ALTER SYSTEM SET hot_standby = off")
    victim.stop()
    victim.put("standby.signal")
    starting = threading.Thread(target=victim.start)
    starting.start()
    try:
        wait_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.STARTING, what=lambda: coordinator.log)
        assert endpoint(pool_name, "pg1").health is Health.DOWN
        assert victim.pid is not None
        victim.put("promote")
    finally:
        while starting.is_alive():
            if victim.pid is not None:
                os.kill(victim.pid, signal.SIGUSR1)
            starting.join(0.1)
    took = seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S, coordinator)
    victim.execute("ALTER SYSTEM RESET hot_standby")
    victim.restart()
    seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S, coordinator)
    print(f"\nstart-up in recovery: UP {took:.3f} s after it took connections")


# -- the coordinator itself dead, alone or slow


def test_coordinator_killed_while_an_endpoint_is_down(victim: Server, pool_name: str) -> None:
    """Killed while an endpoint is DOWN: workers try for themselves and are served, before and after that is stale."""
    stale_s = 1.0
    with (
        coordinating(pool_name, {"pg1": victim.port}, ANY, extra=f'stale_after = "{stale_s}s"') as coordinator,
        pool_of(pool_name) as pool,
    ):
        with pool.connection("any"):
            pass
        with stopped(victim):
            seconds_until(is_in(pool_name, "pg1", Health.DOWN), REFUSED_DOWN_S, coordinator)
            coordinator.kill()
            died = time.monotonic()
            with pytest.raises(NoEligibleEndpoint, match="tried"), pool.connection("any", timeout=0):
                pass
        with pool.connection("any", timeout=stale_s + SLACK_S) as conn:
            assert one_value(conn, "SELECT 1") == 1
        served_s = time.monotonic() - died
        wait_until(lambda: time.monotonic() - died > stale_s)
        conns = [pool.checkout("any", timeout=0) for _ in range(2)]
        assert [one_value(conn, "SELECT 1") for conn in conns] == [1, 1]
        for conn in conns:
            conn.close()
        assert endpoint(pool_name, "pg1").health is Health.DOWN, "nobody is there to say otherwise"
        coordinator.start()
    assert served_s < stale_s + SLACK_S
    print(f"\ncoordinator killed, endpoint back: served {served_s:.3f} s later (stale_after {stale_s:g} s)")


def test_roles_without_a_coordinator(cluster: Cluster, pool_name: str) -> None:
    """Once nobody tells roles, each is checked on the open connection: no write goes to a standby."""
    ports = {"pg1": cluster.standbys[0].port, "pg2": cluster.primary.port}
    with (
        coordinating(pool_name, ports, WRITE, extra='stale_after = "200ms"') as coordinator,
        pool_of(pool_name) as pool,
    ):
        coordinator.kill()
        died = time.monotonic()
        wait_until(lambda: time.monotonic() - died > 0.3)
        conns = [pool.checkout("write") for _ in range(6)]
        assert {one_value(conn, "SELECT inet_server_port()") for conn in conns} == {cluster.primary.port}
        assert pool.statistics()["write"]["opens"] > 6, "the standby was tried as well"
        for conn in conns:
            conn.close()
        coordinator.start()


USES = """
import sys
from shmpool import Pool

pool = Pool(sys.argv[1])
print("ready", flush=True)
while True:
    with pool.connection("any") as conn, conn.cursor() as cur:
        cur.execute("SELECT pg_sleep(0.15)")
"""


def test_isolated_coordinator(victim: Server, relay: Relay, pool_name: str) -> None:
    """Probes that get no answer do not take out what workers use with success; status says so, since when and why."""
    probe = f"{PROBE}\nconninfo = 'user={WATCHER}'"
    with (
        coordinating(pool_name, {"pg1": relay.port}, ANY, probe) as coordinator,
        worker(USES, pool_name) as process,
    ):
        assert read_line(process) == "ready"
        with relay.black_hole(WATCHER):
            began = time.monotonic()
            after_probes(coordinator, FALL + 2)
            lasted = time.monotonic() - began
            assert is_in(pool_name, "pg1", Health.UP)()
            found = endpoint(pool_name, "pg1")
            assert found.verdict is Verdict.TIMEOUT
            text = findings(pool_name)["endpoint-probe-failing"]
            assert "timeout" in text
            assert found.failing is not None
            assert found.failing == pytest.approx(lasted, abs=0.7)
            assert process.poll() is None
            process.kill()
            process.wait()
            seconds_until(is_in(pool_name, "pg1", Health.DOWN), SILENT_DOWN_S, coordinator)
        seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S, coordinator)
    print(f"\nisolated coordinator, connection nearly always in use: UP through {lasted:.1f} s of bad probes: {text}")


CROWD = """
import os, sys, time
from shmpool import Pool

def work():
    pool = Pool(sys.argv[1])
    while True:
        with pool.connection("any", timeout=60) as conn, conn.cursor() as cur:
            cur.execute("SELECT 1")
        time.sleep(0.2)

for number in range(int(sys.argv[2])):
    if os.fork() == 0:
        import ctypes, signal
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        work()
print("ready", flush=True)
time.sleep(60)
"""


def test_probes_do_not_grow_with_workers(victim: Server, relay: Relay, pool_name: str) -> None:
    """An endpoint sees as many probes with 64 workers as with one, over one kept connection."""
    probe = f"{PROBE}\nconninfo = 'user={WATCHER}'"
    rates = {}
    with coordinating(pool_name, {"pg1": relay.port}, ANY, probe) as coordinator:
        for workers in (1, 64):
            with worker(CROWD, pool_name, str(workers)) as process:
                assert read_line(process) == "ready"
                wait_until(
                    lambda workers=workers: coordinator.request("info")["workers"] >= workers,  # type: ignore[misc]
                    within=20,
                )
                requests, connects, began = relay.requests[WATCHER], relay.connects[WATCHER], time.monotonic()
                after_probes(coordinator, 10)
                rates[workers] = (relay.requests[WATCHER] - requests) / (time.monotonic() - began)
                assert relay.connects[WATCHER] == connects
            wait_until(lambda: is_whole(pool_name), within=10)
    print(f"\nprobes a second: {rates[1]:.1f} with 1 worker, {rates[64]:.1f} with 64 (inter {INTER_S:g} s)")
    assert max(rates.values()) < 1.25 / INTER_S


def test_evidence_is_coalesced(victim: Server, pool_name: str) -> None:
    """Much evidence costs one extra probe in 100 ms at most, and does not put off what later evidence asks for."""
    probe = '[probe]\ninter = "30s"\nfastinter = "30s"'
    with coordinating(pool_name, {"pg1": victim.port}, ANY, probe) as coordinator:
        before, began = probes_of(coordinator), time.monotonic()
        for _ in range(50):
            tell(Names.of(pool_name), "evidence", 1.0, endpoint=0)
        wait_until(lambda: probes_of(coordinator) > before)
        wait_until(lambda: time.monotonic() - began > 0.3)
        made = probes_of(coordinator) - before
        assert 1 <= made <= 2 + (time.monotonic() - began) / 0.1
        tell(Names.of(pool_name), "evidence", 1.0, endpoint=0)
        seconds_until(lambda: probes_of(coordinator) > before + made, 0.1, coordinator)


FINDS_OUT = """
import sys, time
import psycopg2
from shmpool import Pool

pool = Pool(sys.argv[1])
for conn in [pool.checkout("any") for _ in range(2)]:
    conn.close()
print("ready", flush=True)
sys.stdin.readline()
print("works", flush=True)
until = time.monotonic() + 1.5
while time.monotonic() < until:
    try:
        with pool.connection("any") as conn, conn.cursor() as cur:
            cur.execute("SELECT 1")
    except psycopg2.OperationalError:
        print(time.monotonic(), flush=True)
    time.sleep(0.002)
print("end", flush=True)
"""
PROBE_OF_PRODUCTION: Final = '[probe]\ninter = "2s"\nfastinter = "0.5s"'


def until_end(process: subprocess.Popen[str]) -> Iterator[str]:
    """Return the lines that a program printed before `end`."""
    while (line := read_line(process)) != "end":
        yield line


def test_news_of_a_killed_server(victim: Server, cluster: Cluster, pool_name: str) -> None:
    """Under load a killed server is avoided 100 ms after the first error anywhere, though probes are seconds apart."""
    workers = 8
    groups = {"any": 'connections = 20\ntarget = "any"\nautocommit = true\nper_worker_max = 2'}
    ports = {"pg1": victim.port, "pg2": cluster.primary.port}
    with (
        coordinating(pool_name, ports, groups, PROBE_OF_PRODUCTION) as coordinator,
        contextlib.ExitStack() as stack,
    ):
        segment = coordinator.attach()
        stack.callback(segment.release)
        crowd = [stack.enter_context(worker(FINDS_OUT, pool_name)) for _ in range(workers)]
        assert [read_line(process) for process in crowd] == ["ready"] * workers
        for process in crowd:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert [read_line(process) for process in crowd] == ["works"] * workers
        held = endpoint(pool_name, "pg1").held
        status_at = segment.layout.at(ENDPOINTS, 0, "status")
        at = time.monotonic()
        with killed(victim):
            wait_until(lambda: Status.of(segment.words[status_at]).health is Health.DOWN, every=0.001)
            known = time.monotonic()
            errors = [list(map(float, until_end(process))) for process in crowd]
    first = min(min(times) for times in errors if times)
    last = [max([first, *times]) - first for times in errors]
    print(
        f"\nserver killed, {workers} workers with {held} connections to it: first error after "
        f"{(first - at) * 1000:.0f} ms, DOWN {(known - first) * 1000:.1f} ms later; {sum(map(len, errors))} failed "
        f"uses, the last {statistics.median(last) * 1000:.1f} ms (median of the workers; most: "
        f"{max(last) * 1000:.1f} ms) after the first"
    )
    # One extra probe in 100 ms at most; the first may still be answered by a server that is just dying.
    assert known - first < 0.25, f"DOWN {known - first:.3f} s after the first error"
    assert statistics.median(last) < 0.1
    assert sum(map(len, errors)) <= held, f"{errors} with {held} connections"
