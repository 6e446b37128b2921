"""A server that asks for a password, and containers that share one pool on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from tests.support.containers import FILES, PYTHON, Container, Worker, require_containers
from tests.support.coordinator import endpoint_keys, pool_config, remove_leftovers
from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tests.support.workers import PROBE
from tools.pg_cluster import Cluster, Server

ROLE, PASSWORD = "app", "never-to-be-seen"
CAP = 5
RUN = ("shmpool_coordinator", "run", "--config", str(FILES / "pool.toml"))


@pytest.fixture(scope="session")
def guarded() -> Iterator[Server]:
    """A server on which ROLE needs PASSWORD."""
    require_postgres()
    with Cluster() as cluster:
        server = cluster.primary
        rules = server.data / "pg_hba.conf"
        rules.write_text(f"host all {ROLE} all scram-sha-256\n{rules.read_text()}")
        server.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        server.execute("SELECT pg_reload_conf()")
        yield server


class Host:
    """Containers around one pool; `files` is what they find as FILES."""

    def __init__(self, pool: str, server: Server, files: Path, stack: ExitStack, *, has_user_namespaces: bool) -> None:
        self.names = Names.of(pool)
        self.server = server
        self.files = files
        self._stack = stack
        self._has_user_namespaces = has_user_namespaces
        self.log = files / "log"
        (files / "password").write_text(f"{PASSWORD}\n")
        conninfo = server.conninfo(user=ROLE)
        credentials = f'[endpoints.pg1.credentials]\npassword_file = "{FILES}/password"'
        group = f'connections = {CAP}\ntarget = "primary"\nautocommit = true'
        endpoint = f"{endpoint_keys(conninfo, CAP)}\n{credentials}"
        (files / "pool.toml").write_text(pool_config(pool, {"pg1": endpoint}, {"read": group}, PROBE))

    def container(self, *command: str, shm: str = "", **streams: int) -> Container:
        """Start a container."""
        with self.log.open("ab") as log:
            made = Container(
                self.files,
                *command,
                has_user_namespace=self._has_user_namespaces,
                shm=shm,
                stderr=log,
                **streams,
            )
        return self._stack.enter_context(made)

    def coordinator(self, *wrapper: str) -> Container:
        """Start a container with the coordinator, under a wrapper if given; return when it knows its endpoint."""
        container = self.container(*PYTHON, *wrapper, *RUN)
        wait_until(self._is_ready, within=10, what=self.log.read_text)
        return container

    def _is_ready(self) -> bool:
        report = observe(self.names)
        return bool(report.endpoints) and all(endpoint.health is Health.UP for endpoint in report.endpoints)

    def worker(self, *environment: str) -> tuple[Container, Worker]:
        """Start a container with a worker as its first process; return when that runs."""
        command = ["env", *environment, *PYTHON, "tests.support.contained_worker", self.names.pool]
        container = self.container(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        worker = self._stack.enter_context(Worker(container.process))
        worker.ask("who")
        return container, worker

    def worker_beside(self, container: Container) -> Worker:
        """Start one more worker in a container."""
        command = [*PYTHON, "tests.support.contained_worker", self.names.pool]
        process = container.exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._stack.enter_context(Worker(process))


@contextmanager
def running_host(pool: str, server: Server, files: Path, *, has_user_namespaces: bool) -> Iterator[Host]:
    """A host for containers; everything in them has ended afterwards."""
    require_containers(has_user_namespaces=has_user_namespaces)
    with ExitStack() as stack:
        stack.callback(remove_leftovers, pool)
        yield Host(pool, server, files, stack, has_user_namespaces=has_user_namespaces)


@pytest.fixture
def host(pool_name: str, guarded: Server, tmp_path: Path) -> Iterator[Host]:
    """A host for containers such as every user may make them."""
    with running_host(pool_name, guarded, tmp_path, has_user_namespaces=True) as made:
        yield made
