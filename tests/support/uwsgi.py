"""uWSGI for tests: a real server that runs the example, with the coordinator as its mule."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from shmpool.control_client import ControlError, request
from shmpool.rows import parent_of, start_time
from tests.support.gunicorn import START_S, ExampleServer, request_to, stop_coordinator
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST, children_of
from tools.stage import EXAMPLE, ROOT, free_port

BINARY: Final = Path(sys.executable).with_name("uwsgi")
MULE_FILE: Final = ROOT / "examples" / "uwsgi" / "shmpool_mule.py"
MULE_FUNCTION: Final = "shmpool_coordinator.mule:main"
HOOKS: Final = ("--import", "shmpool.hooks.uwsgi")
PROGRAM: Final = (str(BINARY), "--http-socket", HOST + ":{port}", "--die-on-term", "--disable-logging", "--need-app")
UWSGI: Final = (*PROGRAM, "--master", "--module", "app:application", *HOOKS)  # the example; {port} is to be filled in
VASSAL: Final = """
[uwsgi]
http-socket = {host}:{port}
chdir = {example}
module = app:application
master = true
processes = 2
need-app = true
disable-logging = true
import = shmpool.hooks.uwsgi
mule = {mule}
pidfile = {pidfile}
"""

requires_uwsgi = pytest.mark.skipif(
    not BINARY.exists() and not os.environ.get("CI"),
    reason=f"{BINARY} is not there: uWSGI is compiled when it is installed, which takes a C compiler",
)


class UwsgiServer(ExampleServer):
    """A running uWSGI."""

    def __init__(self, directory: Path, pool: str, config: str) -> None:
        super().__init__(directory, pool, config)
        self.port = free_port()

    def start(self, command: Sequence[str]) -> None:
        """Start it; `{port}` in the command stands for its port."""
        super().start([word.replace("{port}", str(self.port)) for word in command])

    def mules(self) -> list[int]:
        """Return the pids of all mules so far, the latest last."""
        return [int(pid) for pid in re.findall(r"^spawned uWSGI mule \d+ \(pid: (\d+)\)", self.log, re.MULTILINE)]

    def workers(self) -> set[int]:
        """Return the pids of the workers: the process itself, where there is no master."""
        if "spawned uWSGI master process" not in self.log:
            return {self.pid}
        children = {pid for pid in children_of(self.pid) if start_time(pid) is not None}
        return children - set(self.mules())

    def coordinator(self) -> int | None:
        """Return the pid of the coordinator that answers, if one does."""
        with contextlib.suppress(ControlError):
            return int(request(self.names, "info")["pid"])
        return None

    def is_coordinated(self) -> bool:
        """Whether the latest mule is the coordinator, and answers."""
        return self.mules() != [] and self.coordinator() == self.mules()[-1]

    def kill(self) -> None:
        """End it without a chance to clean up, if it runs: an end in order takes uWSGI a second."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def reload(self) -> None:
        """SIGHUP; return when the master was executed again, and its workers and its mule serve."""
        reloads, mules = self._reloads(), self.mules()
        os.kill(self.pid, signal.SIGHUP)
        wait_until(lambda: self._reloads() > reloads, within=20, what=lambda: self.log)
        if mules:
            wait_until(lambda: self.mules() != mules and self.is_coordinated(), within=START_S, what=lambda: self.log)
        self.use_all_workers()

    def _reloads(self) -> int:
        return self.log.count("gracefully (RE)spawned uWSGI master process")

    def replace_mule(self) -> None:
        """SIGKILL the mule; return when its successor serves."""
        count = len(self.mules())
        os.kill(self.mules()[-1], signal.SIGKILL)
        wait_until(lambda: len(self.mules()) > count and self.is_coordinated(), within=START_S, what=lambda: self.log)


class Emperor(ExampleServer):
    """A uWSGI that runs one instance for each file of a directory."""

    def __init__(self, directory: Path, pool: str, config: str) -> None:
        super().__init__(directory, pool, config)
        self.vassals = directory / "vassals"
        self.vassals.mkdir()


class Vassal:
    """One of its instances, from its file on."""

    def __init__(self, emperor: Emperor, name: str) -> None:
        self.port = free_port()
        self._emperor = emperor
        self._file = emperor.vassals / f"{name}.ini"
        self._pidfile = emperor.directory / f"{name}.pid"
        places = {"host": HOST, "port": self.port, "example": EXAMPLE, "mule": MULE_FILE, "pidfile": self._pidfile}
        self._file.write_text(VASSAL.format(**places))

    def request(self, path: str, form: str | None = None) -> tuple[int, dict[str, Any]]:
        """Send one request and return status and answer."""
        return request_to(self.port, path, form)

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return self.request("/health")[0] == 200
        except OSError:
            return False

    def coordinates(self) -> bool:
        """Whether its mule is the coordinator, and answers."""
        with contextlib.suppress(ControlError):
            return parent_of(int(request(self._emperor.names, "info")["pid"])) == int(self._pidfile.read_text())
        return False

    def remove(self) -> None:
        """Have the emperor end it."""
        self._file.unlink()


@contextlib.contextmanager
def running_vassals(directory: Path, pool: str, config: str, count: int) -> Iterator[tuple[Emperor, Sequence[Vassal]]]:
    """Run an emperor with so many instances that share a pool; end them afterwards, nothing of the pool is left."""
    emperor = Emperor(directory, pool, config)
    vassals = [Vassal(emperor, f"v{number}") for number in range(count)]
    emperor.start([str(BINARY), "--emperor", str(emperor.vassals), "--emperor-freq", "1", "--die-on-term"])
    try:
        wait_until(lambda: all(v.is_ready() for v in vassals), within=START_S, what=lambda: emperor.log)
        yield emperor, vassals
    finally:
        try:
            emperor.stop()
        finally:
            stop_coordinator(emperor.names)


@contextlib.contextmanager
def running_uwsgi(
    directory: Path,
    pool: str,
    config: str,
    *options: str,
    app: str = "app:application",
    mule: str | Path | None = MULE_FILE,
    hooks: Sequence[str] = HOOKS,
    is_mastered: bool = True,
) -> Iterator[UwsgiServer]:
    """Run uWSGI and wait until it serves; kill it afterwards, nothing of the pool is left.

    Args:
        directory: of the log, and of further modules.
        options: of uWSGI, beside those that every test needs.
        mule: what the coordinator is started with; None: there is another one, or none.
        hooks: the options that import shmpool's.
        is_mastered: run workers under a master.
    """
    server = UwsgiServer(directory, pool, config)
    command = [*PROGRAM, *(["--master"] if is_mastered else []), "--pythonpath", str(directory), *hooks]
    command += ["--module", app, *([] if mule is None else [f"--mule={mule}"]), *options]
    server.start(command)
    try:
        wait_until(server.is_ready, within=START_S, what=lambda: server.log)
        if mule is not None:
            wait_until(server.is_coordinated, within=START_S, what=lambda: server.log)
        yield server
    finally:
        server.kill()
        stop_coordinator(server.names)
