"""An endpoint that returns under load: it gets its share back, gradually, and no request fails."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import psycopg2
import pytest

from shmpool import Pool, attachment, routing
from shmpool.control_client import request
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from shmpool.status import EndpointReport
from shmpool_coordinator.balance import LOOK_S, SETTLE_S
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.load import fork_worker
from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tests.support.workers import is_ready, is_whole, pool_of
from tools.pg_cluster import Cluster, Server

RAMP_S: Final = 2.0  # instead of routing.RAMP_S, in coordinator and workers alike
SHARE_WITHIN_S: Final = RAMP_S + 6.0  # a difference is seen within a second and lasts another before anything moves
READING_S: Final = 0.05  # of two clocks, one after the other
HOLD_S: Final = 0.005
WORKERS: Final = 8
CONNECTIONS: Final = 40  # more than are needed
EXTRA: Final = (
    '[probe]\ninter = "0.1s"\nfastinter = "0.05s"\ndowninter = "0.1s"\ntimeout = "0.5s"\n'
    "[coordinator]\nautostart = false"
)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """Two servers; the second may be killed, and is left running."""
    require_postgres()
    with Cluster() as one, Cluster() as other:
        yield one.primary, other.primary


@contextmanager
def coordinating(
    pool: str, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch, extra: str = ""
) -> Iterator[CoordinatorProcess]:
    """Run a coordinator with a short ramp, of a group that uses both servers; children of the test have it as well."""
    monkeypatch.setattr(routing, "RAMP_S", RAMP_S)
    endpoints = {
        f"pg{n}": endpoint_keys(server.conninfo(connect_timeout=5), CONNECTIONS) for n, server in enumerate(servers)
    }
    group = f'connections = {CONNECTIONS}\ntarget = "any"\nautocommit = true\n{extra}'
    text = pool_config(pool, endpoints, {"any": group}, EXTRA)
    prelude = f"from shmpool import routing; routing.RAMP_S = {RAMP_S}"
    with running_coordinator(text, pool, prelude=prelude) as coordinator:
        wait_until(lambda: is_ready(pool), within=10, what=lambda: coordinator.log)
        yield coordinator
        wait_until(lambda: is_whole(pool), within=10)


def held(pool: str) -> list[int]:
    """Return how many connections there are to each endpoint."""
    return [e.held for e in endpoints(pool)]


def endpoints(pool: str) -> tuple[EndpointReport, ...]:
    """Return what status says of the endpoints."""
    return observe(Names.of(pool)).endpoints


def recalls(pool: str) -> int:
    """Return how many connections were recalled so far."""
    return observe(Names.of(pool)).groups[0].recalls


class Load:
    """Worker processes that use a group all the time, until the block is left.

    Args:
        threads: of each worker.
        burst: how many connections each worker opens at first, and then holds.
        has_background: whether threads of the package run; else what is due is done after each request.
    """

    def __init__(
        self, pool: str, directory: Path, *, threads: int = 1, burst: int = 1, has_background: bool = True
    ) -> None:
        self.answers: list[dict[str, Any]] = []
        self._stop = directory / "stop"
        self._pool, self._threads, self._burst, self._has_background = pool, threads, burst, has_background

    def __enter__(self) -> Self:
        self._children = [fork_worker(self._work) for _ in range(WORKERS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.touch()
        for pid, read in self._children:
            with os.fdopen(read) as pipe:
                told = pipe.read()
            os.waitpid(pid, 0)
            self.answers.append(json.loads(told))

    def failures(self, since: float) -> list[str]:
        """Return what went wrong after a moment."""
        return [error for answer in self.answers for at, error in answer["failed"] if at >= since]

    def opened(self, port: int, since: float) -> list[float]:
        """Return when connections to a server were opened, in seconds after a moment."""
        return sorted(
            at - since for answer in self.answers for at, where in answer["opened"] if where == port and at >= since
        )

    def _work(self) -> dict[str, Any]:
        if not self._has_background:
            attachment.be_without_threads()
        answer: dict[str, Any] = {"served": 0, "failed": [], "opened": []}
        with Pool(self._pool) as pool:
            with ExitStack() as burst:
                for _ in range(self._burst):
                    burst.enter_context(pool.connection("any"))
            known: set[int] = set()
            threads = [threading.Thread(target=self._use, args=(pool, answer, known)) for _ in range(self._threads - 1)]
            for thread in threads:
                thread.start()
            self._use(pool, answer, known)
            for thread in threads:
                thread.join()
        return answer

    def _use(self, pool: Pool, answer: dict[str, Any], known: set[int]) -> None:
        while not self._stop.exists():
            try:
                with pool.connection("any") as conn, conn.cursor() as cur:
                    if conn.get_backend_pid() not in known:
                        known.add(conn.get_backend_pid())
                        answer["opened"].append((time.monotonic(), conn.info.port))
                    cur.execute("SELECT pg_sleep(%s)", (HOLD_S,))
                answer["served"] += 1
            except psycopg2.Error as error:
                answer["failed"].append((time.monotonic(), f"{type(error).__name__}: {error}"))
            if not self._has_background:
                attachment.do_rounds()


def spread_evenly(pool: str, connections: int) -> bool:
    """Whether all connections are there, at least, and each endpoint has its share."""
    found = held(pool)
    return sum(found) >= connections and max(found) - min(found) <= 1


@contextmanager
def killed(server: Server) -> Iterator[None]:
    """Kill a server, and start it when the block is left."""
    server.kill()
    try:
        yield
    finally:
        server.start()


def assert_nothing_moves(pool: str) -> None:
    """Watch until the balancer has looked twice, and a difference would have lasted long enough."""
    moved, until = recalls(pool), time.monotonic() + LOOK_S + SETTLE_S
    wait_until(lambda: time.monotonic() >= until)
    assert recalls(pool) == moved


@pytest.mark.parametrize(
    ("options", "connections", "policy"),
    [
        ({}, 8, "least-connections"),
        ({"threads": 2, "burst": 2}, 16, "round-robin"),
        ({"has_background": False}, 8, "weighted"),
    ],
    ids=["single", "many", "no-threads"],
)
def test_killed_server_has_its_share_back(
    pool_name: str,
    servers: tuple[Server, Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    connections: int,
    policy: str,
) -> None:
    """Under load: the share is back in time, never faster than the ramp; no request fails; then nothing moves."""
    victim = servers[1]
    with (
        coordinating(pool_name, servers, monkeypatch, f'policy = "{policy}"') as coordinator,
        Load(pool_name, tmp_path, **options) as load,
    ):
        wait_until(lambda: spread_evenly(pool_name, connections), within=10, what=lambda: str(held(pool_name)))
        with killed(victim):
            wait_until(lambda: held(pool_name)[0] >= connections, within=10, what=lambda: str(held(pool_name)))
            wait_until(lambda: endpoints(pool_name)[1].health is Health.DOWN, within=10, what=lambda: coordinator.log)
            began, there = time.monotonic(), held(pool_name)[0]
        wait_until(lambda: endpoints(pool_name)[1].health is Health.UP, within=10, what=lambda: coordinator.log)
        up = time.monotonic() - (endpoints(pool_name)[1].since or 0.0)
        wait_until(
            lambda: spread_evenly(pool_name, connections),
            within=SHARE_WITHIN_S,
            what=lambda: f"{held(pool_name)} {coordinator.log}",
        )
        print(f"share back {time.monotonic() - up:.1f} s after UP")
        if not options:
            assert_nothing_moves(pool_name)
    assert load.failures(began) == []
    for nth, at in enumerate(load.opened(victim.port, up), start=1):
        assert at >= RAMP_S * nth / (there - nth + 1) - READING_S, f"connection {nth}"


def test_drained_endpoint_has_its_share_back_without_requests(
    pool_name: str, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rests moves as well, and is opened anew ahead of the next request: the pool does not shrink."""
    with coordinating(pool_name, servers, monkeypatch), pool_of(pool_name) as pool:
        set_admin(pool_name, "drain")
        with ExitStack() as burst:
            for _ in range(4):
                burst.enter_context(pool.connection("any"))
        assert held(pool_name) == [4, 0]
        set_admin(pool_name, "ready")
        wait_until(lambda: held(pool_name) == [2, 2], within=SHARE_WITHIN_S, what=lambda: str(held(pool_name)))


def test_endpoint_that_refuses_workers_fails_no_request(
    pool_name: str, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well for the probes, but not for the workers' user: connections stay where they can be, and few try."""
    victim = servers[1]
    victim.execute("DROP ROLE IF EXISTS refused")
    victim.execute("CREATE ROLE refused LOGIN CONNECTION LIMIT 0")
    servers[0].execute("CREATE ROLE refused LOGIN")
    try:
        with (
            coordinating(pool_name, servers, monkeypatch, 'conninfo = "user=refused"'),
            pool_of(pool_name) as pool,
        ):
            with ExitStack() as burst:
                for _ in range(4):
                    burst.enter_context(pool.connection("any"))
            until = time.monotonic() + 6.0  # without growing pauses it would be tried eight times
            while time.monotonic() < until:
                with pool.connection("any"):
                    time.sleep(HOLD_S)
            wait_until(lambda: held(pool_name) == [4, 0], within=2, what=lambda: str(held(pool_name)))
            assert 1 <= recalls(pool_name) <= 4, recalls(pool_name)
    finally:
        victim.execute("DROP ROLE refused")
        servers[0].execute("DROP ROLE refused")


def set_admin(pool: str, wish: str) -> None:
    """Have the second endpoint drained, or taken back."""
    request(Names.of(pool), "admin", endpoint="pg1", admin=wish)
