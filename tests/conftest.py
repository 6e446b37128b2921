"""Options and fixtures of every test."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tools.pg_cluster import DIRECTORY_PREFIX, children_of

pytest_plugins = ["tests.support.postgres", "tests.support.coordinator", "tests.support.users"]

SHARED_MEMORY = Path("/dev/shm")
CLEANUP_S = 5.0
# What every process of a test run has in its environment, so that another run's are told apart.
RUN = "SHMPOOL_TEST_RUN"
os.environ[RUN] = str(os.getpid())
# Python's own, started once and kept until exit.
RESOURCE_TRACKER = "multiprocessing.resource_tracker"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-point",
        action="store_true",
        help="crash tests: die at every point instead of at a sample of them",
    )


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes `make test` runs: the servers that tests start need the other half of the machine."""
    return max(1, (os.cpu_count() or 1) // 2)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a child process or an entry in /dev/shm behind."""
    before = _traces()
    yield

    def left() -> list[str]:
        return sorted(_traces() - before)

    wait_until(lambda: not left(), within=CLEANUP_S, what=lambda: f"nothing left, but: {left()}")


def _traces() -> set[str]:
    entries = set(SHARED_MEMORY.glob("*shmpool*"))
    foreign = tuple(_foreign_stems(entries)) if entries else ()
    own = [path for path in entries if not path.name.removeprefix("sem.").startswith(foreign)]
    pids = {path: _pids_in(path.name) for path in own}
    others = {pid for pid in set().union(*pids.values()) if _is_another_run(pid)}
    return {str(path) for path in own if not pids[path] & others} | _children()


def _pids_in(name: str) -> set[int]:
    """Return what may be process ids in a pool's name: tests give it that of their run, or of its child."""
    pool = "".join(name.removeprefix("sem.").split(".")[2:3])
    return {int(number) for number in re.findall(r"\d+", pool)}


def _is_another_run(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        command, environment = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    except OSError:
        return False
    return (b"pytest" in command or f"{RUN}=".encode() in environment) and not _is_of_this_run(pid)


def _foreign_stems(entries: set[Path]) -> Iterator[str]:
    """Return how the entries of pools begin whose lock file is held by a process that is not of this test run."""
    holders: dict[int, int] = {}
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "POSIX" in words:
            at = words.index("POSIX")
            holders[int(words[at + 4].rsplit(":", 1)[1])] = int(words[at + 3])
    for path in entries:
        if path.suffix == ".lock":
            with contextlib.suppress(FileNotFoundError):
                holder = holders.get(path.stat().st_ino)
                if holder is not None and not _is_of_this_run(holder):
                    yield path.stem


def _is_of_this_run(pid: int) -> bool:
    """Whether this test run started a process; a detached coordinator is no child."""
    if pid == os.getpid() or pid in _descendants(os.getpid()):
        return True
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has just ended, or hides its memory as ours do
        return True
    return f"{RUN}={os.getpid()}".encode() in environment


def _descendants(pid: int) -> set[int]:
    found = {pid}
    for child in children_of(pid):
        found |= _descendants(child)
    return found


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
