"""Run every fault on every pool and print one table."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from tools.bench.failover import figures, noise, runs
from tools.bench.failover.figures import Row
from tools.bench.failover.peers import PEERS, QUERY_TIMEOUT_S, SETTINGS, missing

# The defaults of [probe]: a probe begins within INTER_S of the fault, FALL of them fail FAST_S apart.
INTER_S, FAST_S, PROBE_TIMEOUT_S, FALL, JITTER = 2.0, 0.5, 1.0, 3, 1.1
REFUSED_S: Final = JITTER * (INTER_S + (FALL - 1) * FAST_S)
SILENT_S: Final = REFUSED_S + FALL * PROBE_TIMEOUT_S
SPARE_S: Final = 0.2
WIDTH: Final = 132

TITLES: Final = (
    "replica killed: a worker's last failed use, after the first error anywhere",
    "replica killed at rest: known as DOWN; then each worker uses all its connections at once",
    "replica frozen: a worker's last use of it ended, after the fault",
    "primary killed, standby promoted: a worker's first write, after the standby accepted writes",
    f"killed replica started again: {figures.FAIR:.0%} of an equal share of the sessions, after its return",
)


def failover(names: Sequence[str], *, is_quick: bool) -> None:
    """Print how the pools stand what happens to their servers."""
    lengths = runs.QUICK if is_quick else runs.FULL
    console = Console(width=WIDTH, highlight=False)
    for name in names:
        if absent := missing(name):
            console.print(f"{name}: left out, {' and '.join(absent)} not installed (make bench-failover does)")
    present = [name for name in names if not missing(name)]
    if not present:
        return
    began = time.monotonic()
    rows: dict[str, list[Row]] = {}
    quiet: list[str] = []
    rates: dict[int, float] = {}
    with noise.watched() as lateness:
        for name in present:
            rows[name] = _measure(name, lengths, quiet, rates, console)
    _print_settings(console, list(rows))
    console.print(_table(rows))
    if rates:
        counts = ", ".join(f"{rate:.2f} with {workers}" for workers, rate in rates.items())
        console.print(f"shmpool's statements that probe a replica, a second, by attached workers: {counts}")
    console.print(f"noise: {lateness[0]}; {os.cpu_count()} CPUs")
    console.print(f"one use before the fault, median and 99th percentile: {'; '.join(quiet)}")
    console.print(f"took {time.monotonic() - began:.0f} s")


def _measure(
    name: str, lengths: runs.Lengths, quiet: list[str], rates: dict[int, float], console: Console
) -> list[Row]:
    """Put one pool through everything."""
    is_ours = name == "shmpool"
    with runs.servers() as cluster:
        _tell(console, name, "a replica is killed, and returns")
        run = runs.killed_and_returned(name, cluster, lengths)
        killed, back = figures.killed(run), figures.returned(run)
        middle, late = figures.before(run)
        quiet.append(f"{name} {middle * 1000:.1f}, {late * 1000:.1f} ms")
        _tell(console, name, "a replica is killed at rest")
        at_rest = figures.at_rest(runs.killed_at_rest(name, cluster, lengths), REFUSED_S)
        _tell(console, name, "a replica freezes")
        bounds = (SILENT_S, QUERY_TIMEOUT_S + SPARE_S) if is_ours else (None, None)
        frozen = figures.frozen(runs.frozen(name, cluster, lengths), *bounds)
        if is_ours:
            _tell(console, name, "probes are counted")
            rates |= runs.probes(cluster, lengths)
    _tell(console, name, "a standby is promoted")
    return [killed, at_rest, frozen, figures.promoted(runs.promoted(name, lengths)), back]


def _tell(console: Console, name: str, what: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {name}: {what} ...")


def _print_settings(console: Console, names: Sequence[str]) -> None:
    console.print(
        f"{runs.WORKERS} workers of 4 connections: one thread uses one every 7 ms, another three every second"
    )
    for name in names:
        console.print(f"  {name}: {SETTINGS[name]}", markup=False)


def _table(rows: dict[str, list[Row]]) -> Table:
    table = Table(width=WIDTH, show_lines=False)
    table.add_column("fault / pool", no_wrap=True)
    for heading in ("median ms", "longest ms", "failed uses", "longest use ms"):
        table.add_column(heading, justify="right")
    table.add_column("further", ratio=1)
    for number, title in enumerate(TITLES):
        head, _, rest = title.partition(": ")
        table.add_row(f"[bold]{head}[/]", "", "", "", "", f"[dim]{rest}[/]")
        for name, found in rows.items():
            row = found[number]
            figures_of_it = (_ms(row.median), _ms(row.longest), str(row.failed), _ms(row.longest_use))
            table.add_row(f"  {name}", *figures_of_it, "; ".join(row.further))
        table.add_section()
    return table


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


ALL: Final = tuple(PEERS)
