"""The application that every peer serves: one workload per request, and a count for each thread.

/         the workload of BENCH_WORKLOAD
/reached  one query; answers with the seconds until a connection was there
/connect  opens a connection by itself and closes it; answers with the seconds that opening took
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg2

from tools.bench.peers.pools import PEERS, Share
from tools.bench.peers.workloads import WORKLOADS, one


class _Count(threading.local):
    """Requests of one thread, in a file of its own that outlives it; one per process and thread."""

    def __init__(self) -> None:
        path = Path(os.environ["BENCH_COUNTS"], f"{os.getpid()}.{threading.get_native_id()}")
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")


_count = _Count()
_peer = PEERS[os.environ["BENCH_PEER"]](Share(**json.loads(os.environ["BENCH_SHARE"])))
_work = WORKLOADS[os.environ["BENCH_WORKLOAD"]]


def _serve() -> str:
    with _peer.lend() as ask:
        _work(ask)
    return ""


def _reached() -> str:
    began = time.perf_counter()
    with _peer.lend() as ask:
        seconds = time.perf_counter() - began
        one(ask)
    return str(seconds)


def _connect() -> str:
    began = time.perf_counter()
    conn = psycopg2.connect(os.environ["BENCH_CONNECT"])
    seconds = time.perf_counter() - began
    conn.close()
    return str(seconds)


_PATHS = {"/": _serve, "/reached": _reached, "/connect": _connect}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Serve one request; what goes wrong with the database is a 503 with its reason."""
    status = "200 OK"
    try:
        body = _PATHS[environ["PATH_INFO"]]().encode()
    except Exception as error:  # noqa: BLE001  each peer has errors of its own; the load counts them
        status, body = "503 Service Unavailable", repr(error).encode()
    _count.words[0] += 1
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
