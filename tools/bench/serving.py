"""The example under Gunicorn or uWSGI on shmpool, beside the same application on one raw connection per worker."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gunicorn.config import KNOWN_SETTINGS

from tools.bench.load import get
from tools.bench.rounds import ROUNDS, Quartiles, alternate, noise, ratio

WORKERS = 4
REQUESTS = 1200
CLIENTS = 4
START_S = 15.0

Command = Callable[[int, str], list[str]]  # of a port and a module with an `application`


class Site:
    """A running application server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self._port = port
        self.cpu_per_request: list[float] = []

    def workers(self) -> list[int]:
        """Return the pids of the workers."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait_ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                get(self._port)
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError("the application server did not start") from None
                time.sleep(0.05)
            else:
                return

    def round(self) -> float:
        """Return requests per second of one round; note the CPU seconds of the workers per request."""
        before = sum(map(_cpu_seconds, self.workers()))
        load = [sys.executable, "-m", "tools.bench.load", str(self._port), str(REQUESTS), str(CLIENTS)]
        seconds, failed = subprocess.run(load, check=True, capture_output=True, text=True).stdout.split()
        if int(failed):
            raise RuntimeError(f"{failed} requests failed")
        self.cpu_per_request.append((sum(map(_cpu_seconds, self.workers())) - before) / REQUESTS)
        return REQUESTS / float(seconds)


def _cpu_seconds(pid: int) -> float:
    return sum(
        int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) / 1e9
        for task in os.listdir(f"/proc/{pid}/task")
    )


@contextmanager
def _site(command: Command, module: str, environment: Mapping[str, str]) -> Iterator[Site]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(command(port, module), env={**os.environ, **environment})
    site = Site(process, port)
    try:
        site.wait_ready()
        yield site
    finally:
        process.terminate()
        process.wait(START_S)


def gunicorn(port: int, module: str) -> list[str]:
    """Return the command of a Gunicorn with sync workers."""
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", str(WORKERS)]
    return [*command, "--log-level", "error", *_without_control_socket(), f"{module}:application"]


def uwsgi(port: int, module: str) -> list[str]:
    """Return the command of a uWSGI with processes without threads; ours registers as its users do."""
    command = [str(Path(sys.executable).with_name("uwsgi")), "--http-socket", f"127.0.0.1:{port}", "--master"]
    options = ["--processes", str(WORKERS), "--module", f"{module}:application", "--need-app", "--die-on-term"]
    return [*command, *options, "--import", "tools.bench.uwsgi_hooks", "--disable-logging", "--logto", os.devnull]


def _without_control_socket() -> list[str]:
    """Newer Gunicorns open a control socket in a fixed place unless told not to."""
    return ["--no-control-socket"] if any(s.name == "control_socket_disable" for s in KNOWN_SETTINGS) else []


def pin_everything(cpus: set[int]) -> None:
    """Bind this process and all it has started to some CPUs."""
    waiting, seen = [os.getpid()], set()
    while waiting:
        pid = waiting.pop()
        if pid in seen or not os.path.exists(f"/proc/{pid}/task"):
            continue
        seen.add(pid)
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it just ended
                os.sched_setaffinity(int(task), cpus)
                waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())


def serving(command: Command, pool_name: str, read: str, write: str, rounds: int = ROUNDS) -> None:
    """Print requests per second and CPU per request of both, and their ratios.

    Args:
        command: `gunicorn` or `uwsgi`.
    """
    with ExitStack() as stack:
        ours = stack.enter_context(_site(command, "examples.gunicorn.app", {"SHMPOOL_NAME": pool_name}))
        raw = stack.enter_context(_site(command, "tools.bench.raw_app", {"BENCH_READ": read, "BENCH_WRITE": write}))
        pin_everything(os.sched_getaffinity(0))
        found = alternate({"shmpool": ours.round, "raw": raw.round}, rounds)
        cpu = {"shmpool": ours.cpu_per_request[1:], "raw": raw.cpu_per_request[1:]}
    for name, values in found.items():
        print(f"  {name:40} {Quartiles.of(values):.0f} requests/s")
    for name, values in cpu.items():
        print(f"  {name + ', workers':40} {Quartiles.of([v * 1e6 for v in values]):.0f} µs of CPU per request")
    print(f"  {'ratio of requests/s':40} {ratio(found, 'shmpool', 'raw'):.3f}")
    print(f"  {'ratio of CPU per request (raw / shmpool)':40} {ratio(cpu, 'raw', 'shmpool'):.3f}")
    print(f"  {'noise of raw':40} {noise(found['raw'])}")
