"""`shmpool status` beside a real coordinator: running, stopped, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.status import Level, Report
from tests.support.pools import remove_all, unique_names
from tests.support.waiting import wait_until

CONFIG = """
name = "{name}"
[coordinator]
stale_after = "1s"
[probe]
inter = "0.2s"
fastinter = "0.1s"
downinter = "0.2s"
[endpoints.pg1]
conninfo = "host=127.0.0.1 port={port} dbname=app user=app"
max_connections = 6
[groups.read]
connections = 5
target = "any"
"""


@pytest.fixture
def names() -> Iterator[Names]:
    """Names of a pool of this test alone; whatever is left of it is removed."""
    names = unique_names()
    yield names
    remove_all(names)


@pytest.fixture
def coordinator(names: Names, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running coordinator whose one endpoint refuses connections."""
    config = tmp_path / "pool.toml"
    with socket.socket() as closed, (tmp_path / "log").open("wb") as log:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else takes the port
        config.write_text(CONFIG.format(name=names.pool, port=closed.getsockname()[1]))
        command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(config)]
        with subprocess.Popen(command, stderr=log) as process:
            try:
                wait_until(
                    lambda: observe(names).level is not Level.NOT_RUNNING,
                    what=lambda: (tmp_path / "log").read_text() or "no log",
                )
                yield process
            finally:
                process.kill()


def codes(report: Report) -> set[str]:
    """Return the codes of a report's findings."""
    return {finding.code for finding in report.findings}


def test_a_running_a_stopped_and_a_killed_coordinator(names: Names, coordinator: subprocess.Popen[bytes]) -> None:
    """Status tells a live coordinator from a stopped one that holds the lock, and from a dead one."""
    wait_until(lambda: "endpoint-down" in codes(observe(names)), within=10)
    report = observe(names)
    assert report.coordinator is not None
    assert (report.level, report.coordinator.pid) == (Level.DEGRADED, coordinator.pid)
    assert (report.is_judged, report.violations) == (True, ())
    assert (report.endpoints[0].free, report.groups[0].free) == (6, 5)

    os.kill(coordinator.pid, signal.SIGSTOP)
    wait_until(lambda: "coordinator-stalled" in codes(observe(names)))
    assert observe(names).level is Level.DEGRADED
    os.kill(coordinator.pid, signal.SIGCONT)
    wait_until(lambda: "coordinator-stalled" not in codes(observe(names)))

    coordinator.kill()
    coordinator.wait()
    report = observe(names)
    assert report.level is Level.NOT_RUNNING
    assert report.groups[0].free == 5
