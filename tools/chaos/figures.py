"""The table at the end of a run, and whether it was good."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tools.chaos.recovery import Times


@dataclass(slots=True)
class Figures:
    """What a run found."""

    title: str
    done: Counter[str] = field(default_factory=Counter)  # faults
    seen: Counter[str] = field(default_factory=Counter)  # what workers and sampler counted
    times: dict[tuple[str, str], Times] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # checkouts
    trouble: list[str] = field(default_factory=list)  # anything else that must not be

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.violations or self.unaccounted or self.failed or self.trouble)

    def show(self) -> None:
        """Print the table, and what was wrong."""
        console = Console(highlight=False, soft_wrap=True)
        table = Table("what", "count", title=self.title, title_justify="left")
        table.columns[1].justify = "right"
        for counts in (self.done, self.seen):
            for what, count in counts.items():
                table.add_row(what, f"{count:,}")
            table.add_section()
        for what, lines in self._wrong().items():
            table.add_row(what, str(len(lines)), style="" if not lines else "bold red")
        console.print(table)
        if self.times:
            times = Table("killed worker was", "permit", "count", "median", "p99", "longest")
            for (doing, permit), t in self.times.items():
                cells = (f"{seconds * 1000:.0f} ms" for seconds in (t.median, t.p99, t.longest))
                times.add_row(doing, permit, f"{t.slots:,}", *cells)
            console.print(times)
        for what, lines in self._wrong().items():
            for line in lines[:20]:
                console.print(f"{what}: {line}", markup=False)
        console.print("good" if self.is_good else "NOT good")

    def _wrong(self) -> dict[str, list[str]]:
        return {
            "violations": self.violations,
            "unaccounted at the end": self.unaccounted,
            "failed checkouts": self.failed,
            "trouble": self.trouble,
        }
