"""The coordinator as a mule, without uWSGI: this test's process is the master, its children are the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmpool.control_client import ControlError, request
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.rows import Locks
from shmpool_coordinator.cli import EXIT_USAGE
from shmpool_coordinator.mule import PAUSE_S, SIGNALS
from tests.support.coordinator import can_attach, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until

MULE = "from shmpool_coordinator.mule import main; main()"
IMPATIENT_MULE = """
import sys
from shmpool_coordinator import daemon
from shmpool_coordinator.cli import main
daemon.DEPART_S = 0.3
sys.exit(main(["run", "--mule"]))
"""
WORKER = """
import sys
from shmpool.attachment import join
from shmpool.names import Names
attachment = join(Names.of(sys.argv[1]))
print("in", flush=True)
sys.stdin.read()
"""
END_S = 10.0


@pytest.fixture
def config(pool_name: str, tmp_path: Path) -> Path:
    """A configuration whose one endpoint refuses connections."""
    path = tmp_path / f"{pool_name}.toml"
    endpoints = {"pg1": endpoint_keys("host=127.0.0.1 port=1 dbname=none")}
    path.write_text(pool_config(pool_name, endpoints, {"read": 'connections = 2\ntarget = "any"'}))
    return path


class Mule:
    """A process as uWSGI starts it: by code, with the configuration's name in the environment."""

    def __init__(self, config: Path, code: str) -> None:
        self.names = Names.of(config.stem)
        self._log = config.with_suffix(".mule.log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"SHMPOOL_CONFIG": str(config)},
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),  # as `main` does, but sooner
            )

    @property
    def log(self) -> str:
        """What it printed."""
        return self._log.read_text()

    def serves(self) -> bool:
        """Whether it is the coordinator, and answers."""
        assert self.process.poll() is None, self.log
        try:
            return bool(request(self.names, "info")["pid"] == self.process.pid)
        except ControlError:
            return False

    def ticks(self) -> int:
        """Return how often coordinators have ticked."""
        coordinator = observe(self.names).coordinator
        assert coordinator is not None
        return coordinator.ticks

    def says(self, text: str) -> bool:
        """Whether it printed this."""
        assert self.process.poll() is None, self.log
        return text in self.log


@contextmanager
def running_mule(config: Path, code: str = MULE, *, serves: bool = True) -> Iterator[Mule]:
    """Start a mule, wait until it serves if it is to, and end it afterwards."""
    mule = Mule(config, code)
    try:
        if serves:
            wait_until(mule.serves, within=END_S, what=lambda: mule.log)
        yield mule
    finally:
        mule.process.kill()
        mule.process.wait()


@contextmanager
def running_worker(names: Names, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that holds a row; `before`: a program that starts it and is its parent."""
    command: Sequence[str] = (*before, sys.executable, "-c", WORKER, names.pool)
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        assert worker.stdout.readline() == b"in\n"
        yield worker
    finally:
        worker.stdin.close()
        worker.wait()
        worker.stdout.close()


@pytest.mark.parametrize(("number", "stays"), [(signal.SIGHUP, True), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_reload_leaves_the_segment_and_the_end_removes_it(config: Path, number: signal.Signals, stays: bool) -> None:
    """A mule that uWSGI reloads leaves the pool to the next one, one that it ends removes everything."""
    with running_mule(config) as mule:
        mule.process.send_signal(number)
        assert mule.process.wait(END_S) == 0
        assert can_attach(mule.names) is stays
        assert (mule.names.leftovers() == []) is not stays
    if stays:
        with running_mule(config) as successor:
            assert "segment adopted" in successor.log


@pytest.mark.parametrize("number", sorted(SIGNALS))
def test_a_signal_before_it_is_ready_is_not_lost(config: Path, number: signal.Signals) -> None:
    """What uWSGI sends while the program starts is done as soon as it can be, without a traceback."""
    with running_mule(config, serves=False) as mule:
        mule.process.send_signal(number)
        assert mule.process.wait(END_S) == 0
        assert "Traceback" not in mule.log
        assert (mule.names.leftovers() == []) is (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_it_serves_until_its_workers_have_ended(config: Path, number: signal.Signals) -> None:
    """Workers that still finish a request have a coordinator; its end follows theirs."""
    with running_mule(config) as mule:
        with running_worker(mule.names):
            mule.process.send_signal(number)
            wait_until(lambda: mule.says("ending after the workers"))
            seen = mule.ticks()
            wait_until(lambda: mule.ticks() > seen + 3)
            assert mule.serves()
        assert mule.process.wait(END_S) == 0
        assert (mule.names.leftovers() == []) is (number == signal.SIGINT)


def test_it_waits_for_its_workers_no_longer_than_it_may(config: Path) -> None:
    """A mule that is replaced alone ends although the workers stay; they keep their rows."""
    with running_mule(config, IMPATIENT_MULE) as mule, running_worker(mule.names):
        began = time.monotonic()
        mule.process.send_signal(signal.SIGHUP)
        assert mule.process.wait(END_S) == 0
        assert time.monotonic() - began >= 0.3
        with running_mule(config) as successor:
            assert "segment adopted" in successor.log
            assert Locks(successor.names).worker_pid() is not None


def test_workers_of_others_are_not_waited_for(config: Path) -> None:
    """Another server's worker on the same pool keeps the segment, not the mule."""
    with (
        running_mule(config) as mule,
        running_worker(mule.names, "sh", "-c", '"$@"; true', "sh") as shell,
    ):
        assert shell.pid != Locks(mule.names).worker_pid()
        mule.process.send_signal(signal.SIGINT)
        assert mule.process.wait(2) == 0
        assert can_attach(mule.names)


def test_it_stands_by_and_takes_over(config: Path) -> None:
    """While another coordinator has the pool a mule waits, says so once, and takes over when that one is killed."""
    with running_coordinator(config, config.stem) as first, running_mule(config, serves=False) as mule:
        wait_until(lambda: mule.says(f"pid {first.pid} coordinates it, standing by"), within=END_S)
        first.kill()
        wait_until(mule.serves, within=END_S, what=lambda: mule.log)
        assert mule.log.count("standing by") == 1
        assert "segment adopted" in mule.log


@pytest.mark.parametrize("number", sorted(SIGNALS))
def test_it_ends_at_once_while_it_stands_by(config: Path, number: signal.Signals) -> None:
    """A mule that never served removes nothing, whatever it is told."""
    with running_coordinator(config, config.stem) as first, running_mule(config, serves=False) as mule:
        wait_until(lambda: mule.says("standing by"), within=END_S)
        mule.process.send_signal(number)
        assert mule.process.wait(2) == 0
        assert first.answers()


def test_it_says_what_is_wrong_and_pauses(config: Path) -> None:
    """uWSGI starts a mule again at once: one that cannot start waits before it ends, but not when it is told to end."""
    config.write_text(config.read_text().replace("connections = 2", "connection = 2"))
    with running_mule(config, serves=False) as mule:
        wait_until(lambda: mule.says("groups.read.connection: "), within=END_S)
        with pytest.raises(subprocess.TimeoutExpired):
            mule.process.wait(0.5)
        mule.process.send_signal(signal.SIGTERM)
        assert mule.process.wait(PAUSE_S / 2) == EXIT_USAGE
        assert "Traceback" not in mule.log
