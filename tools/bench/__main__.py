"""`make bench`: what a checkout, a claim, a request, an import and an idle coordinator cost, beside their peers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.pool import close_all
from tools.bench import cold, footprint, serving, warm
from tools.bench.failover import report
from tools.bench.rounds import ROUNDS
from tools.pg_cluster import Cluster, Server

SERVERS = {"gunicorn": serving.gunicorn, "uwsgi": serving.uwsgi}
SECTIONS = ("warm", "cold", "import", "idle", *SERVERS)
FAILOVER = "failover"  # takes minutes: only where it is named
SETTLE_S = 3.0

CONFIG = """
name = "{name}"
[endpoints.pg1]
conninfo = "{primary}"
max_connections = 40
[endpoints.pg2]
conninfo = "{standby}"
max_connections = 20
[endpoints.pg3]
conninfo = "{standby}"
max_connections = 20
[groups.bench]
connections = 4
target = "primary"
[groups.read]
connections = 8
target = "replica"
endpoints = ["pg2"]
[groups.write]
connections = 8
target = "primary"
"""


@contextmanager
def _coordinator(primary: Server, standby: Server) -> Iterator[tuple[str, int]]:
    """A coordinator with three endpoints; yields the pool's name and its pid."""
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="shmpool-bench-") as folder:
        path = Path(folder, "shmpool.toml")
        path.write_text(CONFIG.format(name=name, primary=primary.conninfo(), standby=standby.conninfo()))
        process = subprocess.Popen(
            [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(path), "--log-level", "error"]
        )
        try:
            deadline = time.monotonic() + 10
            while observe(Names.of(name)).level and time.monotonic() < deadline:
                time.sleep(0.1)
            yield name, process.pid
        finally:
            close_all()  # a segment that somebody uses is left for the next coordinator
            process.terminate()
            process.wait(10)


def main() -> None:
    """Run the sections that were asked for, unpinned and pinned to one CPU where that steadies them."""
    if sys.argv[1:2] == ["peers"]:  # apart: long, and with options of its own
        from tools.bench.peers.run import main as peers

        peers(sys.argv[2:])
        return
    if sys.argv[1:2] == ["tenure"]:
        from tools.bench.tenure import main as tenure

        tenure(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    told = f"of: {', '.join(SECTIONS)} (default: all of these), {FAILOVER}; or `peers --help`, `tenure --help`"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=told)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{FAILOVER}: shorter runs")
    parser.add_argument(
        "--pools", nargs="+", choices=report.ALL, default=report.ALL, help=f"{FAILOVER}: these alone (default: all)"
    )
    options = parser.parse_args()
    unknown = set(options.sections) - {*SECTIONS, FAILOVER}
    if unknown or options.rounds < 2:
        expected = f"expected sections of {', '.join((*SECTIONS, FAILOVER))} and at least 2 rounds"
        parser.error(f"{expected}, found {' '.join(unknown)}")
    chosen = options.sections or SECTIONS
    if FAILOVER in chosen:
        report.failover(options.pools, is_quick=options.quick)
    if not {*SECTIONS} & set(chosen):
        return
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}
    print(f"python {sys.version.split()[0]}, {len(everywhere)} CPUs, {options.rounds} rounds; median (quartiles)")
    if "import" in chosen:
        print("import")
        footprint.imports(options.rounds)
    for cpus, label in ((everywhere, "unpinned"), (one, "pinned to one CPU")):
        os.sched_setaffinity(0, cpus)
        if "cold" in chosen:
            print(f"claim and release, {label}")
            cold.cold(options.rounds)
    os.sched_setaffinity(0, everywhere)
    if not {"warm", "idle", *SERVERS} & set(chosen):
        return
    with Cluster(standbys=1) as cluster, _coordinator(cluster.primary, cluster.standbys[0]) as (name, pid):
        primary, standby = cluster.primary, cluster.standbys[0]
        if "idle" in chosen:
            print("coordinator, three endpoints")
            time.sleep(SETTLE_S)
            footprint.idle_coordinator(pid)
        primary.execute(Path("examples/gunicorn/schema.sql").read_text())
        for cpus, label in ((everywhere, "unpinned"), (one, "pinned to one CPU")):
            serving.pin_everything(cpus)
            if "warm" in chosen:
                print(f"warm checkout and checkin, {label}")
                warm.warm(name, primary.conninfo(), options.rounds)
            for server in [s for s in SERVERS if s in chosen]:
                print(f"example under {server}, {serving.WORKERS} workers without threads, {label}")
                serving.serving(SERVERS[server], name, standby.conninfo(), primary.conninfo(), options.rounds)
        serving.pin_everything(everywhere)


if __name__ == "__main__":
    main()
