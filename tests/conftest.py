"""Options and fixtures of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tools.pg_cluster import DIRECTORY_PREFIX, children_of

pytest_plugins = ["tests.support.postgres", "tests.support.coordinator"]

SHARED_MEMORY = Path("/dev/shm")
CLEANUP_S = 5.0
# Python's own, started once and kept until exit.
RESOURCE_TRACKER = "multiprocessing.resource_tracker"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-point",
        action="store_true",
        help="crash tests: die at every point instead of at a sample of them",
    )


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a child process or an entry in /dev/shm behind."""
    before = _traces()
    yield

    def left() -> list[str]:
        return sorted(_traces() - before)

    wait_until(lambda: not left(), within=CLEANUP_S, what=lambda: f"nothing left, but: {left()}")


def _traces() -> set[str]:
    return {str(path) for path in SHARED_MEMORY.glob("*shmpool*")} | _children()


def _children() -> set[str]:
    """Describe the child processes, zombies included; a shared server is one across restarts."""
    found = set()
    for pid in children_of(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended while we looked
        data = [word for word in words if Path(word).parent.name.startswith(DIRECTORY_PREFIX)]
        if RESOURCE_TRACKER not in " ".join(words):
            found.add(f"server {data[0]}" if data else f"process {pid}")
    return found
