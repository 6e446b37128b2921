"""Application servers for tests: any command that serves HTTP, the budget it works within, its sessions."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg2

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.rows import start_time
from shmpool.status import RowState
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import stop_coordinator
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST, Server, children_of
from tools.stage import free_port

START_S = 15.0
END_S = 15.0
LINGER_S = 0.5
CONNECT_S = 2  # also how long a killed worker's permit may be out if it was just connecting
EXTRA = f"""
[coordinator]
linger = "{LINGER_S}s"
[probe]
inter = "0.2s"
fastinter = "0.1s"
"""
SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE usename = %s AND backend_type = 'client backend' AND application_name NOT LIKE '%%:coordinator'
"""


class Role:
    """A role at a server that one test works as: its sessions are counted without asking the pool."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name.replace("-", "_")

    def __enter__(self) -> Self:
        self.server.execute(f"CREATE ROLE {self.name} LOGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.execute(f"DROP ROLE {self.name}")

    @property
    def conninfo(self) -> str:
        """How the test's pools connect."""
        return self.server.conninfo(user=self.name, connect_timeout=CONNECT_S)

    def sessions(self) -> int:
        """Return how many sessions it has now, without those of coordinators."""
        with contextlib.closing(psycopg2.connect(self.server.conninfo())) as connection:
            return _count(connection, self.name)


class Sampler:
    """Counts the sessions of a role again and again; `most` is the highest count."""

    def __init__(self, role: Role) -> None:
        self.most = 0
        self.samples = 0
        self._role = role
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(psycopg2.connect(self._role.server.conninfo())) as connection:
            while not self._is_over.wait(0.003):
                self.most = max(self.most, _count(connection, self._role.name))
                self.samples += 1


def _count(connection: Any, role: str) -> int:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(SESSIONS, (role,))
        return int((cursor.fetchone() or (0,))[0])


def budget_of(name: str, role: Role, connections: int) -> str:
    """Return a configuration with one group `default` of so many connections, which may be all the server's."""
    group = f'connections = {connections}\ntarget = "any"\nautocommit = true\ntimeout = "10s"'
    return pool_config(name, {"pg1": endpoint_keys(role.conninfo, connections)}, {"default": group}, EXTRA)


class Budget:
    """A pool as its processes and permits are seen from outside."""

    def __init__(self, names: Names) -> None:
        self.names = names

    def holders(self) -> set[int]:
        """Return the pids of the processes that have a worker row."""
        return {w.pid for w in observe(self.names).workers if w.state is RowState.HELD}

    def is_whole(self) -> bool:
        """Whether free and held permits add up to the caps, nobody's death waits to be settled, and nothing is odd."""
        report = observe(self.names)
        if not report.is_judged or report.violations or any(worker.orphans for worker in report.workers):
            return False
        groups = all(g.free is not None and g.free + g.held == g.target for g in report.groups)
        return groups and all(e.free is not None and e.free + e.held == e.target for e in report.endpoints)

    def is_gone(self) -> bool:
        """Whether nothing is left of it, its coordinator included."""
        return self.names.leftovers() == []


class Program:
    """A running program: a process group and its log."""

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str], name: str) -> None:
        self._log = directory / f"{name}.log"
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=os.environ | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What its processes printed."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The process that was started: master, watcher or the only one."""
        return self.process.pid

    def workers(self) -> set[int]:
        """Return the processes that it started and that live; the coordinator is not one of them."""
        return {pid for pid in children_of(self.pid) if _session_of(pid) == self.pid}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, or all of its processes by SIGINT, as a terminal does; kill what does not."""
        if number is not signal.SIGINT:
            self.process.send_signal(number)
        elif self._is_left():
            os.killpg(self.pid, number)
        try:
            self.process.wait(END_S)
            wait_until(lambda: not self._is_left(), within=END_S, what=lambda: self.log)
        finally:
            if self._is_left():
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def _is_left(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class WebServer(Program):
    """A running application server."""

    def __init__(self, command: Sequence[str], port: int, directory: Path, environment: Mapping[str, str]) -> None:
        super().__init__(command, directory, environment, "server")
        self.port = port

    def request(self, path: str, form: str | None = None) -> tuple[int, dict[str, Any]]:
        """Send one request (a form is posted) and return status and answer."""
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=20)) as connection:
            connection.request("GET" if form is None else "POST", path, body=form)
            response = connection.getresponse()
            text = response.read()
        return response.status, json.loads(text) if text.startswith(b"{") else {"text": text.decode(errors="replace")}

    def is_ready(self) -> bool:
        """Whether it answers; fails if it ended."""
        assert self.process.poll() is None, f"the server ended: {self.log}"
        try:
            return self.request("/health")[0] == 200
        except (OSError, http.client.HTTPException):
            return False


@contextlib.contextmanager
def running(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    *pools: Names,
    port: int | None = None,
) -> Iterator[WebServer]:
    """Run a server until the block is left, and end the coordinators that were started for it.

    Args:
        command: `{port}` in it stands for the port.
        directory: where it runs and logs.
        environment: what it finds there beside this process's.
        pools: those that it uses.
        port: where it serves, if it was chosen already.
    """
    port = port or free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    try:
        with WebServer(words, port, directory, environment) as server:
            wait_until(server.is_ready, within=START_S, what=lambda: server.log)
            yield server
    finally:
        for names in pools:
            stop_coordinator(names)


def _session_of(pid: int) -> int | None:
    try:
        return None if start_time(pid) is None else os.getsid(pid)
    except ProcessLookupError:
        return None
