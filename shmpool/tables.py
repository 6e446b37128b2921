"""Draw a report as tables for people: the only importer of rich.  Plain text outside a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import IO, Final, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shmpool import layout
from shmpool.layout import Layout
from shmpool.settings import GIVEN
from shmpool.states import Admin, Health, SegmentState, Use, Verdict
from shmpool.status import (
    EndpointReport,
    GroupReport,
    Level,
    Report,
    RowState,
    SlotReport,
    WorkerReport,
    duration,
)

PLAIN_COLUMNS: Final = 100  # where no terminal tells its width
WORKERS_SHOWN: Final = 50  # a terminal's worth; drawing a table takes half a millisecond for each line
SLOTS_SHOWN: Final = 200

_TEXTS: Final = {"what", "configuration"}  # headings of columns that are folded where there is no room
_LEVEL_STYLES: Final = {Level.FINE: "green", Level.DEGRADED: "yellow", Level.NOT_RUNNING: "bold red"}
_HEALTH_STYLES: Final = {Health.UNKNOWN: "yellow", Health.UP: "green", Health.DOWN: "bold red"}
_USE_STYLES: Final = {Use.WAITING: "yellow", Use.ACTIVE: "green", Use.CLOSING: "magenta"}


def console(file: IO[str] | None = None) -> Console:
    """Return a console for standard output; outside a terminal it is plain and PLAIN_COLUMNS wide."""
    file = file or sys.stdout
    return Console(
        file=file, width=None if file.isatty() else PLAIN_COLUMNS, highlight=False, emoji=False, markup=False
    )


def watch(draw: Callable[[], RenderableType], interval: float) -> NoReturn:
    """Draw again every `interval` seconds until Ctrl-C; in a terminal in place, elsewhere below."""
    target = console()
    if not target.is_terminal:
        while True:
            target.print(draw())
            target.file.flush()
            time.sleep(interval)
    with Live(console=target, screen=True, auto_refresh=False) as live:
        while True:
            live.update(draw(), refresh=True)
            time.sleep(interval)


def whole(report: Report, *, with_slots: bool, with_all: bool) -> RenderableType:
    """Return the drawing of everything about one pool."""
    parts: list[RenderableType] = [_head(report)]
    if report.state is not None:
        parts += [_endpoints(report.endpoints), _groups(report.groups), _traffic(report.groups)]
        parts.append(_workers(report.workers, with_all))
        if with_slots:
            parts += _slot_tables(report, with_all)
    if report.findings:
        parts.append(_findings(report))
    return Group(*parts)


def slots(report: Report, *, with_all: bool) -> RenderableType:
    """Return the drawing of the slot tables alone, or of what keeps them from being read."""
    if report.state is None:
        return _findings(report)
    return Group(*(_slot_tables(report, with_all) or [Text("no slot is used")]))


def print_pools(reports: Iterable[Report]) -> None:
    """Print one line per pool."""
    table = _table("pools", "pool", "level", "state", ">coordinator", ">workers", "configuration")
    for report in reports:
        pid = report.coordinator.pid if report.coordinator else None
        table.add_row(
            report.name,
            Text(_word(report.level), _LEVEL_STYLES[report.level]),
            report.state.name if report.state is not None else "unreadable",
            "-" if pid is None else f"pid {pid}",
            str(sum(worker.state is RowState.HELD for worker in report.workers)),
            _configuration(report),
        )
    console().print(table)


def print_layout(shape: Layout) -> None:
    """Print where each table of a segment with these dimensions lies, and what its columns mean."""
    target = console()
    target.print(f"segment of {shape.size_bytes} bytes, format {layout.FORMAT}, layout digest {layout.DIGEST:#018x}\n")
    overview = _table(
        None,
        "table",
        ">offset",
        ">end",
        ">rows",
        ">row bytes",
        "writer",
    )
    for table in layout.TABLES:
        start, end = (at * layout.WORD_BYTES for at in shape.span(table))
        overview.add_row(
            table.name,
            str(start),
            str(end),
            str(shape.rows(table)),
            str(table.row_words * layout.WORD_BYTES),
            table.writer,
        )
    for area in range(layout.CONFIG_AREAS):
        start, end = shape.config_area(area)
        overview.add_row(f"config {area}", str(start), str(end), "1", str(end - start), "coordinator")
    target.print(overview)
    for table in layout.TABLES:
        columns = _table(f"\n{table.name}, each row", ">byte", "column", "kind", "writer", "what")
        for position, column in enumerate(table.columns):
            columns.add_row(
                str(position * layout.WORD_BYTES),
                column.name,
                column.kind,
                column.writer or table.writer,
                Text(column.doc, overflow="fold"),
            )
        target.print(columns)


def _word(value: Level | Admin | Health | Use | Verdict) -> str:
    return value.name.lower().replace("_", " ")


def _table(title: str | None, *headings: str) -> Table:
    """Return an empty table; a heading that begins with `>` is of a column of numbers, and texts give way."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(
            heading.lstrip(">"),
            justify="right" if is_number else "left",
            no_wrap=heading not in _TEXTS,
            overflow="fold" if heading in _TEXTS else "ellipsis",
        )
    return table


def _head(report: Report) -> Text:
    line = Text(f"{report.name}: ")
    line.append(_word(report.level), _LEVEL_STYLES[report.level])
    if report.state is None or report.coordinator is None or report.taken_wall is None:
        return line.append("\n")
    coordinator = report.coordinator
    if report.state is not SegmentState.OPEN:
        line.append(f"   segment {report.state.name}", "bold red")
    if coordinator.pid is None:
        line.append("   no coordinator", "bold red")
    else:
        line.append(f"   coordinator pid {coordinator.pid or 'unseen'}")
    line.append(f", heartbeat {duration(coordinator.heartbeat_age)} ago")
    line.append("   invariants ")
    if not report.is_judged:
        line.append("not judged", "yellow")
    elif report.violations:
        line.append(f"VIOLATED ({len(report.violations)})", "bold red")
    else:
        line.append("hold", "green")
    line.append(f"   {datetime.fromtimestamp(report.taken_wall):%H:%M:%S}")
    line.append(f"\nconfiguration {report.config_generation}: {_configuration(report)}\n")
    return line


def _configuration(report: Report) -> str:
    return report.config_file or (GIVEN if report.config_generation else "-")


def _cap(held: int, issued: int, target: int) -> str:
    return f"{held}/{issued}" if issued == target else f"{held}/{issued}->{target}"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _endpoints(endpoints: Sequence[EndpointReport]) -> Table:
    is_usual = all(e.verdict in (Verdict.OK, Verdict.NONE) for e in endpoints)
    headings = ["endpoint", "health", "role", "admin", *([] if is_usual else ["verdict"])]
    table = _table("endpoints", *headings, ">held/cap", ">idle", ">active", ">latency", ">lag", ">since", ">epoch")
    for e in endpoints:
        verdict = [] if is_usual else [_word(e.verdict)]
        table.add_row(
            e.name,
            Text(e.health.name, _HEALTH_STYLES[e.health]),
            e.role.name.lower(),
            Text(_word(e.admin), "" if e.admin is Admin.READY else "yellow"),
            *verdict,
            _cap(e.held, e.issued, e.target),
            str(e.idle),
            str(e.active),
            duration(e.latency),
            f"{duration(e.lag)}{'?' if e.is_lag_old and e.lag is not None else ''}",
            duration(e.since),
            str(e.epoch),
        )
    return table


def _groups(groups: Sequence[GroupReport]) -> Table:
    table = _table(
        "\ngroups",
        "group",
        "target",
        ">held/cap",
        ">idle",
        ">active",
        ">in doubt",
        ">free",
        ">waiting",
        ">oldest wait",
    )
    for g in groups:
        table.add_row(
            g.name,
            g.wants,
            _cap(g.held, g.issued, g.target),
            str(g.idle),
            str(g.active),
            str(g.unknown),
            _count(g.free),
            Text(str(g.waiting), "yellow" if g.waiting else ""),
            duration(g.oldest_wait),
        )
    return table


def _traffic(groups: Sequence[GroupReport]) -> Table:
    table = _table(
        "\ntraffic",
        "group",
        ">checkouts",
        ">waits",
        ">mean wait",
        ">longest",
        ">timeouts",
        ">refused",
        ">opens",
        ">mean open",
        ">errors",
        ">recalls",
    )
    for g in groups:
        table.add_row(
            g.name,
            str(g.checkouts),
            str(g.waits),
            duration(g.mean_wait),
            duration(g.longest_wait),
            str(g.timeouts),
            str(g.refused),
            str(g.opens),
            duration(g.mean_open),
            str(g.errors),
            str(g.recalls),
        )
    return table


def _shown(workers: Iterable[WorkerReport], with_all: bool) -> list[WorkerReport]:
    return [w for w in workers if with_all or w.state is not RowState.FREE or w.orphans]


def _workers(workers: Sequence[WorkerReport], with_all: bool) -> RenderableType:
    shown, left_out = _first(_shown(workers, with_all), with_all)
    if not shown:
        return Text("\nno worker is attached")
    table = _table(
        "\nworkers",
        ">row",
        ">pid",
        "server",
        ">generation",
        ">age",
        "lock",
        ">held",
        ">idle",
        ">active",
        ">waiting",
        ">orphans",
    )
    for w in shown:
        is_odd = w.state in (RowState.DEAD, RowState.LOST_LOCK)
        table.add_row(
            str(w.row),
            str(w.pid) if w.pid else "-",
            _server(w),
            str(w.server_generation) if w.server_generation else "-",
            duration(w.age),
            Text(w.state.value, "bold red" if is_odd else ""),
            str(w.held),
            str(w.idle),
            str(w.active),
            str(w.waiting),
            str(w.orphans),
        )
    return Group(table, _left_out(left_out, "workers")) if left_out else table


def _server(worker: WorkerReport) -> str:
    return f"{worker.server.name.lower()} {worker.server_pid}" if worker.server else "-"


def _first(workers: list[WorkerReport], with_all: bool) -> tuple[list[WorkerReport], int]:
    """Return the workers that fit into one look, those with something odd before the others; and how many do not."""
    if with_all or len(workers) <= WORKERS_SHOWN:
        return workers, 0
    odd_first = sorted(workers, key=lambda w: w.state is RowState.HELD and not w.orphans and not w.waiting)
    return odd_first[:WORKERS_SHOWN], len(workers) - WORKERS_SHOWN


def _left_out(count: int, what: str) -> Text:
    return Text(f"... and {count} {what} more; --all shows them")


def _slot_tables(report: Report, with_all: bool) -> list[RenderableType]:
    tables: list[RenderableType] = []
    shown, left_out = _first(_shown(report.workers, with_all), with_all)
    lines = 0
    for worker in shown:
        slots = [s for s in worker.slots if with_all or s.is_held or s.use is not Use.FREE]
        if lines + len(slots) > SLOTS_SHOWN and not with_all:
            left_out += 1
        elif slots:
            lines += len(slots)
            tables.append(_slots(worker, slots))
    if left_out:
        tables.append(_left_out(left_out, "workers' slots"))
    return tables


def _slots(worker: WorkerReport, slots: Iterable[SlotReport]) -> Table:
    table = _table(
        f"\nslots of row {worker.row}, pid {worker.pid or '-'}, {worker.state.value}",
        ">slot",
        "word",
        "use",
        "group",
        "endpoint",
        ">backend",
        ">since",
        ">opened",
        ">checkouts",
        "",
    )
    for s in slots:
        table.add_row(
            str(s.number),
            s.word,
            Text(s.use.name, _USE_STYLES.get(s.use, "")),
            s.group or "-",
            s.endpoint or "-",
            str(s.backend_pid) if s.backend_pid else "-",
            duration(s.since),
            duration(s.opened),
            str(s.checkouts),
            "recalled" if s.is_recalled else "",
        )
    return table


def _findings(report: Report) -> Text:
    text = Text("\n")
    for finding in report.findings:
        label = "note" if finding.level is Level.FINE else _word(finding.level)
        text.append(label, _LEVEL_STYLES[finding.level]).append(f": {finding}\n")
    text.rstrip()
    return text
