"""A coordinator of real servers with quick probes, the times that its settings imply, and what it says of them.

The bounds are computed from the settings; SLACK_S is for a busy machine.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shmpool.layout import ENDPOINTS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from shmpool.status import EndpointReport
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import is_ready
from tools.pg_cluster import Server, children_of

INTER_S: Final = 0.1
FAST_S: Final = 0.05
TIMEOUT_S: Final = 0.3
RISE, FALL = 2, 3
JITTER: Final = 1.1
SLACK_S: Final = 1.0
PROBE: Final = (
    f'[probe]\ninter = "{INTER_S}s"\nfastinter = "{FAST_S}s"\ndowninter = "{INTER_S}s"\n'
    f'timeout = "{TIMEOUT_S}s"\nrise = {RISE}\nfall = {FALL}'
)
WATCHER: Final = "watcher"  # the coordinator's own user
ANY: Final = {"any": 'connections = 8\ntarget = "any"\nautocommit = true\ntimeout = "5s"'}
WRITE: Final = {"write": 'connections = 8\ntarget = "primary"\nautocommit = true\ntimeout = "5s"'}

# A probe begins within INTER_S of the fault; FALL of them fail, each at once or after its timeout, FAST_S apart.
REFUSED_DOWN_S: Final = JITTER * (INTER_S + (FALL - 1) * FAST_S)
SILENT_DOWN_S: Final = REFUSED_DOWN_S + FALL * TIMEOUT_S
# Where each byte is late, connect and query may take the timeout each, and the first probe may just have begun.
LATE_DOWN_S: Final = REFUSED_DOWN_S + (FALL + 1) * 2 * TIMEOUT_S
# A probe may be on its way when the cure comes; RISE good ones follow.
UP_S: Final = 2 * TIMEOUT_S + JITTER * (INTER_S + (RISE - 1) * FAST_S)


@contextmanager
def coordinating(
    pool: str,
    places: Mapping[str, int | str],
    groups: dict[str, str],
    probe: str = PROBE,
    extra: str = "",
    prefix: Sequence[str] = (),
) -> Iterator[CoordinatorProcess]:
    """Run a coordinator that has found every endpoint UP; nobody starts another one.

    Args:
        places: by endpoint, its port on 127.0.0.1 or its conninfo.
        extra: further lines of `[coordinator]`.
        prefix: the beginning of its command line.
    """
    text = watched_config(pool, places, groups, probe, extra)
    with running_coordinator(text, pool, prefix=prefix) as process:
        wait_until(lambda: is_ready(pool), within=10, what=lambda: process.log)
        yield process


def watched_config(
    pool: str, places: Mapping[str, int | str], groups: dict[str, str], probe: str = PROBE, extra: str = ""
) -> str:
    """Return a configuration of which nobody starts a second coordinator.  Args as `coordinating`."""
    endpoints = {
        name: endpoint_keys(conninfo(place) if isinstance(place, int) else place) for name, place in places.items()
    }
    return pool_config(pool, endpoints, groups, f"[coordinator]\nautostart = false\n{extra}\n{probe}")


def conninfo(port: int) -> str:
    """Return how workers and coordinator reach a server, or a relay."""
    return f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2"


def endpoint(pool: str, name: str) -> EndpointReport:
    """Return how an endpoint is."""
    return next(e for e in observe(Names.of(pool)).endpoints if e.name == name)


def seconds_until(condition: Callable[[], object], within: float, coordinator: CoordinatorProcess) -> float:
    """Return how long it took until a condition was true, at most `within` and the slack."""
    began = time.monotonic()
    wait_until(condition, within=within + SLACK_S, every=0.005, what=lambda: coordinator.log)
    return time.monotonic() - began


def is_in(pool: str, name: str, health: Health) -> Callable[[], bool]:
    """Return the question whether an endpoint is in a health."""
    return lambda: endpoint(pool, name).health is health


def probes_of(coordinator: CoordinatorProcess, index: int = 0) -> int:
    """Return how often an endpoint was probed."""
    segment = coordinator.attach()
    try:
        return int(segment.words[segment.layout.at(ENDPOINTS, index, "probes")])
    finally:
        segment.release()


def after_probes(coordinator: CoordinatorProcess, count: int, index: int = 0) -> None:
    """Wait until an endpoint was probed so many times more."""
    before = probes_of(coordinator, index)
    wait_until(lambda: probes_of(coordinator, index) >= before + count, within=10, what=lambda: coordinator.log)


def findings(pool: str) -> dict[str, str]:
    """Return what status finds, by code."""
    return {finding.code: str(finding) for finding in observe(Names.of(pool)).findings}


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop a server in the usual way, and start it again."""
    server.stop("fast")
    try:
        yield
    finally:
        server.start()


@contextmanager
def killed(server: Server) -> Iterator[None]:
    """Kill the postmaster alone; its children see that and go."""
    assert server.pid is not None
    children = children_of(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    try:
        yield
    finally:
        wait_until(lambda: not server.is_running)
        wait_until(lambda: not any(map(_lives, children)))
        server.start()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
