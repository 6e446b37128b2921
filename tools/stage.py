"""Everything that `make run` shows, started and ended in order: servers, coordinator, the example under its server.

Guarantees: leaving the `with` block ends all of it, also after an error, and `left` names what would still be there.
Assumptions: signals only set a flag (`Signals`), so nothing is torn apart between two steps.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from gunicorn.config import KNOWN_SETTINGS

from shmpool import tables
from shmpool.launch import serving_pid
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.rows import start_time
from shmpool.states import Health
from tools.pg_cluster import HOST, Cluster

ROOT: Final = Path(__file__).resolve().parent.parent
EXAMPLE: Final = ROOT / "examples" / "gunicorn"
UWSGI_EXAMPLE: Final = ROOT / "examples" / "uwsgi"
UWSGI: Final = Path(sys.executable).with_name("uwsgi")
START_S: Final = 20.0
STOP_S: Final = 15.0
POLL_S: Final = 0.05
DIRECTORY_PREFIX: Final = "shmpool-run-"
# What Gunicorn and the coordinator put before a message: times, which are told already, and the level.
STAMP: Final = re.compile(r"^(\[[^]]+\] \[\d+\] \[(\w+)\]|[\d-]+ [\d:,]+ (\w+)) ")
SERIOUS: Final = {"WARNING", "ERROR", "CRITICAL"}

Condition = Callable[[], object]

_began = time.monotonic()


class StageError(Exception):
    """Something could not be started, or ended by itself; the message says what."""


class StoppedError(Exception):
    """Ctrl-C or SIGTERM asked for the end."""


def say(text: str) -> None:
    """Print one line with the seconds since the start."""
    print(f"{time.monotonic() - _began:6.1f} s  {text}", flush=True)


class Signals:
    """SIGINT and SIGTERM as a flag that is looked at between steps; a second one changes nothing."""

    def __init__(self) -> None:
        self._is_stopped = False

    def install(self) -> None:
        """Take the signals over, for the rest of the process's life."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # os.write: print is not safe where the handler interrupts a print.
        os.write(1, b"\n" if not self._is_stopped else b"\nending already, a moment\n")
        self._is_stopped = True

    def check(self) -> None:
        """Raise StoppedError once the end was asked for."""
        if self._is_stopped:
            raise StoppedError


class Child:
    """A program whose output is shown line by line under its name, and kept in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, **options: object) -> None:
        self.name = name
        self._log = log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is ours alone: the order of the end matters
            **options,  # type: ignore[call-overload]  # of Popen
        )
        self._reader = threading.Thread(target=self._show, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its pid, which is also its process group."""
        return int(self.process.pid)

    @property
    def is_running(self) -> bool:
        """Whether it lives."""
        return self.process.poll() is None

    def is_left(self) -> bool:
        """Whether any process of its group lives; one that ended and was not reaped yet by init does not."""
        return any(
            start_time(pid) is not None for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._has(pid)
        )

    def _has(self, pid: int) -> bool:
        try:
            return os.getpgid(pid) == self.pid
        except ProcessLookupError:
            return False

    def stop(self) -> None:
        """Ask it to end; kill its whole group if it does not in time."""
        if self.is_running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        if self.is_running:
            say(f"{self.name} did not end in {STOP_S:g} s: killed")
        self.kill()

    def kill(self) -> None:
        """Kill its whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(STOP_S)

    def _show(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("a") as log, self.process.stdout as lines:
            for line in lines:
                log.write(line)
                log.flush()
                stamp = STAMP.match(line)
                level = (stamp[2] or stamp[3]) if stamp else ""
                text = line[stamp.end() :] if stamp else line
                say(f"  {self.name} | {level + ': ' if level in SERIOUS else ''}{text.rstrip()}")


def fill_in(template: Path, pool: str, conninfos: Mapping[str, str]) -> str:
    """Return a configuration with another pool name and other addresses of its endpoints."""
    text = template.read_text()
    raw = tomllib.loads(text)
    text = text.replace(f'name = "{raw["name"]}"', f'name = "{pool}"')
    for name, conninfo in conninfos.items():
        text = text.replace(raw["endpoints"][name]["conninfo"], conninfo)
    return text


def free_port(port: int = 0) -> int:
    """Return a loopback port that is free now: this one, or any for 0.

    Raises:
        StageError: the port is taken.
    """
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((HOST, port))
        except OSError as error:
            raise StageError(f"port {port}: {error.strerror}; choose another with --port") from None
        return int(candidate.getsockname()[1])


def gunicorn_command(port: int, *arguments: str, app: str = "app:application") -> list[str]:
    """Return the command that serves the example on a port; it runs in the example's directory."""
    quiet = "--no-control-socket"  # since Gunicorn 25
    is_known = any(quiet in (setting.cli or ()) for setting in KNOWN_SETTINGS)
    options = ["--bind", f"{HOST}:{port}", *([quiet] if is_known else []), *arguments]
    return [sys.executable, "-m", "gunicorn", *options, app]


def uwsgi_configuration(port: int, workers: int) -> str:
    """Return the configuration of the uWSGI example for another port and another number of workers, from any place."""
    text = (UWSGI_EXAMPLE / "uwsgi.ini").read_text()
    text = re.sub(r"^http-socket = .*$", f"http-socket = {HOST}:{port}", text, flags=re.MULTILINE)
    text = re.sub(r"^processes = .*$", f"processes = {workers}", text, flags=re.MULTILINE)
    return text.replace("%d", f"{UWSGI_EXAMPLE}/")


class Stage:
    """Primary, standby, coordinator and application server, for the length of a `with` block.

    Args:
        server: "gunicorn", with a coordinator beside it, or "uwsgi", with the coordinator as its mule.
    """

    def __init__(
        self, signals: Signals, *, pool: str, workers: int, port: int, keep_logs: bool, server: str = "gunicorn"
    ) -> None:
        self._server = server
        self.signals = signals
        self.names = Names.of(pool)
        self.workers = workers
        self._port = port
        self._keep_logs = keep_logs
        self.cluster = Cluster(standbys=1)
        self.directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        self.config = self.directory / "shmpool.toml"
        self.children: dict[str, Child] = {}
        self._ended: list[Child] = []
        self._ends = contextlib.ExitStack()
        self._traces: list[Path] = []  # of the servers, while they are there

    def __enter__(self) -> Self:
        try:
            self._start_servers()
            if self._server == "uwsgi":
                self._start_uwsgi()
            else:
                self.start_coordinator()
                self._start_gunicorn()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_servers(self) -> None:
        self.signals.check()
        say("starting a PostgreSQL primary and a streaming standby (throw-away, loopback only)")
        self.cluster.__enter__()
        self._ends.callback(self._stop_servers)
        self.cluster.primary.execute((EXAMPLE / "schema.sql").read_text())
        servers = {"pg1": self.cluster.primary, "pg2": self.cluster.standbys[0]}
        for name, server in servers.items():
            say(f"{name}: {server.conninfo()}")
        conninfos = {name: server.conninfo() for name, server in servers.items()}
        self.config.write_text(fill_in(EXAMPLE / "shmpool.toml", self.names.pool, conninfos))

    def start_coordinator(self) -> None:
        """Start a coordinator (again), and wait until it serves."""
        command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(self.config)]
        child = self._start("coordinator", command, cwd="/")
        self.wait(lambda: serving_pid(self.names, is_fresh=True) == child.pid, START_S, "the coordinator serves")
        say(f"coordinator serves pool {self.names.pool}, pid {child.pid}")

    def _start_gunicorn(self) -> None:
        self.port = free_port(self._port)
        command = gunicorn_command(self.port, "--workers", str(self.workers), "--graceful-timeout", "5")
        environment = os.environ | {"SHMPOOL_NAME": self.names.pool}
        environment.pop("SHMPOOL_CONFIG", None)  # the coordinator runs already, where its log is seen
        self._start("gunicorn", command, cwd=EXAMPLE, env=environment)
        self.wait(self._answers, START_S, "Gunicorn answers")
        say(f"Gunicorn serves http://{HOST}:{self.port}/ with {self.workers} workers")

    def _start_uwsgi(self) -> None:
        if not UWSGI.exists():
            raise StageError(f"{UWSGI} is not there: make venv-uwsgi compiles it, and says what is missing for that")
        self.port = free_port(self._port)
        file = self.directory / "uwsgi.ini"
        file.write_text(uwsgi_configuration(self.port, self.workers))
        environment = os.environ | {"SHMPOOL_NAME": self.names.pool, "SHMPOOL_CONFIG": str(self.config)}
        self._start("uwsgi", [str(UWSGI), str(file)], env=environment)
        self.wait(self._answers, START_S, "uWSGI answers")
        self.wait(lambda: serving_pid(self.names, is_fresh=True) is not None, START_S, "the mule serves")
        self.wait(self._knows_servers, START_S, "the coordinator knows the servers")
        say(f"coordinator serves pool {self.names.pool}, pid {serving_pid(self.names)}, a mule of uWSGI")
        say(f"uWSGI serves http://{HOST}:{self.port}/ with {self.workers} workers")

    def _knows_servers(self) -> bool:
        return all(endpoint.health is Health.UP for endpoint in observe(self.names).endpoints)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return connection.recv(12).endswith(b"200")
        except OSError:
            return False

    def _start(self, name: str, command: Sequence[str], **options: object) -> Child:
        self.signals.check()
        self.children[name] = child = Child(name, command, self.directory / f"{name}.log", **options)
        return child

    def kill_coordinator(self) -> None:
        """End the coordinator without a chance to clean up."""
        child = self.children.pop("coordinator")
        child.kill()
        self._ended.append(child)

    def wait(self, condition: Condition, within: float, what: str) -> None:
        """Wait for a condition while everything that was started lives.

        Raises:
            StoppedError: the end was asked for.
            StageError: a program ended by itself, or the time is up.
        """
        deadline = time.monotonic() + within
        while not condition():
            self.watch()
            if time.monotonic() >= deadline:
                raise StageError(f"expected that {what} within {within:g} s")
            time.sleep(POLL_S)

    def rest(self, seconds: float) -> None:
        """Let some time pass, as `wait` does."""
        deadline = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= deadline, seconds + 1, "time passes")

    def watch(self) -> None:
        """Raise if the end was asked for or a program ended by itself."""
        self.signals.check()
        for child in self.children.values():
            if not child.is_running:
                raise StageError(f"{child.name} ended by itself, exit code {child.process.returncode}")

    def show_status(self, *, with_slots: bool = False) -> None:
        """Print what `shmpool status` prints."""
        print(flush=True)
        tables.console().print(tables.whole(observe(self.names), with_slots=with_slots, with_all=False))
        print(flush=True)

    def close(self) -> None:
        """End everything: the application server, then the coordinator, then the servers."""
        for name in ("uwsgi", "gunicorn", "coordinator"):
            child = self.children.pop(name, None)
            if child is not None:
                child.stop()
                self._ended.append(child)
        self._ends.close()
        if self._keep_logs:
            say(f"logs are kept in {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _stop_servers(self) -> None:
        say("stopping the servers")
        self._traces = [Path(f"/proc/{pid}") for pid in self.cluster.pids] + [self.cluster.root]
        self.cluster.close()

    def left(self) -> list[str]:
        """Return what is still there after `close`: processes, names in /dev/shm, directories."""
        groups = [f"process group {child.pid} ({child.name})" for child in self._ended if child.is_left()]
        directories = [] if self._keep_logs else [self.directory]
        paths = [path for path in (*self._traces, *directories) if path.exists()]
        return [*groups, *map(str, paths), *map(str, self.names.leftovers())]
