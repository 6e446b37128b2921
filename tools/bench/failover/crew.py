"""The worker processes of one pool, driven from outside, and what they wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.pool import close_all
from shmpool.states import Health, Role
from tools.bench.failover.peers import CONNECT, CONNECTIONS, QUERY_TIMEOUT_S, TIMEOUT_S, Site
from tools.pg_cluster import Cluster

ANSWER_S: Final = 60.0
WATCHER: Final = "watcher"  # the coordinator's own user
TICK_S: Final = 0.005

CONFIG: Final = """
name = "{pool}"
[coordinator]
autostart = false
[probe]
conninfo = "user={watcher}"
{endpoints}
[groups.read]
connections = {connections}
target = "replica"
per_worker_max = {each}
timeout = "{timeout}s"
query_timeout = "{query_timeout}s"
application_name = "bench"
[groups.write]
connections = {connections}
target = "primary"
autocommit = true
per_worker_max = {each}
timeout = "{timeout}s"
query_timeout = "{query_timeout}s"
application_name = "bench"
"""


@dataclass(frozen=True, slots=True)
class Use:
    """One checkout, statement and checkin; times are of CLOCK_MONOTONIC, which all processes share."""

    worker: int
    began: float
    got: float | None  # when the checkout returned
    ended: float
    outcome: str  # ok, or the error's class, or hanging
    host: str
    session: int
    sqlstate: str

    @property
    def is_good(self) -> bool:
        return self.outcome == "ok"

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Crew:
    """Worker processes of one pool; a context manager that ends them."""

    def __init__(self, name: str, site: Site, workers: int) -> None:
        self._name = name
        self._site = site
        self._count = workers
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="shmpool-failover-")
        try:
            for number in range(self._count):
                arguments = [self._name, str(self._target(number)), json.dumps(asdict(self._site))]
                self._running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tools.bench.failover.worker", *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,  # pools log what they lose
                        text=True,
                    )
                )
            self.tell("burst")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self._folder.cleanup()

    def tell(self, command: str) -> None:
        """Have all obey, and wait until they have."""
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
        late = threading.Timer(ANSWER_S, self._kill)
        late.start()
        try:
            answers = [process.stdout.readline() for process in self._running if process.stdout is not None]
        finally:
            late.cancel()
        if answers != ["done\n"] * self._count:
            raise RuntimeError(f"{self._name}: {answers.count('')} workers did not do `{command}`")

    def _kill(self) -> None:
        for process in self._running:
            process.kill()

    def end(self) -> list[Use]:
        """End the load; return every use."""
        self.tell("end")
        return [
            Use(number, *json.loads(line))
            for number in range(self._count)
            for line in self._target(number).read_text().splitlines()
        ]

    def _target(self, number: int) -> Path:
        return Path(self._folder.name, f"{number}.jsonl")


@contextmanager
def coordinating(cluster: Cluster, workers: int) -> Iterator[str]:
    """Run a coordinator that has found each server in its role; yield the pool's name."""
    pool = f"failover-{os.getpid()}"
    endpoints = "\n".join(
        f'[endpoints.{server.name}]\nconninfo = "host={server.host} port={server.port} {CONNECT}"\nmax_connections = 80'
        for server in cluster.servers
    )
    values = {"watcher": WATCHER, "connections": workers * CONNECTIONS, "each": CONNECTIONS}
    bounds = {"timeout": TIMEOUT_S, "query_timeout": QUERY_TIMEOUT_S}
    with tempfile.TemporaryDirectory(prefix="shmpool-failover-") as folder:
        path = Path(folder, "shmpool.toml")
        path.write_text(CONFIG.format(pool=pool, endpoints=endpoints, **values, **bounds))
        command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(path), "--log-level", "error"]
        process = subprocess.Popen(command)
        try:
            wait_for(lambda: _is_ready(pool, len(cluster.servers)), 10, "the coordinator is not ready")
            yield pool
        finally:
            close_all()
            process.terminate()
            process.wait(15)


def _is_ready(pool: str, servers: int) -> bool:
    endpoints = observe(Names.of(pool)).endpoints
    return len(endpoints) == servers and all(
        e.health is Health.UP and e.role is (Role.REPLICA if "standby" in e.name else Role.PRIMARY) for e in endpoints
    )


def wait_for(condition: object, within: float, otherwise: str) -> float:
    """Look every 5 ms until a condition is true; return the time then."""
    assert callable(condition)
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(TICK_S)
    return time.monotonic()
