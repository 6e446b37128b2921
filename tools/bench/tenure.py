"""`python -m tools.bench tenure`: throughput and waiting time over the tenure, when workers outnumber connections.

One crew of processes on a group of fewer permits; only the coordinator's tenure changes from turn to turn.  A process
checks out, runs one query, checks in, and so on without a pause: whoever has no connection waits for one all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shmpool import Pool
from shmpool.names import Names
from shmpool.observation import observe
from shmpool_coordinator import arbiter, tenure
from shmpool_coordinator.cli import main as coordinate
from tools.bench.peers.client import percentile
from tools.bench.rounds import Quartiles, alternate
from tools.pg_cluster import Cluster

PROCESSES, CONNECTIONS = 16, 4
FIXED_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
OWN = "its own"
LOADS = {"2 ms holds": "SELECT pg_sleep(0.002)", "one short query": "SELECT 1"}
ROUNDS, SECONDS = 3, 2.5  # of a round: each process gets its turn once or more with the longest tenure
LEAST_WAIT_S = 0.001  # whoever had a connection at hand waited for less
START_S = 30.0
CONFIG = """
name = "{name}"
[endpoints.pg1]
conninfo = "{conninfo}"
max_connections = {connections}
[groups.bench]
connections = {connections}
target = "primary"
autocommit = true
timeout = "30s"
"""


class Dial:
    """Which tenure counts, in a file that the coordinator maps; 0: its own choice, noted as a moving average."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._seconds = memoryview(mmap.mmap(file.fileno(), 16)).cast("d")

    def turn(self, seconds: float) -> None:
        """Have this tenure count from now on."""
        self._seconds[0] = seconds

    def tenure(self, cost_s: float, queue: float) -> float:
        """Stand in for the coordinator's function."""
        own = tenure.tenure(cost_s, queue)
        self._seconds[1] += (own - self._seconds[1]) / 16
        return self._seconds[0] or own

    def chosen(self) -> float:
        """Return what the coordinator's function said of late, in seconds."""
        return self._seconds[1]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a crew did under one tenure; seconds."""

    rate: float
    mean: float
    p99: float
    longest: float
    least: float  # what the least served process got, of the mean
    opens: float  # a second
    tenure: float


class Crew:
    """Processes that all want a connection, and the coordinator that they share."""

    def __init__(self, pool: str, workers: Sequence[subprocess.Popen[str]], dial: Dial) -> None:
        self._pool, self._workers, self._dial = pool, workers, dial

    def turn(self, query: str, tenure_s: float, seconds: float) -> Turn:
        """Work for some seconds under a tenure (0: the coordinator's choice)."""
        self._dial.turn(tenure_s)
        self._ask(query, seconds / 5)
        before = observe(Names.of(self._pool)).groups[0].opens
        waits = self._ask(query, seconds)
        opens = observe(Names.of(self._pool)).groups[0].opens - before
        served = [len(one) for one in waits]
        long = sorted(wait for one in waits for wait in one if wait >= LEAST_WAIT_S)
        return Turn(
            rate=sum(served) / seconds,
            mean=sum(long) / len(long),
            p99=percentile(long, 0.99),
            longest=long[-1],
            least=min(served) * len(served) / sum(served),
            opens=opens / seconds,
            tenure=tenure_s or self._dial.chosen(),
        )

    def _ask(self, query: str, seconds: float) -> list[list[float]]:
        """Have everybody work; return the time that each checkout took."""
        for worker in self._workers:
            assert worker.stdin
            print(json.dumps([query, seconds]), file=worker.stdin, flush=True)
        return [json.loads(worker.stdout.readline()) for worker in self._workers if worker.stdout]


@contextmanager
def crew(conninfo: str, processes: int = PROCESSES, connections: int = CONNECTIONS) -> Iterator[Crew]:
    """Run a coordinator and its workers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmpool-tenure-")))
        name = f"tenure-{os.getpid()}"
        dial = Dial(folder / "dial")
        config = folder / "shmpool.toml"
        config.write_text(CONFIG.format(name=name, conninfo=conninfo, connections=connections))
        stack.enter_context(_running("coordinate", str(config), str(folder / "dial")))
        deadline = time.monotonic() + START_S
        while observe(Names.of(name)).level and time.monotonic() < deadline:
            time.sleep(0.05)
        yield Crew(name, [stack.enter_context(_running("work", name)) for _ in range(processes)], dial)


@contextmanager
def _running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tools.bench.tenure", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def work(pool_name: str) -> None:
    """Work whenever a line with a query and seconds comes in; answer with the time of each checkout."""
    with Pool(pool_name) as pool:
        for line in sys.stdin:
            query, seconds = json.loads(line)
            waits = []
            end = time.monotonic() + seconds
            while (began := time.monotonic()) < end:
                with pool.connection("bench") as conn, conn.cursor() as cursor:
                    waits.append(time.monotonic() - began)
                    cursor.execute(query)
            print(json.dumps(waits), flush=True)


def rows(turns: Mapping[str, Sequence[Turn]]) -> list[tuple[str, ...]]:
    """Return a line for each tenure, medians over the rounds."""
    best = max(Quartiles.of([turn.rate for turn in of]).median for of in turns.values())
    lines: list[tuple[str, ...]] = []
    for name, of in turns.items():
        rate = Quartiles.of([turn.rate for turn in of])
        mean, p99, least, opens, chosen = (
            Quartiles.of([getattr(turn, figure) for turn in of]).median
            for figure in ("mean", "p99", "least", "opens", "tenure")
        )
        label = f"{name}: {1e3 * chosen:.0f} ms" if name == OWN else name
        longest = max(turn.longest for turn in of)
        times = (f"{1e3 * mean:.1f}", f"{1e3 * p99:.0f}", f"{1e3 * longest:.0f}")
        lines.append((label, f"{rate:.0f}", f"{rate.median / best:.2f}", *times, f"{opens:.0f}", f"{least:.2f}"))
    return lines


HEADS = ("tenure", "checkouts/s", "of the best", "mean wait", "p99", "longest", "opens/s", "least served")


def main(arguments: Sequence[str]) -> None:
    """Print a table for each load, as it stands in docs/peers.md."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench tenure", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds, at least 2 (%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one tenure in one round (%(default)s)")
    options = parser.parse_args(arguments)
    tenures = {f"{1e3 * seconds:.0f} ms": seconds for seconds in FIXED_S} | {OWN: 0.0}
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before; {options.rounds} rounds; waits in ms")
    with Cluster() as cluster, crew(cluster.primary.conninfo()) as found:
        for load, query in LOADS.items():
            measures = {
                name: (lambda query=query, seconds=seconds: found.turn(query, seconds, options.seconds))
                for name, seconds in tenures.items()
            }
            lines = rows(alternate(measures, options.rounds))
            print(f"\n**{load}, {PROCESSES} processes on {CONNECTIONS} connections**\n")
            for line in (HEADS, ["---"] * len(HEADS), *lines):
                print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1] == "work":
            work(sys.argv[2])
        else:
            arbiter.tenure = Dial(Path(sys.argv[3])).tenure  # type: ignore[attr-defined]
            sys.exit(coordinate(["run", "--config", sys.argv[2], "--log-level", "error"]))
