"""Application servers for tests: real ones that run the example on a configuration of their own; Gunicorn is one."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg2

from shmpool.control_client import ControlError, request
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.rows import start_time
from shmpool.status import Report, RowState
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST, Cluster, children_of
from tools.stage import EXAMPLE, fill_in, free_port, gunicorn_command

START_S = 15.0
END_S = 15.0
FAST = """
[probe]
inter = "0.2s"
fastinter = "0.1s"
downinter = "0.2s"
[coordinator]
linger = "{linger}"
"""
SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name LIKE %s AND application_name NOT LIKE '%%:coordinator'
"""
HOOKS = "from shmpool.hooks.gunicorn import *\n"


def example_config(pool: str, cluster: Cluster, *, read: int = 8, linger: str = "60s") -> str:
    """Return the example's configuration for a pool on a cluster; `read`: connections of that group."""
    conninfos = {"pg1": cluster.primary.conninfo(), "pg2": cluster.standbys[0].conninfo()}
    text = fill_in(EXAMPLE / "shmpool.toml", pool, conninfos)
    return text.replace("connections = 8", f"connections = {read}") + FAST.format(linger=linger)


def request_to(port: int, path: str, form: str | None = None) -> tuple[int, dict[str, Any]]:
    """Send one request (a form is posted) to a port and return status and answer."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=20)) as connection:
        connection.request("GET" if form is None else "POST", path, body=form)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


class ExampleServer:
    """A running master with its workers."""

    port: int

    def __init__(self, directory: Path, pool: str, config: str) -> None:
        self.names = Names.of(pool)
        self.directory = directory
        self._log = directory / "server.log"
        self._toml = directory / "shmpool.toml"
        self._toml.write_text(config)

    def start(self, command: Sequence[str]) -> None:
        """Start it, in a process group of its own."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=EXAMPLE,
                env=os.environ | {"SHMPOOL_NAME": self.names.pool, "SHMPOOL_CONFIG": str(self._toml)},
                start_new_session=True,
            )
        self.pid = self.process.pid  # of the master that serves

    @property
    def log(self) -> str:
        """What master and workers printed."""
        return self._log.read_text(errors="replace")

    def workers(self) -> set[int]:
        """Return the pids of the master's workers."""
        raise NotImplementedError

    def request(self, path: str, form: str | None = None) -> tuple[int, dict[str, Any]]:
        """Send one request (a form is posted) and return status and answer."""
        return request_to(self.port, path, form)

    def is_ready(self) -> bool:
        """Whether it answers; fails if it ended."""
        assert self.process.poll() is None, f"the server ended: {self.log}"
        try:
            return self.request("/health")[0] == 200
        except OSError:
            return False

    def status(self) -> Report:
        """Return what `shmpool status` shows."""
        return observe(self.names)

    def rows(self) -> dict[int, int]:
        """Return pid and server generation of the processes that have a worker row."""
        return {w.pid: w.server_generation for w in self.status().workers if w.state is RowState.HELD}

    def is_whole(self) -> bool:
        """Whether free and held permits add up to the caps, and no orphan waits to be settled."""
        if not self.has_no_orphans():
            return False
        report = self.status()
        groups = all(g.free is not None and g.free + g.held == g.target for g in report.groups)
        return groups and all(e.free is not None and e.free + e.held == e.target for e in report.endpoints)

    def has_no_orphans(self) -> bool:
        """Whether everything that dead workers held is settled."""
        return not any(worker.orphans for worker in self.status().workers)

    def use_all_workers(self) -> None:
        """Send requests until every worker has a row."""

        def has_all() -> bool:
            self.request("/slow?ms=20")
            return self.workers() <= set(self.rows())

        with Clients(self, "/slow?ms=20", 6):
            wait_until(has_all, within=10, what=lambda: f"{self.workers()} {self.rows()} {self.log}")

    def reload(self) -> None:
        """SIGHUP; return when all workers are new ones."""
        old = self.workers()
        os.kill(self.pid, signal.SIGHUP)
        wait_until(lambda: self.workers() and not self.workers() & old, within=20, what=lambda: self.log)

    def kill_worker(self) -> int:
        """SIGKILL a worker that has a row, and return its pid."""
        victim = next(pid for pid in self.rows() if pid in self.workers())
        os.kill(victim, signal.SIGKILL)
        return victim

    def stop(self) -> None:
        """End every master and worker in order; kill what does not end."""
        for pid in {self.pid, self.process.pid}:
            if start_time(pid) is not None:
                os.kill(pid, signal.SIGTERM)
        try:
            self.process.wait(END_S)
            wait_until(lambda: not _is_group(self.process.pid), within=END_S)
        finally:
            if _is_group(self.process.pid):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class GunicornServer(ExampleServer):
    """A running Gunicorn; its hooks start the coordinator.  USR2 puts another master in the place of its own."""

    def __init__(
        self, directory: Path, pool: str, config: str, *, hooks: str, app: str, options: Sequence[str]
    ) -> None:
        super().__init__(directory, pool, config)
        conf = directory / "gunicorn.conf.py"
        conf.write_text(hooks)
        self.port = free_port()
        arguments = ("--config", str(conf), "--pythonpath", str(directory), "--graceful-timeout", "10", *options)
        self.start(gunicorn_command(self.port, *arguments, app=app))

    def workers(self) -> set[int]:
        """Return the pids of the master's workers, without another master."""
        return {
            pid
            for pid in children_of(self.pid)
            if start_time(pid) is not None and b"gunicorn" in _command(pid) and not children_of(pid)
        }

    def upgrade(self) -> int:
        """SIGUSR2; return the old master's pid once the new one has workers."""
        old, workers = self.pid, self.workers()
        os.kill(old, signal.SIGUSR2)
        wait_until(
            lambda: any(children_of(pid) for pid in children_of(old) if pid not in workers),
            within=START_S,
            what=lambda: self.log,
        )
        self.pid = next(pid for pid in children_of(old) if pid not in workers and children_of(pid))
        return old


class Answering(Protocol):
    """A server that takes requests."""

    def request(self, path: str, form: str | None = None) -> tuple[int, dict[str, Any]]:
        """Send one request and return status and answer."""


class Clients:
    """Threads that send one request after another (or just one each).

    `failures` holds what went wrong, `times` how many seconds each answer took, `workers` who answered.
    """

    def __init__(self, server: Answering, path: str, count: int, *, often: bool = True) -> None:
        self.served = 0
        self.failures: list[str] = []
        self.times: list[float] = []
        self.workers: set[int | None] = set()
        self._is_over = not often
        self._server, self._path = server, path
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                status, answer = self._server.request(self._path)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            else:
                self.served += 1
                self.times.append(time.monotonic() - began)
                self.workers.add(answer.get("worker"))
                if status != 200:
                    self.failures.append(f"{status} {answer}")
            if self._is_over:
                return
            time.sleep(0.002)  # a client, not a flood


class Sampler:
    """Counts the sessions of a pool's workers, at the servers, again and again; `most` is the highest count."""

    def __init__(self, cluster: Cluster, pool: str) -> None:
        self.most = 0
        self.samples = 0
        self._connections = [psycopg2.connect(server.conninfo()) for server in cluster.servers]
        self._pattern = f"%shmpool:{pool}:%"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def _run(self) -> None:
        while not self._is_over.wait(0.003):
            counted = 0
            for connection in self._connections:
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute(SESSIONS, (self._pattern,))
                    counted += int((cursor.fetchone() or (0,))[0])
            self.most = max(self.most, counted)
            self.samples += 1


@contextmanager
def guest_book(cluster: Cluster) -> Iterator[None]:
    """The example's table on a primary and its standby; dropped afterwards."""
    cluster.primary.execute((EXAMPLE / "schema.sql").read_text())
    wait_until(lambda: cluster.standbys[0].execute("SELECT to_regclass('entries') IS NOT NULL") == [(True,)])
    try:
        yield
    finally:
        cluster.primary.execute("DROP TABLE entries")


@contextmanager
def running_gunicorn(
    directory: Path, pool: str, config: str, *options: str, hooks: str = HOOKS, app: str = "app:application"
) -> Iterator[GunicornServer]:
    """Run Gunicorn and the coordinator that it starts; end both afterwards, nothing of the pool is left."""
    server = GunicornServer(directory, pool, config, hooks=hooks, app=app, options=options)
    try:
        wait_until(server.is_ready, within=START_S, what=lambda: server.log)
        yield server
    finally:
        try:
            server.stop()
        finally:
            stop_coordinator(server.names)


def stop_coordinator(names: Names) -> None:
    """End a pool's coordinator if one runs, and remove what is left of the pool."""
    try:
        pid = int(request(names, "stop")["pid"])
    except ControlError:
        pass
    else:
        wait_until(lambda: start_time(pid) is None, within=END_S)
    for path in names.leftovers():
        path.unlink(missing_ok=True)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_group(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
