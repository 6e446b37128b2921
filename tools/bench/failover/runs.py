"""The faults, each on a running load: what happened when, and every use of every worker."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg2

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from tools.bench.failover.crew import WATCHER, Crew, Use, coordinating, wait_for
from tools.bench.failover.peers import Site
from tools.pg_cluster import Cluster, Server, children_of

WORKERS: Final = 8
CROWD: Final = (1, 64)
SAMPLE_S: Final = 0.1
STARTS_S: Final = 0.5
GONE_S: Final = 10.0
POLL_S: Final = 0.002
SESSIONS: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name LIKE 'bench%'"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Seconds of each part of a run."""

    steady: float
    dead: float
    returned: float
    frozen: float
    promoted: float
    counted: float  # probes


FULL: Final = Lengths(steady=3, dead=8, returned=40, frozen=15, promoted=10, counted=30)
QUICK: Final = Lengths(steady=1.5, dead=4, returned=8, frozen=8, promoted=5, counted=6)


@dataclass(slots=True)
class Run:
    """What one pool went through."""

    uses: list[Use] = field(default_factory=list)
    victim: str = ""  # host
    at: dict[str, float] = field(default_factory=dict)  # moments by name
    sessions: list[tuple[float, int, int]] = field(default_factory=list)  # time, at the victim, at the other


@contextmanager
def servers() -> Iterator[Cluster]:
    """A primary and two standbys, on one port of three addresses (pgdbpool knows but one port)."""
    settings = {"max_connections": "300", "log_line_prefix": "%u "}
    with Cluster(2, settings, is_one_port=True) as cluster:
        if len({server.port for server in cluster.servers}) > 1:
            raise RuntimeError("the primary's port is taken on another address; run again")
        cluster.primary.execute(f"CREATE ROLE {WATCHER} LOGIN SUPERUSER")
        cluster.primary.execute("CREATE TABLE failover_writes (at timestamptz)")
        for standby in cluster.standbys:
            wait_for(lambda s=standby: s.execute("SELECT to_regclass('failover_writes')") != [(None,)], 10, "no replay")
        yield cluster


@contextmanager
def under_load(name: str, cluster: Cluster, group: str, workers: int = WORKERS) -> Iterator[tuple[Crew, Site]]:
    """Workers with all their connections open, not yet busy."""
    with ExitStack() as stack:
        pool = stack.enter_context(coordinating(cluster, workers)) if name == "shmpool" else ""
        members = cluster.standbys if group == "read" else cluster.servers
        site = Site([server.host for server in members], cluster.primary.port, pool, group)
        yield stack.enter_context(Crew(name, site, workers)), site


@dataclass(frozen=True, slots=True)
class Killed:
    """A server whose postmaster was killed alone: its children see that and go, some milliseconds later."""

    server: Server
    children: Sequence[int]

    def wait_gone(self) -> float:
        """Wait until its last process has ended, and with it every session; return when."""
        living = set(self.children)
        deadline = time.monotonic() + GONE_S
        while living and time.monotonic() < deadline:
            time.sleep(POLL_S)
            living = set(filter(_lives, living))
        if living:
            raise RuntimeError(f"{self.server.name}: processes {living} outlive it")
        return time.monotonic()

    def start_again(self) -> None:
        self.wait_gone()
        wait_for(lambda: not self.server.is_running, GONE_S, f"{self.server.name} still runs")
        self.server.start()


def kill(server: Server) -> Killed:
    """Kill the postmaster of a server."""
    assert server.pid is not None
    killed = Killed(server, children_of(server.pid))
    os.kill(server.pid, signal.SIGKILL)
    return killed


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed_and_returned(name: str, cluster: Cluster, lengths: Lengths) -> Run:
    """A replica is killed under load, and started again."""
    victim, other = cluster.standbys
    run = Run(victim=victim.host)
    with under_load(name, cluster, "read") as (crew, _), Sampler(victim, other, run.sessions):
        _begin(crew, run, lengths)
        run.at["fault"] = time.monotonic()
        killed = kill(victim)
        run.at["gone"] = killed.wait_gone()
        time.sleep(lengths.dead)
        run.at["start"] = time.monotonic()
        killed.start_again()
        run.at["returned"] = time.monotonic()
        time.sleep(lengths.returned)
        run.at["end"] = time.monotonic()
        run.uses = crew.end()
    return run


def _begin(crew: Crew, run: Run, lengths: Lengths) -> None:
    """Put the load on, and let it get steady."""
    crew.tell("load")
    time.sleep(STARTS_S)
    run.at["steady"] = time.monotonic()
    time.sleep(lengths.steady)


def killed_at_rest(name: str, cluster: Cluster, lengths: Lengths) -> Run:
    """A replica is killed while nobody uses a connection; then each worker uses all of its own at once."""
    victim = cluster.standbys[0]
    run = Run(victim=victim.host)
    with under_load(name, cluster, "read") as (crew, site):
        time.sleep(1)  # past any window in which a connection counts as just used
        run.at["fault"] = time.monotonic()
        killed = kill(victim)
        try:
            if site.pool:
                is_down = lambda: _health(site.pool, victim.name) is Health.DOWN  # noqa: E731
                run.at["known"] = wait_for(is_down, 20, "the server is not known as DOWN")
            time.sleep(max(0.0, run.at["fault"] + lengths.dead - time.monotonic()))
            run.at["burst"] = time.monotonic()
            crew.tell("burst")
            run.uses = crew.end()
        finally:
            killed.start_again()
    return run


def _health(pool: str, endpoint: str) -> Health:
    return next(e.health for e in observe(Names.of(pool)).endpoints if e.name == endpoint)


def frozen(name: str, cluster: Cluster, lengths: Lengths) -> Run:
    """A replica is stopped, with all its processes, under load; later it goes on."""
    victim = cluster.standbys[0]
    run = Run(victim=victim.host)
    with under_load(name, cluster, "read") as (crew, _):
        _begin(crew, run, lengths)
        run.at["fault"] = time.monotonic()
        victim.pause()
        try:
            time.sleep(lengths.frozen)
        finally:
            run.at["thaw"] = time.monotonic()
            victim.resume()
        time.sleep(2)
        run.at["end"] = time.monotonic()
        run.uses = crew.end()
    return run


def promoted(name: str, lengths: Lengths) -> Run:
    """The primary is killed under a load of writes, a second later a standby is promoted: on servers of its own."""
    with servers() as cluster:
        heir = cluster.standbys[0]
        run = Run(victim=heir.host)
        with under_load(name, cluster, "write") as (crew, _):
            _begin(crew, run, lengths)
            run.at["fault"] = time.monotonic()
            kill(cluster.primary)
            time.sleep(1)
            observer = threading.Thread(target=_watch_promotion, args=(heir, run.at))
            observer.start()
            heir.execute("SELECT pg_promote(false)")
            observer.join()
            time.sleep(lengths.promoted)
            run.at["end"] = time.monotonic()
            run.uses = crew.end()
    return run


def _watch_promotion(server: Server, at: dict[str, float]) -> None:
    """Note when a server is in recovery no more, as a bare connection sees it."""
    connection = psycopg2.connect(server.conninfo())
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                cursor.execute("SELECT pg_is_in_recovery()")
                if cursor.fetchone() == (False,):
                    at["accepts"] = time.monotonic()
                    return
                time.sleep(POLL_S)
    finally:
        connection.close()
    raise RuntimeError(f"{server.name} was not promoted in 30 s")


def probes(cluster: Cluster, lengths: Lengths) -> dict[int, float]:
    """Return, by number of workers under load, what the coordinator asks of a standby each second: as that logs it."""
    cluster.primary.execute(f"ALTER ROLE {WATCHER} SET log_statement = 'all'")
    watched = cluster.standbys[0]
    rates = {}
    for workers in CROWD:
        with under_load("shmpool", cluster, "read", workers) as (crew, _):
            crew.tell("load")
            time.sleep(lengths.steady)
            before, began = _statements(watched), time.monotonic()
            time.sleep(lengths.counted)
            rates[workers] = (_statements(watched) - before) / (time.monotonic() - began)
    cluster.primary.execute(f"ALTER ROLE {WATCHER} RESET log_statement")
    return rates


def _statements(server: Server) -> int:
    log = (server.root / f"{server.name}.log").read_text()
    return log.count(f"{WATCHER} LOG:  statement") + log.count(f"{WATCHER} LOG:  execute")


class Sampler:
    """Counts the sessions of the load at two servers, all along."""

    def __init__(self, victim: Server, other: Server, counts: list[tuple[float, int, int]]) -> None:
        self._servers = (victim, other)
        self._counts = counts
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *details: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        open_ones: dict[str, Any] = {}
        while not self._is_over.wait(SAMPLE_S):
            found = [self._count(server, open_ones) for server in self._servers]
            self._counts.append((time.monotonic(), found[0], found[1]))
        for connection in open_ones.values():
            connection.close()

    def _count(self, server: Server, open_ones: dict[str, Any]) -> int:
        """Return the sessions at a server, 0 where it does not answer."""
        try:
            if server.name not in open_ones:
                open_ones[server.name] = psycopg2.connect(server.conninfo(connect_timeout=2))
                open_ones[server.name].autocommit = True
            with open_ones[server.name].cursor() as cursor:
                cursor.execute(SESSIONS)
                return int(cursor.fetchone()[0])
        except psycopg2.Error:
            with suppress(KeyError):
                open_ones.pop(server.name).close()
            return 0
