"""Endpoints that operators drain, maintain and make ready, on real servers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shmpool.cli import main
from shmpool.control_client import ControlError, request
from shmpool.endpoints import status_at
from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.pool_errors import NoEligibleEndpoint
from shmpool.segment import Segment, attach
from shmpool.states import Admin
from shmpool.status import EndpointReport
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import backend, is_connected, is_ready, one_value, pool_of, sessions
from tools.pg_cluster import Cluster

LEAVE_S = 2.0  # until nothing is left at a drained endpoint under load; a tick and a checkin when nothing else runs
EMPTY_S = 1.0  # for which nothing new may appear there
LOAD_S = 10.0
GROUPS = {
    "any": 'connections = 6\ntarget = "any"\nautocommit = true\nmax_lifetime = "1s"',
    "read": 'connections = 4\ntarget = "replica"\nautocommit = true',
    "write": 'connections = 4\ntarget = "primary"\nautocommit = true',
}


def config(pool: str, cluster: Cluster, *, endpoints: tuple[str, ...] = ("pg1", "pg2"), cap: int = 20) -> str:
    """Return a pool of a primary `pg1` and a standby `pg2`."""
    servers = {"pg1": cluster.primary, "pg2": cluster.standbys[0]}
    keys = {name: endpoint_keys(servers[name].conninfo(), max_connections=cap) for name in endpoints}
    return pool_config(pool, keys, GROUPS, '[probe]\ninter = "0.2s"\nfastinter = "0.1s"')


@pytest.fixture
def coordinator(pool_name: str, cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator that knows its endpoints."""
    with running_coordinator(config(pool_name, cluster), pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


def tell(wish: str, endpoint: str, names: Names) -> int:
    """Run `shmpool drain`, `maint` or `ready`; return its exit code."""
    return main([wish, endpoint, "--pool", names.pool])


def endpoint(names: Names, name: str = "pg2") -> EndpointReport:
    """Return what `shmpool status` knows of an endpoint."""
    (found,) = [one for one in observe(names).endpoints if one.name == name]
    return found


def probes(names: Names, index: int) -> int:
    """Return how often an endpoint was probed."""
    segment = attach(names)
    try:
        return int(segment.words[segment.layout.at(ENDPOINTS, index, "probes")])
    finally:
        segment.release()


def test_a_drain_under_load_fails_no_request_and_ready_brings_sessions_back(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """Within 2 s of `drain` no session is left, none appears while it lasts; after `ready` they return; 0 errors."""
    names, standby = coordinator.names, cluster.standbys[0]
    arguments = [names.pool, "any", "--processes", "4", "--threads", "2", "--seconds", str(LOAD_S)]
    load = subprocess.Popen([sys.executable, "-m", "tests.support.load", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(sessions(standby, names.pool)) >= 2, within=LOAD_S)
        assert tell("drain", "pg2", names) == 0
        wait_until(lambda: not sessions(standby, names.pool), within=LEAVE_S)
        until = time.monotonic() + EMPTY_S
        while time.monotonic() < until:
            assert sessions(standby, names.pool) == []
            assert endpoint(names).held == 0
        assert tell("ready", "pg2", names) == 0
        wait_until(lambda: sessions(standby, names.pool), within=4)  # the first of its share: test_return.py
        assert load.poll() is None, "the load was to last through all of this"
        told = json.loads(load.communicate(timeout=3 * LOAD_S)[0])
    finally:
        load.kill()
        load.communicate()
    assert [error for answer in told for error in answer["errors"]] == []
    assert all(served > 0 for answer in told for served in answer["served"])


def test_idle_connections_leave_at_once_and_busy_ones_at_checkin(
    coordinator: CoordinatorProcess, cluster: Cluster
) -> None:
    """What rests is closed at once, what is in use stays usable until checkin, what comes next is told why not."""
    names, standby = coordinator.names, cluster.standbys[0]
    with pool_of(names.pool) as pool:
        busy, idle = pool.checkout("read"), pool.checkout("read")
        pids = backend(busy), backend(idle)
        pool.checkin(idle)
        assert tell("drain", "pg2", names) == 0
        wait_until(lambda: not is_connected(standby, pids[1]), within=1)
        assert one_value(busy, "select 1") == 1
        with pytest.raises(NoEligibleEndpoint, match="pg2: drain"):
            pool.checkout("read", timeout=0.1)
        pool.checkin(busy)
        wait_until(lambda: not is_connected(standby, pids[0]), within=1)
        assert tell("ready", "pg2", names) == 0
        with pool.connection("read") as conn:
            assert backend(conn) not in pids


def test_a_drain_between_choosing_and_opening_leads_elsewhere(
    coordinator: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that is drained once a permit of it was claimed gets no connection all the same."""
    names, drained = coordinator.names, list[str]()

    def drain_first(segment: Segment, index: int) -> int:
        if not drained:
            drained.append(f"pg{index + 1}")
            assert tell("drain", drained[0], names) == 0
        return status_at(segment, index)

    monkeypatch.setattr("shmpool.opening.status_at", drain_first)
    with pool_of(names.pool) as pool, pool.connection("any") as conn:
        assert one_value(conn, "select 1") == 1
        assert [endpoint(names, name).held for name in ("pg1", "pg2") if name in drained] == [0]


def test_the_operator_s_wish_outlives_coordinators_reloads_and_segments(
    coordinator: CoordinatorProcess, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL and adoption, a reload and a successor of the segment leave an endpoint drained, until `ready`."""
    names = coordinator.names
    with pool_of(names.pool) as pool:
        assert tell("drain", "pg2", names) == 0
        coordinator.kill()
        with pytest.raises(NoEligibleEndpoint):
            pool.checkout("read", timeout=0)
        coordinator.start()
        assert endpoint(names).admin_operator is Admin.DRAIN
        coordinator.config.write_text(config(names.pool, cluster, cap=19))
        assert coordinator.request("reload")["changes"]
        assert endpoint(names).admin_operator is Admin.DRAIN
        pool.close()
        assert main(["retire", names.pool, "--within", "5"]) == 0
        assert endpoint(names).admin_operator is Admin.DRAIN
    capsys.readouterr()
    assert main(["status", names.pool, "--json"]) == 1
    status = json.loads(capsys.readouterr().out)
    (finding,) = [f for f in status["findings"] if f["code"] == "endpoint-drain"]
    assert "pg2 is set to DRAIN by operator" in finding["found"]
    assert [(e["admin"], e["admin_operator"]) for e in status["endpoints"]] == [("ready", "ready"), ("drain", "drain")]
    assert tell("ready", "pg2", names) == 0
    wait_until(lambda: main(["status", names.pool]) == 0)


def test_ready_does_not_cancel_what_the_configuration_drains(
    coordinator: CoordinatorProcess, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that the file no longer names stays drained after `ready`, and the answer says so."""
    names = coordinator.names
    with pool_of(names.pool) as pool, pool.connection("read"):
        coordinator.config.write_text(config(names.pool, cluster, endpoints=("pg1",)))
        assert coordinator.request("reload")["changes"]
        assert main(["ready", "pg2", "--pool", names.pool, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["admin"], answer["operator"], answer["configuration"]) == ("drain", "ready", "drain")
        assert tell("ready", "pg2", names) == 0
        assert "pg2 stays drain: the configuration no longer names it" in capsys.readouterr().err


def test_draining_the_last_eligible_endpoint_is_done_and_told(
    coordinator: CoordinatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer names the groups that nobody can serve now, and those alone; the endpoint is drained all the same."""
    names = coordinator.names
    assert tell("drain", "pg1", names) == 0
    assert capsys.readouterr().err == "group write: no endpoint is eligible now; checkouts wait and then fail\n"
    assert endpoint(names, "pg1").admin is Admin.DRAIN


def test_an_endpoint_in_maintenance_is_not_probed(coordinator: CoordinatorProcess, cluster: Cluster) -> None:
    """From `maint` to `ready` no probe goes there, while the others are probed as ever."""
    names = coordinator.names
    assert tell("maint", "pg2", names) == 0
    elsewhere = probes(names, 0)
    wait_until(lambda: probes(names, 0) > elsewhere + 1)  # one that was under way has ended
    before, elsewhere = probes(names, 1), probes(names, 0)
    wait_until(lambda: probes(names, 0) > elsewhere + 2)
    assert probes(names, 1) == before
    assert tell("ready", "pg2", names) == 0
    wait_until(lambda: probes(names, 1) > before)


def test_errors_say_what_there_is(coordinator: CoordinatorProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown endpoint is exit code 1 with the names there are; no coordinator is 2; nonsense harms nobody."""
    names = coordinator.names
    assert tell("drain", "pg9", names) == 1
    assert "has no endpoint 'pg9'; there are: pg1, pg2" in capsys.readouterr().err
    for fields in ({}, {"endpoint": ["pg1"], "admin": "drain"}, {"endpoint": "pg1", "admin": "gone"}):
        with pytest.raises(ControlError, match="expected"):
            request(names, "admin", **fields)
    assert coordinator.is_running
    coordinator.kill()
    assert tell("drain", "pg2", names) == 2
    assert "no coordinator listens" in capsys.readouterr().err
