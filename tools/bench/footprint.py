"""What shmpool adds to a worker that has psycopg2 anyway, and what an idle coordinator takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tools.bench.rounds import ROUNDS, Quartiles

IDLE_S = 20.0

_IMPORT = """
import resource, time
import psycopg2, psycopg2.extensions
def kib():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * 4
before, began = kib(), time.perf_counter()
{statement}
print((time.perf_counter() - began) * 1e3, (kib() - before) / 1024)
"""


def _import_cost(statement: str) -> tuple[float, float]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as installed
    out = subprocess.run(
        [sys.executable, "-c", _IMPORT.format(statement=statement)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    milliseconds, mebibytes = map(float, out.split())
    return milliseconds, mebibytes


def imports(rounds: int = ROUNDS) -> None:
    """Print time and memory that importing the pool adds to a process that has imported psycopg2."""
    statement = "import shmpool; shmpool.Pool('bench')"
    _import_cost(statement)  # compiles the modules
    costs = [_import_cost(statement) for _ in range(rounds)]
    print(f"  import shmpool and make a Pool           {Quartiles.of([ms for ms, _ in costs]):.1f} ms")
    print(f"  resident memory                          {Quartiles.of([mb for _, mb in costs]):.2f} MB")


def idle_coordinator(pid: int, seconds: float = IDLE_S) -> None:
    """Print CPU and memory of a coordinator that has nothing to do but its probes."""
    tick = os.sysconf("SC_CLK_TCK")

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / tick

    before, began = cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    share = (cpu_seconds() - before) / (time.monotonic() - began)
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    print(f"  coordinator, idle for {seconds:.0f} s               {share:.2%} of a core, {resident:.1f} MB resident")
