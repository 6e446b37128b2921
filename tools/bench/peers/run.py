"""`make bench-peers`: shmpool under real Gunicorn beside raw connections, other pools and PgBouncer.

Every peer serves the same application under the same Gunicorn against the same throw-away PostgreSQL, with as many
sessions there.  Peers that cannot be had here (a package of the extra `bench`, PgBouncer) are left out, and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from tools.bench.peers import pgbouncer
from tools.bench.peers.cases import CASES, Effort
from tools.bench.peers.pools import PEERS
from tools.bench.peers.report import WIDTH, Setting, show, write
from tools.bench.peers.sites import BEHIND_POOLER, prepare
from tools.bench.peers.workloads import ACCOUNTS, WORKLOADS
from tools.bench.rounds import pin
from tools.pg_cluster import Cluster, Server

STARTS, ROUNDS, SECONDS = 4, 2, 0.8
QUICK_STARTS, QUICK_ROUNDS, QUICK_SECONDS = 1, 2, 0.25
QUICK_WORKLOADS = ("one", "transaction")
SETTINGS = {"max_connections": "500"}  # every peer's sessions at once
PACKAGES = {"psycopg_pool": "psycopg_pool", "sqlalchemy": "SQLAlchemy", "pgdbpool": "pgdbpool"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="measure this one only; may be repeated")
    add("--peers", nargs="+", choices=list(PEERS), help="measure these beside shmpool (default: all that are here)")
    add("--seconds", type=float, help=f"of one round of one peer (default {SECONDS}; quick: {QUICK_SECONDS})")
    add("--starts", type=int, help=f"of everything, at least 1 (default {STARTS}; quick: {QUICK_STARTS})")
    add("--rounds", type=int, help=f"alternating, at least 2 a start (default {ROUNDS}; quick: {QUICK_ROUNDS})")
    add("--quick", action="store_true", help="see that everything works; the figures mean little")
    add("--pin", action="store_true", help="everything on one CPU, which steadies the figures")
    add("--write", type=Path, metavar="FOLDER", help="put tables and plots into FOLDER/peers.md and FOLDER/plots")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the cases that were asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    starts = options.starts or (QUICK_STARTS if options.quick else STARTS)
    if starts < 1 or rounds < 2 or seconds <= 0:
        parser.error("expected at least 1 start of at least 2 rounds of more than 0 seconds")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    missing = _missing()
    for peer, reason in missing.items():
        say(f"without {peer}: {reason}")
    wanted = {"shmpool", *(options.peers or PEERS)}
    peers = [peer for peer in PEERS if peer in wanted and peer not in missing]
    effort = Effort(seconds, starts, rounds, peers, QUICK_WORKLOADS if options.quick else list(WORKLOADS), say)
    if options.pin:
        pin(min(os.sched_getaffinity(0)))
    command = shlex.join(["python", "-m", "tools.bench", "peers", *arguments])
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with Cluster(settings=SETTINGS) as cluster:
        prepare(cluster.primary, effort.peers, ACCOUNTS)
        setting = Setting(_machine(cluster.primary, effort), command, options.pin)
        console.print(f"{setting.machine}; {setting.name}", markup=False, highlight=False)
        for name in options.case or CASES:
            outcome = CASES[name].run(cluster.primary, effort)
            show(outcome, console)
            if options.write:
                write(outcome, setting, options.write)
    say("done")


def _missing() -> dict[str, str]:
    """Return the peers that are not here, each with what to do about it."""
    install = "not installed; the extra `bench` has it"
    missing = {peer: install for peer in PACKAGES if importlib.util.find_spec(peer) is None}
    if pgbouncer.PROGRAM is None:
        missing |= dict.fromkeys(BEHIND_POOLER, "no PgBouncer on this machine (Debian, Ubuntu: apt install pgbouncer)")
    return missing


def _machine(server: Server, effort: Effort) -> str:
    ((postgres,),) = server.execute("SHOW server_version")
    told = [
        f"{os.cpu_count()} CPUs",
        f"load {os.getloadavg()[0]:.1f} before",
        f"Python {platform.python_version()}",
        f"PostgreSQL {postgres}",
        f"Gunicorn {version('gunicorn')}",
        *(f"{peer} {version(package)}" for peer, package in PACKAGES.items() if peer in effort.peers),
        pgbouncer.version() or "no PgBouncer",
        f"{effort.starts} starts, {effort.rounds} rounds of {effort.seconds:g} s in each",
    ]
    return ", ".join(told)
