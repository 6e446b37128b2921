"""Peers under Gunicorn: all sites of a comparison run at the same time, and get their load in turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.status import GroupReport
from tools.bench.load import get
from tools.bench.peers import pgbouncer
from tools.bench.peers.client import Told
from tools.bench.peers.measure import cpu_of_tree
from tools.bench.peers.pools import GROUP, TIMEOUT_S, Share
from tools.pg_cluster import Server
from tools.stage import ROOT, free_port, gunicorn_command

START_S = 30.0
STOP_S = 30.0
WARM_UP_S = 0.15  # at most, and of a round a fifth
UNBOUNDED = "raw-unbounded"  # has a session for each thread, whatever the others may have
BEHIND_POOLER = {"pgbouncer": False, "pgbouncer-unix": True}  # and whether over its Unix socket

CONFIG = """
name = "{name}"
[probe]
conninfo = "user=postgres"
[endpoints.pg1]
conninfo = "{conninfo}"
max_connections = {connections}
[groups.{group}]
connections = {connections}
target = "primary"
autocommit = {autocommit}
timeout = "{timeout:g}s"
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What all peers of a comparison have in common.

    Args:
        connections: how many sessions each peer may have at the server.
        clients: how many requests are under way at any time.
    """

    workload: str
    workers: int
    threads: int
    connections: int
    clients: int

    @property
    def is_threaded(self) -> bool:
        """Whether Gunicorn's workers are threaded."""
        return self.threads > 1


@dataclass(frozen=True, slots=True)
class Round:
    """One round of load at one site.

    Args:
        cpu: seconds for the server, the workers, and what is in between (coordinator, PgBouncer), by name.
    """

    told: Told
    cpu: Mapping[str, float]


@dataclass(slots=True)
class Site:
    """A running Gunicorn with one peer."""

    peer: str
    shape: Shape
    port: int
    counts: Path
    trees: Mapping[str, int]  # whose CPU time counts, by name
    process: subprocess.Popen[bytes]
    pool: str | None = None
    log: Path = field(default_factory=Path)

    def wait_ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                answer = get(self.port)
                if b" 200 " in answer[:16]:
                    return
            except OSError as error:
                answer = repr(error).encode()
            if time.monotonic() > deadline or self.process.poll() is not None:
                told = self.log.read_text(errors="replace")
                raise RuntimeError(f"{self.peer} did not start: {answer!r} {told}")
            time.sleep(0.05)

    def round(self, seconds: float) -> Round:
        """Send load for some seconds."""
        before = self._cpu()
        arguments = (self.port, self.shape.clients, min(WARM_UP_S, seconds / 5), seconds)
        command = [sys.executable, "-m", "tools.bench.peers.client", *map(str, arguments)]
        told = Told(**json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout))
        after = self._cpu()
        return Round(told, {name: after[name] - before[name] for name in after})

    def ask(self, path: str) -> float:
        """Return the seconds that a request to one of the application's measuring paths answers with."""
        head, _, body = get(self.port, path).partition(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise RuntimeError(f"{self.peer}: {body.decode(errors='replace')}")
        return float(body)

    def group(self) -> GroupReport | None:
        """Return what shmpool's status says of its group; None for other peers."""
        return observe(Names.of(self.pool)).groups[0] if self.pool else None

    def served(self) -> dict[tuple[str, str], int]:
        """Return the requests that each thread has served since the start, by process and thread."""
        return {
            (path.stem, path.suffix): int.from_bytes(path.read_bytes(), sys.byteorder)  # empty: just being made
            for path in self.counts.iterdir()
        }

    def _cpu(self) -> dict[str, float]:
        return {name: cpu_of_tree(pid) for name, pid in self.trees.items()}


def role_of(peer: str) -> str:
    """Return the role that a peer is at the server."""
    return "bench_" + peer.replace("-", "_")


def prepare(server: Server, peers: Sequence[str], accounts: int) -> None:
    """Make the table and a role for each peer."""
    server.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50)")
    server.execute(f"INSERT INTO accounts SELECT n, 0 FROM generate_series(0, {accounts - 1}) AS n")
    server.execute("GRANT SELECT, UPDATE ON accounts TO PUBLIC")
    for peer in peers:
        server.execute(f"CREATE ROLE {role_of(peer)} LOGIN")


@contextmanager
def running(server: Server, shape: Shape, peers: Sequence[str]) -> Iterator[dict[str, Site]]:
    """Run a site for each peer, all at once; the server itself refuses a session more than `connections`."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmpool-peers-")))
        for peer in peers:
            limit = shape.workers * shape.threads if peer == UNBOUNDED else shape.connections
            server.execute(f"ALTER ROLE {role_of(peer)} CONNECTION LIMIT {limit}")
        pooled = [peer for peer in peers if peer in BEHIND_POOLER]
        pooler = None
        if pooled:
            roles = {role_of(peer): role_of(peer) for peer in pooled}
            pooler = stack.enter_context(pgbouncer.running(server, roles, shape.connections))
        sites: dict[str, Site] = {}
        for peer in peers:
            sites[peer] = stack.enter_context(_site(server, shape, peer, folder / peer, pooler))
        for site in sites.values():
            site.wait_ready()
        stack.callback(_terminate, list(sites.values()))  # all at once
        yield sites


def _terminate(sites: Sequence[Site]) -> None:
    for site in sites:
        site.process.terminate()


@contextmanager
def twins(server: Server, shape: Shape) -> Iterator[list[Site]]:
    """Run two masters with shmpool that share one pool."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmpool-peers-")))
        server.execute(f"ALTER ROLE {role_of('shmpool')} CONNECTION LIMIT {shape.connections}")
        name, pid = stack.enter_context(_coordinator(server, shape, folder))
        share = Share(name, shape.connections, shape.threads, True)
        pair = [
            stack.enter_context(_gunicorn(server, shape, "shmpool", folder / place, share, {"between": pid}, name))
            for place in ("one", "other")
        ]
        for site in pair:
            site.wait_ready()
        yield pair


@contextmanager
def _site(server: Server, shape: Shape, peer: str, folder: Path, pooler: pgbouncer.PgBouncer | None) -> Iterator[Site]:
    with ExitStack() as stack:
        pool, between = None, {}
        conninfo = server.conninfo(user=role_of(peer))
        if peer in BEHIND_POOLER:
            assert pooler is not None
            conninfo, between = pooler.conninfo(role_of(peer), is_unix=BEHIND_POOLER[peer]), {"between": pooler.pid}
        elif peer == "shmpool":
            folder.mkdir()
            pool, pid = stack.enter_context(_coordinator(server, shape, folder))
            conninfo, between = pool, {"between": pid}
        share = Share(
            conninfo,
            max(1, shape.connections // shape.workers),
            shape.threads,
            shape.workload != "transaction",
        )
        yield stack.enter_context(_gunicorn(server, shape, peer, folder, share, between, pool))


@contextmanager
def _gunicorn(
    server: Server,
    shape: Shape,
    peer: str,
    folder: Path,
    share: Share,
    between: Mapping[str, int],
    pool: str | None,
) -> Iterator[Site]:
    counts, log, port = folder / "counts", folder / "gunicorn.log", free_port()
    counts.mkdir(parents=True)
    options = ["--workers", str(shape.workers), "--log-level", "error", "--timeout", "120"]
    if shape.is_threaded:
        options += ["--worker-class", "gthread", "--threads", str(shape.threads)]
    if pool is not None:
        options += ["--config", "python:shmpool.hooks.gunicorn"]
    environment = {
        "BENCH_PEER": peer,
        "BENCH_WORKLOAD": shape.workload,
        "BENCH_SHARE": json.dumps(asdict(share)),
        "BENCH_COUNTS": str(counts),
        "BENCH_CONNECT": server.conninfo(),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            gunicorn_command(port, *options, app="tools.bench.peers.app:application"),
            env=os.environ | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    postmaster = server.pid
    assert postmaster is not None
    trees = {"server": postmaster, "workers": process.pid, **between}
    try:
        yield Site(peer, shape, port, counts, trees, process, pool, log)
    finally:
        process.terminate()
        process.wait(STOP_S)


@contextmanager
def _coordinator(server: Server, shape: Shape, folder: Path) -> Iterator[tuple[str, int]]:
    """Run a coordinator; yield the pool's name and its pid."""
    name = f"peers-{os.getpid()}"
    path = folder / "shmpool.toml"
    path.write_text(
        CONFIG.format(
            name=name,
            conninfo=server.conninfo(user=role_of("shmpool")),
            connections=shape.connections,
            group=GROUP,
            autocommit=str(shape.workload != "transaction").lower(),
            timeout=TIMEOUT_S,
        )
    )
    command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(path), "--log-level", "error"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while observe(Names.of(name)).level and time.monotonic() < deadline:
            time.sleep(0.05)
        yield name, process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
