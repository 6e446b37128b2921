"""Tables for the terminal and for the documentation, and plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tools.bench.peers.cases import Comparison, Finding, Outcome, Series, describe, p50, p99, rate
from tools.bench.rounds import Quartiles

PARTS = ("server", "workers", "between")
HEADS = (*("peer", "req/s", "quartiles", "x raw", "x PgB.", "p50", "p99", "longest", "sess.", "CPU", *PARTS, "errors"),)
LEGEND = (
    "x raw, x PgB.: requests/s beside raw connections and PgBouncer (TCP), medians of the rounds' ratios. p50, p99, "
    "longest: ms. sess.: most sessions seen at the server. CPU: ms per request, the server's, the workers' and what is "
    "between (coordinator, PgBouncer)"
)
MARKED = "<!-- figures: {name} -->\n{body}<!-- end of figures -->\n"
WIDTH = 124
COLOURS = {
    "raw": "#777777",
    "raw-unbounded": "#bbbbbb",
    "shmpool": "#1b7837",
    "pgbouncer": "#2166ac",
    "pgbouncer-unix": "#67a9cf",
    "psycopg_pool": "#b35806",
    "sqlalchemy": "#f1a340",
    "pgdbpool": "#998ec3",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how the figures were taken."""

    machine: str
    command: str
    is_pinned: bool

    @property
    def name(self) -> str:
        """Tell the two ways to run apart."""
        return "pinned" if self.is_pinned else "unpinned"


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [_row(comparison, peer, series) for peer, series in comparison.series.items()]


def _row(comparison: Comparison, peer: str, series: Series) -> tuple[str, ...]:
    def beside(other: str) -> str:
        ratio = comparison.ratio(rate, other, peer)
        return "" if ratio is None or peer == other else f"{ratio.median:.2f}"

    requests = Quartiles.of(series.of(rate))
    return (
        peer,
        f"{requests.median:.0f}",
        f"{requests.low:.0f}..{requests.high:.0f}",
        beside("raw"),
        beside("pgbouncer"),
        f"{1e3 * Quartiles.of(series.of(p50)).median:.1f}",
        f"{1e3 * Quartiles.of(series.of(p99)).median:.1f}",
        f"{1e3 * series.longest:.0f}",
        str(series.sessions),
        f"{series.cpu().median:.2f}",
        *(f"{series.cpu(part).median:.2f}" for part in PARTS),
        str(series.errors),
    )


def _notes(comparison: Comparison) -> list[str]:
    """Say what belongs beside the table."""
    shape, series = comparison.shape, comparison.series
    busiest = max(one.client_load() for one in series.values())
    notes = [
        f"{shape.clients} clients, closed loop; load generator: at most {busiest:.2f} of a core; noise of "
        f"{comparison.noise()}"
    ]
    if shape.is_threaded:
        served = (f"{peer} {s.least_thread(shape):.2f} ({s.least_worker(shape):.2f})" for peer, s in series.items())
        notes.append("least-served thread (worker), of the mean: " + ", ".join(served))
    group = series["shmpool"].group if "shmpool" in series else None
    if group is not None and group.waits:
        notes.append(
            f"shmpool in its last start: {group.opens} opens of {1e3 * (group.mean_open or 0):.1f} ms and "
            f"{group.recalls} recalls for {group.checkouts} checkouts; {group.waits} waits of "
            f"{1e3 * (group.mean_wait or 0):.1f} ms, longest {1e3 * (group.longest_wait or 0):.0f} ms; "
            f"{group.timeouts} timeouts, {group.errors} failed opens"
        )
    refused = [f"{peer} {one.refusals}" for peer, one in series.items() if one.refusals]
    if refused:
        notes.append("sessions beyond the cap that the server refused: " + ", ".join(refused))
    return notes


def _verdict(finding: Finding) -> str:
    return {True: "met", False: "MISSED", None: ""}[finding.is_met]


def show(outcome: Outcome, console: Console) -> None:
    """Print what a case found."""
    console.rule(f"[bold]{outcome.case.title}", align="left")
    for comparison in outcome.comparisons:
        table = Table(title=describe(comparison.shape), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in HEADS:
            table.add_column(head, justify="left" if head == "peer" else "right", no_wrap=True)
        for row in _rows(comparison):
            table.add_row(*row)
        console.print(table)
        for note in _notes(comparison):
            console.print(f"  {note}", markup=False, highlight=False)
    if outcome.comparisons:
        console.print(f"  {LEGEND}", markup=False, highlight=False)
    judged = Table(title="asked and found", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("", "asked", "found", ""):
        judged.add_column(head)
    for finding in outcome.findings:
        judged.add_row(finding.what, finding.asked, finding.found, _verdict(finding))
    console.print(judged)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _section(outcome: Outcome, setting: Setting, plot: str | None) -> str:
    text = "\n### Pinned to one CPU\n" if setting.is_pinned else ""
    text += f"\n`{setting.command}`, {setting.name}; {setting.machine}.\n"
    if plot is not None:
        text += f"\n![{outcome.case.title}]({plot})\n"
    for comparison in outcome.comparisons:
        title = describe(comparison.shape)
        text += f"\n**{title[0].upper()}{title[1:]}**\n\n{_markdown(HEADS, _rows(comparison))}\n"
        text += "".join(f"- {note}\n" for note in _notes(comparison))
    if outcome.comparisons:
        text += f"\n{LEGEND}.\n"
    rows = [(f.what, f.asked, f.found, _verdict(f)) for f in outcome.findings]
    return f"{text}\n{_markdown(('', 'asked', 'found', ''), rows)}\n"


def write(outcome: Outcome, setting: Setting, folder: Path) -> None:
    """Put a case's tables into `folder`/peers.md, in the place of the earlier ones, and its plot beside."""
    name = f"{outcome.case.name} {setting.name}"
    plot = None
    if outcome.comparisons:
        plot = f"plots/peers-{outcome.case.name}-{setting.name}.svg"
        (folder / plot).parent.mkdir(parents=True, exist_ok=True)
        draw(outcome.comparisons, folder / plot)
    page = folder / "peers.md"
    text = page.read_text() if page.exists() else "# shmpool beside its peers\n"
    page.write_text(replace_marked(text, name, _section(outcome, setting, plot)))


def replace_marked(text: str, name: str, body: str) -> str:
    """Return a text with the body of one marked place replaced; where there is none yet, at the end."""
    marked = MARKED.format(name=name, body=body)
    before, after = MARKED.format(name=name, body="\0").split("\0")
    pattern = re.compile(re.escape(before) + ".*?" + re.escape(after), re.DOTALL)
    if not pattern.search(text):
        return f"{text}\n### {name}\n\n{marked}"
    return pattern.sub(lambda _: marked, text)


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw requests/s and p99 of every comparison of a case: medians with quartiles."""
    import matplotlib  # here: only who writes needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    figures: tuple[tuple[str, Callable[[Series], Sequence[float]]], ...] = (
        ("requests/s", lambda series: series.of(rate)),
        ("p99, ms", lambda series: [1e3 * value for value in series.of(p99)]),
    )
    style = {"svg.hashsalt": "shmpool", "svg.fonttype": "none", "font.size": 7, "font.family": "DejaVu Sans"}
    with pyplot.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        size = (1.9 * len(comparisons), 3.6)
        picture, axes = pyplot.subplots(2, len(comparisons), figsize=size, squeeze=False, layout="constrained")
        for column, comparison in enumerate(comparisons):
            for line, (label, values) in enumerate(figures):
                one = axes[line][column]
                for place, (peer, series) in enumerate(comparison.series.items()):
                    found = Quartiles.of(values(series))
                    spread = [[found.median - found.low], [found.high - found.median]]
                    one.bar(place, found.median, color=COLOURS[peer], yerr=spread, error_kw={"lw": 0.8}, label=peer)
                one.set_xticks([])
                if column == 0:
                    one.set_ylabel(label)
            axes[0][column].set_title(describe(comparison.shape).replace(", ", "\n").replace(" on", "\non"), fontsize=7)
        picture.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
        picture.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(picture)
    # As drawn, lines end in blanks.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
