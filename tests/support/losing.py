"""Groups on one real primary behind a relay, for tests in which connections are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shmpool import Handle
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, backend, end_session, is_ready
from tools.pg_cluster import Cluster, Server

_WRITE = 'connections = 4\ntarget = "primary"'
GROUPS = {
    "tx": f'{_WRITE}\nsettings = {{ deadlock_timeout = "50ms" }}',
    "auto": f"{_WRITE}\nautocommit = true",
    "reading": f"{_WRITE}\nreadonly = true",
    "replica": 'connections = 2\ntarget = "replica"\nautocommit = true',
}


@contextmanager
def losing_coordinator(name: str, cluster: Cluster, relay: Relay) -> Iterator[CoordinatorProcess]:
    """A coordinator of GROUPS: the primary behind a relay, its standby without."""
    endpoints = {
        "pg1": endpoint_keys(cluster.primary.conninfo(port=relay.port)),
        "pg2": endpoint_keys(cluster.standbys[0].conninfo()),
    }
    with running_coordinator(pool_config(name, endpoints, GROUPS, PROBE), name) as process:
        wait_until(lambda: is_ready(name), within=10, what=lambda: process.log)
        yield process


def end(server: Server, conn: Handle) -> None:
    """Terminate the server process of a connection."""
    end_session(server, backend(conn))


def execute(conn: Handle, sql: str) -> None:
    """Run a statement."""
    with conn.cursor() as cur:
        cur.execute(sql)
