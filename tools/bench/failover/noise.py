"""How late a process that waits for 5 ms goes on, all along: what the machine adds to every figure."""

from __future__ import annotations

import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TICK_S: Final = 0.005


@contextmanager
def watched() -> Iterator[list[str]]:
    """Watch during the block, in a process of its own; its finding is in the list after it."""
    found: list[str] = []
    command = [sys.executable, "-m", "tools.bench.failover.noise"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
            found.append(process.communicate()[0].strip())
        finally:
            process.kill()


def main() -> None:
    """Watch until standard input ends, then print a line."""
    late = []
    while True:
        began = time.monotonic()
        if select.select([sys.stdin], [], [], TICK_S)[0]:
            break
        late.append((time.monotonic() - began - TICK_S) * 1000)
    most = f"99th percentile {statistics.quantiles(late, n=100)[98]:.1f}, most {max(late):.0f}"
    print(f"a wait of 5 ms ended {statistics.median(late):.2f} ms late (median), {most}")


if __name__ == "__main__":
    main()
