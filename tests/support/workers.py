"""A worker's side in tests: a pool over a shared coordinator, children by fork, and what must hold afterwards."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from shmpool import Handle, Pool
from shmpool.lease import Lease
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import Health
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.waiting import wait_until
from tools.pg_cluster import Cluster, Server

PROBE = '[probe]\ninter = "0.2s"\nfastinter = "0.1s"'
CHILD_S = 30

GROUPS = {
    "auto": 'connections = 4\ntarget = "primary"\nautocommit = true',
    "tx": 'connections = 4\ntarget = "primary"',
    "one": 'connections = 1\ntarget = "primary"\nautocommit = true\nper_worker_max = 1',
    "narrow": 'connections = 4\ntarget = "primary"\nautocommit = true\nper_worker_max = 1',
    "read": 'connections = 4\ntarget = "replica"\nendpoints = ["pg2"]',
    "nowhere": 'connections = 1\ntarget = "replica"\nendpoints = ["pg1"]',
    "session": 'connections = 2\ntarget = "primary"\nautocommit = true\nreset = "session"',
    "discard": 'connections = 2\ntarget = "primary"\nautocommit = true\nreset = "discard"',
}


def shared_config(pool: str, cluster: Cluster) -> str:
    """Return the configuration that most tests of the pool share: a primary `pg1`, a standby `pg2`, GROUPS."""
    endpoints = {
        "pg1": endpoint_keys(cluster.primary.conninfo()),
        "pg2": endpoint_keys(cluster.standbys[0].conninfo()),
    }
    return pool_config(pool, endpoints, GROUPS, PROBE)


@contextmanager
def pool_of(name: str, **options: Any) -> Iterator[Pool]:
    """A pool object of this process; afterwards every permit of the pool must be back."""
    try:
        with Pool(name, **options) as pool:
            yield pool
    finally:
        gc.collect()
        wait_until(lambda: is_whole(name), within=10, what=lambda: f"all permits back, but: {observe(Names.of(name))}")


def is_whole(name: str) -> bool:
    """Whether nobody holds a permit of a pool, and nothing about it is in doubt."""
    report = observe(Names.of(name))
    assert report.is_judged, report.findings
    return (
        not report.violations
        and all(group.free == group.issued == group.target for group in report.groups)
        and all(endpoint.free == endpoint.issued for endpoint in report.endpoints)
    )


def is_ready(name: str) -> bool:
    """Whether the coordinator has filled every semaphore and found every endpoint UP."""
    report = observe(Names.of(name))
    return is_whole(name) and all(endpoint.health is Health.UP for endpoint in report.endpoints)


def lease_of(handle: Handle) -> Lease:
    """Return what a handle stands for."""
    assert handle._lease is not None
    return handle._lease


def backend(handle: Handle) -> int:
    """Return the pid of a connection's server process."""
    return int(handle.get_backend_pid())


def one_value(handle: Handle, sql: str, *arguments: object) -> Any:
    """Run a query and return its one value."""
    with handle.cursor() as cur:
        cur.execute(sql, arguments or None)
        row = cur.fetchone()
    assert row is not None
    return row[0]


def sessions(server: Server, pool: str) -> list[int]:
    """Return the server processes that serve workers of a pool."""
    pattern = f"%shmpool:{pool}:%:%"
    rows = server.execute(f"SELECT pid FROM pg_stat_activity WHERE application_name LIKE '{pattern}'")
    return sorted(pid for (pid,) in rows)


def is_connected(server: Server, pid: int) -> bool:
    """Whether a server process lives."""
    return bool(server.execute(f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"))


def end_session(server: Server, pid: int) -> None:
    """Terminate a server process and wait for its end."""
    server.execute(f"SELECT pg_terminate_backend({pid})")
    wait_until(lambda: not is_connected(server, pid))


@contextmanager
def other_client(server: Server) -> Iterator[Any]:
    """A connection beside the pool, autocommitting."""
    conn = psycopg2.connect(make_dsn(server.conninfo()))
    conn.autocommit = True
    try:
        yield conn
    finally:
        conn.close()


def in_child(work: Callable[[], Any], fork: Callable[[], int] = os.fork) -> Any:
    """Run a function in a forked child and return what it returned (JSON); its exception fails the test."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and newer: fork beside threads
        pid = fork()
    if pid == 0:
        try:
            signal.alarm(CHILD_S)
            try:
                answer = {"result": work()}
            except BaseException as error:  # noqa: BLE001  the parent raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    assert told, "the child ended without an answer"
    answer = json.loads(told)
    assert "error" not in answer, answer["error"]
    return answer["result"]


def run_python(program: str, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a Python program given as text; it may import the project and `tests`."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextmanager
def worker(program: str, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A Python program as a process that is gone afterwards."""
    process = run_python(program, *arguments, prefix=prefix)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a program printed."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
