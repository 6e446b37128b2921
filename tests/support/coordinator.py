"""Coordinators for tests: real processes on a configuration of their own, and unique pool names."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmpool import segment
from shmpool.control_client import ControlError, request
from shmpool.errors import MechanismError
from shmpool.frames import Message
from shmpool.names import Names
from shmpool.segment import Segment
from tests.support.waiting import wait_until

END_S = 10.0

_numbers = itertools.count()


def pool_config(name: str, endpoints: dict[str, str], groups: dict[str, str], extra: str = "") -> str:
    """Return a configuration: tables by name, each given as the lines of its keys."""
    lines = [f'name = "{name}"', extra]
    for table, rows in (("endpoints", endpoints), ("groups", groups)):
        for row, keys in rows.items():
            lines += [f"[{table}.{row}]", keys]
    return "\n".join(lines) + "\n"


def endpoint_keys(conninfo: str, max_connections: int = 20) -> str:
    """Return the keys of an endpoint's table."""
    return f"conninfo = '''{conninfo}'''\nmax_connections = {max_connections}"


class CoordinatorProcess:
    """A coordinator as its own process; its log goes to a file."""

    def __init__(self, config: Path, pool: str, arguments: Sequence[str] = (), prefix: Sequence[str] = ()) -> None:
        self.config = config
        self._prefix = tuple(prefix)
        self.names = Names.of(pool)
        self._arguments = tuple(arguments)
        self._log = config.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Its pid."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it, and those started before it on this configuration, logged."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, is_expected_to_serve: bool = True) -> None:
        """Start it (again), and wait until it answers."""
        command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(self.config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *command, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if is_expected_to_serve:
            wait_until(self.answers, within=END_S, what=lambda: f"coordinator ready; log: {self.log}")

    def answers(self) -> bool:
        """Whether this very process answers on the control socket."""
        assert self.is_running, f"the coordinator ended: {self.log}"
        try:
            return bool(self.request("info")["pid"] == self.pid)
        except ControlError:
            return False

    def request(self, kind: str) -> Message:
        """Send one message over the control socket and return the answer."""
        return request(self.names, kind)

    def attach(self) -> Segment:
        """Map the segment; the caller releases it."""
        return segment.attach(self.names, to_repair=True)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, within: float = END_S) -> int:
        """Wait for its end and return the exit code."""
        assert self._process is not None
        return self._process.wait(within)

    def kill(self) -> None:
        """End it without a chance to clean up."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(END_S)

    def terminate(self) -> int:
        """Ask it to end, and return its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(END_S)


@contextmanager
def running_coordinator(
    config: str | Path, pool: str, *arguments: str, prefix: Sequence[str] = ()
) -> Iterator[CoordinatorProcess]:
    """Run a coordinator on a configuration (its text, or a file) and end it afterwards; nothing of the pool is left.

    Args:
        prefix: the beginning of its command line; what it runs becomes the coordinator by exec.
    """
    with tempfile.TemporaryDirectory(prefix="coordinator-") as directory:
        if isinstance(config, str):
            path = Path(directory) / f"{pool}.toml"
            path.write_text(config)
        else:
            path = config
        process = CoordinatorProcess(path, pool, arguments, prefix)
        try:
            yield process
        finally:
            if process.is_running:
                process.terminate()
            remove_leftovers(pool)


def watched_by(coordinator: int) -> list[int]:
    """Return the pids of the processes of which a coordinator has a pidfd."""
    found = []
    for entry in Path(f"/proc/{coordinator}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            fields = dict(line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line)
            if "Pid" in fields:
                found.append(int(fields["Pid"]))
    return found


def remove_leftovers(pool: str) -> None:
    """Remove every name of a pool."""
    for path in Names.of(pool).leftovers():
        path.unlink(missing_ok=True)


@pytest.fixture
def pool_name() -> Iterator[str]:
    """A pool name that no other test uses; whatever is left of it is removed."""
    name = f"t{os.getpid()}-{next(_numbers)}"
    yield name
    remove_leftovers(name)


def can_attach(names: Names) -> bool:
    """Whether there is an open segment."""
    try:
        segment.attach(names).release()
    except MechanismError:
        return False
    return True
