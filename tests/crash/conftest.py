"""The points of the crash sweep: which ones this run covers, and how many there are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date

import pytest

from tests.support.crashing import Point

SHARE = 10  # one point of so many is covered by default

_totals = {"covered": 0, "existing": 0}


def seed() -> int:
    """Return which tenth this run covers; CRASH_SEED repeats another day's."""
    return int(os.environ.get("CRASH_SEED", date.today().toordinal()))


class Sweep:
    """Chooses points and counts them."""

    def __init__(self, is_complete: bool) -> None:
        self._is_complete = is_complete

    def choose(self, points: Sequence[Point], share: int = SHARE) -> Sequence[Point]:
        """Return the points to cover: all, or one of so many, others with each seed."""
        chosen = points if self._is_complete else points[seed() % share :: share]
        _totals["covered"] += len(chosen)
        _totals["existing"] += len(points)
        return chosen


@pytest.fixture
def sweep(request: pytest.FixtureRequest) -> Sweep:
    """What this run covers."""
    return Sweep(bool(request.config.getoption("--every-point")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points were covered."""
    if _totals["existing"]:
        terminalreporter.write_line(
            f"crash points: {_totals['covered']} of {_totals['existing']} covered, "
            f"seed {seed()} (CRASH_SEED=n repeats; --every-point covers all)"
        )
