"""Coordinators that start at the same moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool.control_client import ControlError, request
from shmpool.names import Names
from tests.support.coordinator import endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until

RACERS = 8
RUN = """
import sys
from shmpool_coordinator.cli import main
print("ready", flush=True)
sys.stdin.read()
sys.exit(main(["run", "--config", sys.argv[1]]))
"""
RUN_WITH_EARLY_HANGUP = """
import os, signal, sys
from shmpool_coordinator import cli, origin

def load(path, known=origin.load):
    origin.load = known
    os.kill(os.getpid(), signal.SIGHUP)
    return known(path)

origin.load = load
sys.exit(cli.main(["run", "--config", sys.argv[1]]))
"""


@pytest.fixture
def config(pool_name: str, tmp_path: Path) -> Path:
    """A configuration whose one endpoint refuses connections."""
    path = tmp_path / f"{pool_name}.toml"
    endpoints = {"pg1": endpoint_keys("host=127.0.0.1 port=1 dbname=none")}
    path.write_text(pool_config(pool_name, endpoints, {"read": 'connections = 2\ntarget = "any"'}))
    return path


@pytest.fixture
def racers(config: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have loaded everything; they start once the fixture's pipe is closed (`go`)."""
    command = [sys.executable, "-c", RUN, str(config)]
    read_fd, write_fd = os.pipe()
    started = [
        subprocess.Popen(command, stdin=read_fd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(RACERS)
    ]
    os.close(read_fd)
    for racer in started:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    os.close(write_fd)
    yield started
    for racer in started:
        racer.terminate()
    for racer in started:
        racer.communicate(timeout=10)


@pytest.fixture
def predecessor(request: pytest.FixtureRequest, config: Path, pool_name: str) -> Iterator[bool]:
    """With or without the segment of a coordinator that was killed; before `racers`."""
    if not request.param:
        yield False
        return
    with running_coordinator(config, pool_name) as coordinator:
        coordinator.kill()
        assert coordinator.names.segment.exists()
        yield True


@pytest.mark.parametrize("predecessor", [False, True], indirect=True, ids=["new", "adopted"])
def test_one_of_many_wins(predecessor: bool, racers: list[subprocess.Popen[str]], pool_name: str) -> None:
    """Of coordinators that start at once exactly one serves; the others name it and end."""
    names = Names.of(pool_name)
    wait_until(lambda: sum(racer.poll() is None for racer in racers) == 1, within=20)
    (winner,) = [racer for racer in racers if racer.poll() is None]
    wait_until(lambda: answers(names, winner.pid), within=10)
    for loser in racers:
        if loser is not winner:
            _, said = loser.communicate()
            assert loser.returncode == 4, said
            assert re.search(rf"already running, pid {winner.pid}\b", said), said
    assert request(names, "info")["adoptions"] == 1 + predecessor


def answers(names: Names, pid: int) -> bool:
    """Whether a process serves the pool."""
    try:
        return bool(request(names, "info")["pid"] == pid)
    except ControlError:
        return False


def test_early_hangup_is_a_reload(config: Path, pool_name: str) -> None:
    """SIGHUP that comes before the coordinator listens to signals does not end it, and is not lost."""
    command = [sys.executable, "-c", RUN_WITH_EARLY_HANGUP, str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or answers(Names.of(pool_name), process.pid), within=10)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    assert "reload: no change" in said
    assert process.returncode == 0
