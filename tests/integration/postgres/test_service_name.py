"""`address = "service"`: one name that leads to a primary and a standby in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shmpool import NoEligibleEndpoint, Pool
from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health, Role, Verdict
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, is_ready, one_value, pool_of
from tools.pg_cluster import HOST, SUPERUSER, Cluster

KEYS = 'connections = 4\nautocommit = true\ntimeout = "3s"\ntarget = '
GROUPS = {
    "write": f'{KEYS}"primary"',
    "read": f'{KEYS}"replica"\nmax_lag = "1s"',
    "any": f'{KEYS}"any"',
}
IS_STANDBY = "SELECT pg_is_in_recovery()"


def conninfo(port: int) -> str:
    return f"host={HOST} port={port} user={SUPERUSER} dbname=postgres connect_timeout=2"


def served_by(port: int) -> str:
    """Return the keys of the endpoint."""
    return endpoint_keys(conninfo(port)) + '\naddress = "service"'


@pytest.fixture
def relay(cluster: Cluster) -> Iterator[Relay]:
    """A relay that leads to the primary and to its standby in turn."""
    with Relay(cluster.primary.port, cluster.standbys[0].port) as relay:
        yield relay


@pytest.fixture
def coordinator(pool_name: str, relay: Relay) -> Iterator[CoordinatorProcess]:
    """A coordinator that found the name UP."""
    config = pool_config(pool_name, {"name": served_by(relay.port)}, GROUPS, PROBE)
    with running_coordinator(config, pool_name) as process:
        wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
        yield process


@pytest.fixture
def pool(coordinator: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process."""
    with pool_of(coordinator.names.pool) as pool:
        yield pool


def row(coordinator: CoordinatorProcess, column: str) -> int:
    """Return a word of the endpoint's row."""
    segment = coordinator.attach()
    try:
        return int(segment.words[segment.layout.at(ENDPOINTS, 0, column)])
    finally:
        segment.release()


def test_each_connection_has_the_role_of_its_group(pool: Pool, coordinator: CoordinatorProcess) -> None:
    """Whichever server the name leads to, a group gets connections in its role, without delay and without evidence."""
    began = time.monotonic()
    for _ in range(3):
        with pool.connection("write") as one, pool.connection("write") as two:
            assert not one_value(one, IS_STANDBY)
            assert not one_value(two, IS_STANDBY)
        with pool.connection("read") as one, pool.connection("read") as two:
            assert one_value(one, IS_STANDBY)
            assert one_value(two, IS_STANDBY)
    assert time.monotonic() - began < 2
    with pool.connection("any") as one, pool.connection("any") as two, pool.connection("any") as three:
        assert {one_value(conn, IS_STANDBY) for conn in (one, two, three)} == {False, True}
    assert "evidence" not in coordinator.log


def test_probes_pin_neither_role_nor_server(pool: Pool, coordinator: CoordinatorProcess) -> None:
    """Probes reach both servers in turn, and neither role, address, position nor epoch follows them."""
    epoch = observe(coordinator.names).endpoints[0].epoch
    with pool.connection("write") as conn:
        server = conn.get_backend_pid()
    before = row(coordinator, "probes")
    wait_until(lambda: row(coordinator, "probes") >= before + 4, within=5)
    (endpoint,) = observe(coordinator.names).endpoints
    assert (endpoint.health, endpoint.role, endpoint.verdict) == (Health.UP, Role.UNKNOWN, Verdict.OK)
    assert endpoint.epoch == epoch
    assert [row(coordinator, column) for column in ("lsn", "timeline", "system_identifier")] == [0, 0, 0]
    with pool.connection("write") as conn:
        assert conn.get_backend_pid() == server


def test_a_name_that_leads_to_no_server_of_a_role(pool_name: str, cluster: Cluster) -> None:
    """The checkout says what it found when its time is over; the endpoint stays UP, as others use it."""
    with Relay(cluster.standbys[0].port) as relay:
        config = pool_config(pool_name, {"name": served_by(relay.port)}, GROUPS, PROBE)
        with running_coordinator(config, pool_name) as process:
            wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
            with pool_of(pool_name) as pool:
                with pytest.raises(Exception, match="'name' led to a replica, group 'write' wants primary") as caught:
                    pool.checkout("write", timeout=0.5)
                assert not isinstance(caught.value, NoEligibleEndpoint)
                with pool.connection("read") as conn:
                    assert one_value(conn, IS_STANDBY)
            assert observe(Names.of(pool_name)).endpoints[0].health is Health.UP


def test_an_endpoint_that_becomes_a_name_forgets_its_role(pool_name: str, cluster: Cluster) -> None:
    """After a reload with `service` the role of the one server before rules nobody out any more."""
    ports = (cluster.standbys[0].port, cluster.standbys[0].port, cluster.primary.port)
    with Relay(*ports) as relay:
        text = pool_config(pool_name, {"name": served_by(relay.port)}, GROUPS, PROBE)
        instance = text.replace('"service"', '"instance"')
        with running_coordinator(
            instance.replace(str(relay.port), str(cluster.standbys[0].port)), pool_name
        ) as process:
            wait_until(lambda: is_ready(pool_name), within=10, what=lambda: process.log)
            with pool_of(pool_name) as pool:
                with pytest.raises(NoEligibleEndpoint):
                    pool.checkout("write", timeout=0.1)
                process.config.write_text(text)
                process.request("reload")
                with pool.connection("write", timeout=5) as conn:
                    assert not one_value(conn, IS_STANDBY)
