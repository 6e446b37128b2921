"""A name that leads to another address, or to several: which servers are used, and how soon.

Each address is that of a relay on one port, so that the servers behind them see nothing of it.  What is measured is
printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from shmpool.states import Health
from tests.support.endpoints import (
    ANY,
    INTER_S,
    JITTER,
    PROBE,
    REFUSED_DOWN_S,
    SLACK_S,
    TIMEOUT_S,
    UP_S,
    after_probes,
    coordinating,
    endpoint,
    is_in,
    seconds_until,
)
from tests.support.hosts import Hosts
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import is_whole, read_line, sessions, worker
from tools.pg_cluster import Cluster, Server

NAME: Final = "db.test"
FIRST, SECOND = "127.0.0.2", "127.0.0.3"
RESOLVE_S: Final = 0.3
CLOSE_S: Final = 0.5
PROBE_OF_NAMES: Final = f'{PROBE}\nresolve_every = "{RESOLVE_S}s"'
RESTS: Final = """
import sys
from shmpool import Pool

pool = Pool(sys.argv[1])
while True:
    for conn in [pool.checkout("any") for _ in range(3)]:
        conn.close()
    with pool.connection("any") as conn, conn.cursor() as cur:
        cur.execute("SELECT inet_server_port()")
        print(cur.fetchone()[0], flush=True)
    if not sys.stdin.readline():
        break
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    """Names for coordinator and workers."""
    made = Hosts(tmp_path / "hosts")
    made.require()
    return made


@pytest.fixture
def relays(primary: Server, cluster: Cluster) -> Iterator[dict[str, Relay]]:
    """A relay on FIRST that leads to one server, and on SECOND, same port, that leads to another."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Relay(primary.port, host=FIRST))
        second = stack.enter_context(Relay(cluster.primary.port, host=SECOND, port=first.port))
        yield {FIRST: first, SECOND: second}


def by_name(relays: dict[str, Relay]) -> str:
    """Return a conninfo that leaves the address to the name."""
    return f"host={NAME} port={relays[FIRST].port} user=postgres dbname=postgres connect_timeout=2"


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a worker check out and in again."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_name_that_moves(
    pool_name: str, hosts: Hosts, relays: dict[str, Relay], primary: Server, cluster: Cluster
) -> None:
    """A name moves while its old server lives: the epoch grows within resolve_every, and all connections follow it."""
    hosts.point(NAME, FIRST)
    with (
        coordinating(pool_name, {"pg1": by_name(relays)}, ANY, PROBE_OF_NAMES, prefix=hosts.prefix) as coordinator,
        worker(RESTS, pool_name, prefix=hosts.prefix) as process,
    ):
        assert read_line(process) == str(primary.port)
        assert len(sessions(primary, pool_name)) == 3
        epoch = endpoint(pool_name, "pg1").epoch
        after_probes(coordinator, 2)
        assert endpoint(pool_name, "pg1").epoch == epoch, "the name led to the same address again"
        hosts.point(NAME, SECOND)
        known_s = seconds_until(
            lambda: endpoint(pool_name, "pg1").epoch > epoch, RESOLVE_S + JITTER * INTER_S + TIMEOUT_S, coordinator
        )
        closed_s = seconds_until(lambda: not sessions(primary, pool_name), CLOSE_S, coordinator)
        assert endpoint(pool_name, "pg1").health is Health.UP
        go_on(process)
        assert read_line(process) == str(cluster.primary.port)
        assert sessions(primary, pool_name) == []
        assert len(sessions(cluster.primary, pool_name)) == 3
    print(f"\nname moved: known after {known_s:.3f} s, idle connections closed {closed_s:.3f} s later")


def test_name_that_moves_away_from_a_dead_server(
    pool_name: str, hosts: Hosts, relays: dict[str, Relay], cluster: Cluster
) -> None:
    """The old address is dead: the name is looked up anew with each failed probe, not after resolve_every."""
    hosts.point(NAME, FIRST)
    probe = f'{PROBE}\nresolve_every = "60s"'
    with (
        coordinating(pool_name, {"pg1": by_name(relays)}, ANY, probe, prefix=hosts.prefix) as coordinator,
        worker(RESTS, pool_name, prefix=hosts.prefix) as process,
    ):
        read_line(process)
        relays[FIRST].close()
        seconds_until(is_in(pool_name, "pg1", Health.DOWN), REFUSED_DOWN_S, coordinator)
        hosts.point(NAME, SECOND)
        took = seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S + JITTER * INTER_S, coordinator)
        go_on(process)
        assert read_line(process) == str(cluster.primary.port)
    print(f"\nname moved away from a dead server: UP after {took:.3f} s")


def test_name_with_an_address_where_nobody_listens(
    pool_name: str, hosts: Hosts, relays: dict[str, Relay], primary: Server
) -> None:
    """Of a name's addresses one that answers is enough, for the coordinator as for libpq in the workers."""
    hosts.point(NAME, "127.0.0.4", FIRST)
    with (
        coordinating(pool_name, {"pg1": by_name(relays)}, ANY, PROBE_OF_NAMES, prefix=hosts.prefix) as coordinator,
        worker(RESTS, pool_name, prefix=hosts.prefix) as process,
    ):
        assert read_line(process) == str(primary.port)
        after_probes(coordinator, 8)
        assert endpoint(pool_name, "pg1").health is Health.UP
        assert "DOWN" not in coordinator.log
        process.kill()
        wait_until(lambda: is_whole(pool_name), within=SLACK_S + 5)
