"""Connections in use whose server stops answering, and writes that a server refuses: what a worker does of itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final

import psycopg2
import pytest

from shmpool import ConnectionLost, Handle
from shmpool.silence import ASK_S
from shmpool.states import Health
from tests.support.coordinator import CoordinatorProcess
from tests.support.endpoints import (
    ANY,
    PROBE,
    SILENT_DOWN_S,
    SLACK_S,
    WATCHER,
    WRITE,
    coordinating,
    endpoint,
    is_in,
    probes_of,
    seconds_until,
)
from tests.support.postgres import frozen
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import pool_of
from tools.pg_cluster import Cluster, Server

LONG: Final = "select pg_sleep(60)"
NEWS_S: Final = 0.5  # until the background thread knows that an endpoint went DOWN


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that nobody else uses."""
    with Cluster(standbys=0) as cluster:
        cluster.primary.execute(f"create role {WATCHER} superuser login")
        yield cluster.primary


@pytest.fixture
def relay(victim: Server) -> Iterator[Relay]:
    """What stands between the pool and the server."""
    with Relay(victim.port) as made:
        yield made


@pytest.fixture
def coordinator(pool_name: str, relay: Relay) -> Iterator[CoordinatorProcess]:
    """It probes as a user of its own."""
    probe = f'{PROBE}\nconninfo = "user={WATCHER}"'
    with coordinating(pool_name, {"pg1": relay.port}, ANY, probe) as process:
        yield process


class Use(threading.Thread):
    """A long query; `error` is how it ended, None as long as it runs or if it came to its end."""

    def __init__(self, handle: Handle, query: str = LONG) -> None:
        super().__init__()
        self.error: psycopg2.Error | None = None
        self._handle, self._query = handle, query
        self.start()
        wait_until(lambda: handle.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_ACTIVE)

    def run(self) -> None:
        """Wait for the server."""
        try:
            with self._handle.cursor() as cursor:
                cursor.execute(self._query)
        except psycopg2.Error as error:
            self.error = error


@pytest.mark.parametrize("fault", ["frozen", "black hole"])
def test_busy_connections_of_a_silent_server_are_cut(
    victim: Server, relay: Relay, pool_name: str, coordinator: CoordinatorProcess, fault: str
) -> None:
    """Their threads are free within what a server has to answer, after DOWN; the error says that they were lost."""
    silence: AbstractContextManager[None] = frozen(victim) if fault == "frozen" else relay.black_hole()
    with pool_of(pool_name) as pool:
        handles = [pool.checkout("any") for _ in range(3)]
        uses = [Use(handle) for handle in handles]
        with silence:
            seconds_until(is_in(pool_name, "pg1", Health.DOWN), SILENT_DOWN_S, coordinator)
            took = seconds_until(lambda: all(use.error for use in uses), NEWS_S + ASK_S, coordinator)
            began = time.monotonic()
            for handle in handles:
                handle.close()
            assert time.monotonic() - began < SLACK_S, "closing them waits for nobody"
        for use in uses:
            use.join()
            assert isinstance(use.error, ConnectionLost)
        wait_until(lambda: pool.statistics()["any"]["held"] == 0, within=10)
    print(f"\n{fault}: three queries cut {took:.3f} s after DOWN was seen (bound {NEWS_S + ASK_S:.1f})")


def test_long_query_survives_a_coordinator_that_is_cut_off(
    relay: Relay, pool_name: str, coordinator: CoordinatorProcess
) -> None:
    """DOWN is the coordinator's view: the worker asks the server itself, which answers, and nothing is cut."""
    with pool_of(pool_name) as pool:
        with pool.connection("any") as handle:
            use = Use(handle, "select pg_sleep(4)")
            with relay.black_hole(WATCHER):
                seconds_until(is_in(pool_name, "pg1", Health.DOWN), SILENT_DOWN_S, coordinator)
                use.join()
        assert use.error is None


def test_refused_write_has_the_server_probed_at_once(victim: Server, pool_name: str) -> None:
    """SQLSTATE 25006 puts the role in doubt, though the next probe is a minute away."""
    probe = PROBE.replace('inter = "0.1s"', 'inter = "60s"', 1)
    with coordinating(pool_name, {"pg1": victim.port}, WRITE, probe) as coordinator, pool_of(pool_name) as pool:
        before = probes_of(coordinator)
        with pool.connection("write") as handle, handle.cursor() as cursor:
            cursor.execute("set default_transaction_read_only = on")
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                cursor.execute("create table nowhere ()")
            cursor.execute("set default_transaction_read_only = off")
        wait_until(lambda: probes_of(coordinator) > before, within=2, what=lambda: coordinator.log)
        assert endpoint(pool_name, "pg1").health is Health.UP
