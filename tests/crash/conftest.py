"""The points of the crash sweep: which ones this run covers, and how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import date

import pytest

from tests.support.crashing import Point

SHARE = 10  # one point of so many is covered by default

COVERED = "crash points covered, and existing"


def seed() -> int:
    """Return which tenth this run covers; CRASH_SEED repeats another day's."""
    return int(os.environ.get("CRASH_SEED", date.today().toordinal()))


class Sweep:
    """Chooses points and counts them."""

    def __init__(self, is_complete: bool, note: Callable[[tuple[str, object]], None]) -> None:
        self._is_complete = is_complete
        self._note = note

    def choose(self, points: Sequence[Point], share: int = SHARE) -> Sequence[Point]:
        """Return the points to cover: all, or one of so many, others with each seed."""
        chosen = points if self._is_complete else points[seed() % share :: share]
        self._note((COVERED, (len(chosen), len(points))))
        return chosen


@pytest.fixture
def sweep(request: pytest.FixtureRequest) -> Sweep:
    """What this run covers."""
    return Sweep(bool(request.config.getoption("--every-point")), request.node.user_properties.append)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points were covered, by whatever process of the run."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    counts = [value for r in reports if r.when == "call" for name, value in r.user_properties if name == COVERED]
    if counts:
        covered, existing = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(
            f"crash points: {covered} of {existing} covered, "
            f"seed {seed()} (CRASH_SEED=n repeats; --every-point covers all)"
        )
