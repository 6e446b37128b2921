"""Health is advice: a coordinator that is wrong, dead or alone never makes it worse than having none.

The coordinator has a user of its own, so that a relay can cut it off from a server that workers reach.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg2
import pytest

from shmpool import NoEligibleEndpoint, Pool
from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health, Role, Verdict
from shmpool.status import EndpointReport
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import is_ready, is_whole, one_value, pool_of, read_line, worker
from tools.pg_cluster import Cluster, Server

WATCHER: Final = "watcher"  # the coordinator's own user
PLAIN: Final = "sslmode=disable gssencmode=disable"  # else libpq connects up to three times where it is reset
TIMEOUT_S: Final = 0.3
PROBE: Final = (
    f'[probe]\nconninfo = "user={WATCHER}"\ninter = "0.1s"\nfastinter = "0.05s"\ndowninter = "0.2s"\n'
    f'timeout = "{TIMEOUT_S}s"\nrise = 2\nfall = 3'
)
KEYS: Final = "connections = 100\nautocommit = true\ntimeout = '5s'"
ANY: Final = {"any": f'{KEYS}\ntarget = "any"'}
ROLES: Final = {"write": f'{KEYS}\ntarget = "primary"', "read": f'{KEYS}\ntarget = "replica"'}
SOON_S: Final = 1.0  # for a checkout that connects, on a busy machine


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """A primary with a standby; each test leaves both running, and in their roles."""
    with watched_pair() as cluster:
        yield cluster


@pytest.fixture
def relay(pair: Cluster) -> Iterator[Relay]:
    """A relay in front of the primary."""
    with Relay(pair.primary.port) as relay:
        yield relay


@contextmanager
def watched_pair() -> Iterator[Cluster]:
    """A primary with a standby, and a user for the coordinator."""
    with Cluster(standbys=1, settings={"max_connections": "40"}) as cluster:
        cluster.primary.execute(f"CREATE ROLE {WATCHER} LOGIN SUPERUSER")
        standby = cluster.standbys[0]
        wait_until(lambda: standby.execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{WATCHER}'"), within=10)
        yield cluster


@contextmanager
def coordinating(
    pool: str,
    ports: Mapping[str, int],
    groups: dict[str, str] = ANY,
    *,
    probe: str = PROBE,
    stale_after: str = "5s",
    more: str = PLAIN,
) -> Iterator[CoordinatorProcess]:
    """Run a coordinator that has found every endpoint UP; nobody starts another one."""
    endpoints = {
        name: endpoint_keys(f"host=127.0.0.1 port={port} user=postgres dbname=postgres {more}", max_connections=900)
        for name, port in ports.items()
    }
    extra = f'[coordinator]\nautostart = false\nstale_after = "{stale_after}"\n{probe}'
    with running_coordinator(pool_config(pool, endpoints, groups, extra), pool) as process:
        wait_until(lambda: is_ready(pool), within=10, what=lambda: process.log)
        yield process


def endpoint(pool: str, name: str = "pg1") -> EndpointReport:
    """Return how an endpoint is."""
    return next(e for e in observe(Names.of(pool)).endpoints if e.name == name)


def wait_for(coordinator: CoordinatorProcess, health: Health, name: str = "pg1", within: float = 5.0) -> None:
    """Wait until an endpoint is in a health."""
    pool = coordinator.names.pool
    wait_until(lambda: endpoint(pool, name).health is health, within=within, what=lambda: coordinator.log)


def probes_of(coordinator: CoordinatorProcess) -> int:
    """Return how often the first endpoint was probed."""
    segment = coordinator.attach()
    try:
        return int(segment.words[segment.layout.at(ENDPOINTS, 0, "probes")])
    finally:
        segment.release()


def findings(pool: str) -> dict[str, str]:
    """Return what status finds, by code."""
    return {finding.code: str(finding) for finding in observe(Names.of(pool)).findings}


def served_by(pool: Pool, group: str, timeout: float = 5.0) -> int:
    """Return the port of the server that serves the next checkout."""
    with pool.connection(group, timeout=timeout) as conn:
        return int(one_value(conn, "SELECT inet_server_port()"))


# -- cut off from servers that nobody uses just then


def test_idle_pool_of_an_isolated_coordinator(relay: Relay, pair: Cluster, pool_name: str) -> None:
    """DOWN only for the coordinator: the first to ask is served, then everybody, loudly; unused it is DOWN again."""
    with coordinating(pool_name, {"pg1": relay.port}) as coordinator, pool_of(pool_name) as pool:
        with relay.black_hole(WATCHER):
            wait_for(coordinator, Health.DOWN)
            began = time.monotonic()
            assert served_by(pool, "any") == pair.primary.port
            took = time.monotonic() - began
            wait_for(coordinator, Health.UP, within=SOON_S)
            assert endpoint(pool_name).verdict is Verdict.TIMEOUT
            assert "timeout" in findings(pool_name)["endpoint-probe-failing"]
            with Pool(pool_name) as other, other.connection("any", timeout=1):
                pass
            wait_for(coordinator, Health.DOWN)
            assert served_by(pool, "any", timeout=0) == pair.primary.port, "in each outage the first try comes at once"
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.OK, what=lambda: coordinator.log)
        assert endpoint(pool_name).health is Health.UP
    assert took < SOON_S
    print(f"\nidle pool, isolated coordinator: served after {took * 1000:.0f} ms")


SILENT: Final = """
import sys
from shmpool import Pool
from shmpool.attachment import be_without_threads

be_without_threads()
pool = Pool(sys.argv[1])
conns = [pool.checkout("any") for _ in range(3)]
print("served", flush=True)
sys.stdin.readline()
"""


def test_success_shows_without_a_message(relay: Relay, pool_name: str) -> None:
    """Of a worker without a control connection the coordinator sees in the slot table that an endpoint serves."""
    with coordinating(pool_name, {"pg1": relay.port}) as coordinator:
        with relay.black_hole(WATCHER):
            wait_for(coordinator, Health.DOWN)
            with worker(SILENT, pool_name) as process:
                assert read_line(process) == "served"
                wait_for(coordinator, Health.UP)
                assert endpoint(pool_name).verdict is Verdict.TIMEOUT
        wait_until(lambda: is_whole(pool_name), within=10)


def test_vacant_role(relay: Relay, pair: Cluster, pool_name: str) -> None:
    """A primary that only the coordinator does not reach serves writes; reads stay on the replica all the while."""
    standby = pair.standbys[0].port
    ports = {"pg1": relay.port, "pg2": standby}
    with coordinating(pool_name, ports, ROLES) as coordinator, pool_of(pool_name) as pool:
        with relay.black_hole(WATCHER):
            wait_for(coordinator, Health.DOWN)
            assert served_by(pool, "read") == standby
            assert endpoint(pool_name).health is Health.DOWN, "nobody needed it"
            assert served_by(pool, "write") == pair.primary.port
            wait_for(coordinator, Health.UP, within=SOON_S)
            assert served_by(pool, "read") == standby
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.OK)


# -- a server that is DOWN for everybody


def test_reason_tells_what_the_try_met(relay: Relay, pool_name: str) -> None:
    """The caller gets NoEligibleEndpoint in its time, with the verdict and what came of trying all the same."""
    with coordinating(pool_name, {"pg1": relay.port}) as coordinator, pool_of(pool_name) as pool:
        with relay.resets():
            wait_for(coordinator, Health.DOWN)
            began = time.monotonic()
            with pytest.raises(NoEligibleEndpoint) as caught, pool.connection("any", timeout=0.3):
                pass
            took = time.monotonic() - began
            reason = caught.value.reasons["pg1"]
            assert reason.startswith("DOWN ("), reason
            assert "tried 0." in reason, reason
            assert "connection to server at" in reason, reason
        wait_for(coordinator, Health.UP)
    assert 0.3 <= took < 0.3 + SOON_S


def test_silent_server_costs_a_bounded_time(relay: Relay, pool_name: str) -> None:
    """A caller without time for more waits for one try, of the 2 seconds that libpq takes at least; not for another."""
    ports = {"pg1": relay.port, "pg2": relay.port}
    with coordinating(pool_name, ports) as coordinator, pool_of(pool_name) as pool:
        with relay.black_hole():
            wait_for(coordinator, Health.DOWN)
            wait_for(coordinator, Health.DOWN, "pg2")
            began = time.monotonic()
            with pytest.raises(NoEligibleEndpoint, match="timeout expired"), pool.connection("any", timeout=0.1):
                pass
            took = time.monotonic() - began
        wait_for(coordinator, Health.UP)
        wait_for(coordinator, Health.UP, "pg2")
    assert took < 2 + SOON_S


WORKERS: Final = 64
WATCHED_S: Final = 2.5
STORM: Final = """
import ctypes, os, signal, sys
from shmpool import NoEligibleEndpoint, Pool

pool_name, workers = sys.argv[1], int(sys.argv[2])
for number in range(workers):
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        pool = Pool(pool_name)
        while True:
            try:
                with pool.connection("any", timeout=1):
                    pass
            except NoEligibleEndpoint:
                pass
print("ready", flush=True)
sys.stdin.readline()
"""


def test_dead_server_is_not_stormed(relay: Relay, pool_name: str) -> None:
    """64 workers that want a server that is down connect at most 64 * (4 + t / 5) times in t seconds, and do try."""
    with coordinating(pool_name, {"pg1": relay.port}) as coordinator:
        with relay.hang_ups():
            wait_for(coordinator, Health.DOWN)
            before, began = relay.connects.get("postgres", 0), time.monotonic()
            with worker(STORM, pool_name, str(WORKERS)) as process:
                assert read_line(process) == "ready"
                wait_until(lambda: relay.connects.get("postgres", 0) - before >= WORKERS, within=20)
                until = time.monotonic() + WATCHED_S
                wait_until(lambda: time.monotonic() >= until, within=2 * WATCHED_S)
                seconds = time.monotonic() - began
                tries = relay.connects.get("postgres", 0) - before
        wait_for(coordinator, Health.UP)
        wait_until(lambda: is_whole(pool_name), within=20)
    print(f"\n{WORKERS} workers, server down: {tries} connects in {seconds:.1f} s")
    assert tries <= WORKERS * (4 + seconds / 5)


# -- roles that nobody tells


@pytest.mark.parametrize("how", ["killed", "isolated"])
def test_promotion_that_no_coordinator_sees(pool_name: str, how: str) -> None:
    """Killed or cut off, the coordinator knows the old roles: writes find the new primary, the old one gets none."""
    with (
        watched_pair() as cluster,
        Relay(cluster.primary.port) as one,
        Relay(cluster.standbys[0].port) as two,
        contextlib.ExitStack() as stack,
    ):
        old, new = cluster.primary, cluster.standbys[0]
        ports = {"pg1": one.port, "pg2": two.port}
        with coordinating(pool_name, ports, ROLES, stale_after="1s") as coordinator, pool_of(pool_name) as pool:
            assert served_by(pool, "write") == old.port
            pool.rest()
            with one.black_hole(WATCHER), two.black_hole(WATCHER):
                if how == "killed":
                    coordinator.kill()
                else:
                    wait_for(coordinator, Health.DOWN, "pg1")
                    wait_for(coordinator, Health.DOWN, "pg2")
                old.stop()
                new.promote()
                swapped = time.monotonic()
                assert served_by(pool, "write") == new.port
                took = time.monotonic() - swapped
                shutil.rmtree(old.data)
                returned = new.standby("returned")
                returned.port = old.port
                returned.start()
                stack.callback(returned.kill)
                assert served_by(pool, "read", timeout=10) == old.port
                assert served_by(pool, "write") == new.port
                if how == "isolated":
                    wait_for(coordinator, Health.UP, "pg1", within=SOON_S)
                    told = {name: endpoint(pool_name, name).role for name in ports}
                    assert told == {"pg1": Role.REPLICA, "pg2": Role.PRIMARY}
            if how == "killed":
                coordinator.start()
    print(f"\npromotion, coordinator {how}: writes served after {took:.3f} s")


def test_overtaken_primary_is_no_last_resort(pool_name: str) -> None:
    """With both primaries DOWN for the coordinator, the one of the older timeline is not tried for writes."""
    with watched_pair() as cluster, Relay(cluster.primary.port) as one, Relay(cluster.standbys[0].port) as two:
        new, ports = cluster.standbys[0], {"pg1": one.port, "pg2": two.port}
        brief = f"{PLAIN} connect_timeout=1"
        with coordinating(pool_name, ports, ROLES, more=brief) as coordinator, pool_of(pool_name) as pool:
            new.promote()
            wait_until(lambda: endpoint(pool_name).verdict is Verdict.ROLE_CONFLICT, what=lambda: coordinator.log)
            with one.black_hole(WATCHER), two.black_hole(WATCHER):
                wait_for(coordinator, Health.DOWN, "pg1")
                wait_for(coordinator, Health.DOWN, "pg2")
                assert endpoint(pool_name).verdict is Verdict.TIMEOUT
                with two.black_hole("postgres"), pytest.raises(NoEligibleEndpoint) as caught:
                    pool.checkout("write", timeout=0.5)
                assert "tried" in caught.value.reasons["pg2"]
                assert "tried" not in caught.value.reasons["pg1"]
                assert served_by(pool, "write", timeout=10) == new.port
        assert one.connects.get("postgres", 0) == 0


# -- passwords that expire


@contextmanager
def expired(server: Server, user: str) -> Iterator[None]:
    """Make a user's password one that has expired, and end its sessions."""
    hba = server.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{before}")
    server.execute(f"ALTER ROLE {user} PASSWORD 'long-ago' VALID UNTIL '2000-01-01'")
    server.execute("SELECT pg_reload_conf()")
    server.execute(f"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE usename = '{user}'")
    try:
        yield
    finally:
        hba.write_text(before)
        server.execute(f"ALTER ROLE {user} PASSWORD NULL VALID UNTIL 'infinity'")
        server.execute("SELECT pg_reload_conf()")


@pytest.fixture
def passfile(tmp_path: Path) -> Path:
    """A file with the password that has expired."""
    file = tmp_path / "passwords"
    file.write_text("*:*:*:*:long-ago\n")
    file.chmod(0o600)
    return file


def test_expired_password_of_the_coordinator(relay: Relay, pair: Cluster, pool_name: str, passfile: Path) -> None:
    """It takes nothing out, and an endpoint that went DOWN before comes back as soon as a worker is served."""
    probe = PROBE.replace(f"user={WATCHER}", f"user={WATCHER} passfile={passfile}")
    with coordinating(pool_name, {"pg1": relay.port}, probe=probe) as coordinator, pool_of(pool_name) as pool:
        with relay.black_hole(WATCHER):
            wait_for(coordinator, Health.DOWN)
        with expired(pair.primary, WATCHER):
            wait_until(lambda: endpoint(pool_name).verdict is Verdict.MISCONFIGURED, what=lambda: coordinator.log)
            before = probes_of(coordinator)
            assert served_by(pool, "any") == pair.primary.port
            wait_until(lambda: probes_of(coordinator) > before + 4)
            assert endpoint(pool_name).health is Health.UP
            assert "endpoint-misconfigured" in findings(pool_name)
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.OK, what=lambda: coordinator.log)


def test_expired_password_of_workers(relay: Relay, pair: Cluster, pool_name: str, passfile: Path) -> None:
    """It is told at once to those whose password it is, and takes nothing out for the others."""
    pair.primary.execute("CREATE ROLE reporter LOGIN")
    groups = {**ANY, "reports": f'{KEYS}\ntarget = "any"\nconninfo = "user=reporter passfile={passfile}"'}
    try:
        with (
            coordinating(pool_name, {"pg1": relay.port}, groups) as coordinator,
            pool_of(pool_name) as pool,
            expired(pair.primary, "reporter"),
        ):
            before = probes_of(coordinator)
            began = time.monotonic()
            with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
                pool.checkout("reports", timeout=5)
            assert time.monotonic() - began < SOON_S
            wait_until(lambda: probes_of(coordinator) > before + 4)
            assert (endpoint(pool_name).health, endpoint(pool_name).verdict) == (Health.UP, Verdict.OK)
            assert served_by(pool, "any") == pair.primary.port
    finally:
        pair.primary.execute("DROP ROLE reporter")


# -- a coordinator that stood still


def test_stopped_coordinator_acts_on_nothing_old(relay: Relay, pool_name: str) -> None:
    """Continued after a long stop: a probe that ran out of time meanwhile takes nothing out, and is made anew."""
    probe = PROBE.replace("fall = 3", "fall = 2").replace(f'"{TIMEOUT_S}s"', '"1s"')
    with coordinating(pool_name, {"pg1": relay.port}, probe=probe, stale_after="1s") as coordinator:
        with pool_of(pool_name) as pool, relay.black_hole(WATCHER):
            connects = relay.connects[WATCHER]
            relay.cut()
            wait_until(lambda: relay.connects[WATCHER] > connects)
            os.kill(coordinator.pid, signal.SIGSTOP)
            try:
                stopped_until = time.monotonic() + 1.5
                wait_until(lambda: time.monotonic() >= stopped_until)
                assert served_by(pool, "any")
            finally:
                os.kill(coordinator.pid, signal.SIGCONT)
            wait_until(lambda: "stood still" in coordinator.log)
        before = probes_of(coordinator)
        wait_until(lambda: probes_of(coordinator) > before + 3, what=lambda: coordinator.log)
        assert endpoint(pool_name).health is Health.UP
        assert "lost" in coordinator.log, "one bad probe before the stop"
        assert "timed out" not in coordinator.log, coordinator.log
