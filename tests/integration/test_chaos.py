"""A short chaos run: the tool works, and what it finds is nothing."""

from __future__ import annotations

from tests.support.postgres import require_postgres
from tools.chaos.run import Chaos
from tools.chaos.schedule import SCENARIOS, digest, faults
from tools.stage import Signals


def test_killed_and_interrupted_workers_leave_an_exact_count() -> None:
    """Some hundred workers killed within seconds: no violation, nothing unaccounted for, no failed checkout."""
    require_postgres()
    with Chaos(SCENARIOS["a"], seed=20, seconds=4.0, workers=4, signals=Signals()) as chaos:
        chaos.torment()
        chaos.finish()
    figures = chaos.figures
    assert figures.violations == []
    assert figures.unaccounted == []
    assert figures.failed == []
    assert figures.trouble == []
    assert figures.done["workers killed"] > 50
    assert figures.seen["checkouts"] > 100
    assert figures.seen["clean"] > 50
    assert figures.seen["samples"] > 50


def test_schedule_is_the_seeds() -> None:
    """Equal seeds give equal schedules, others do not."""
    one, same, other = (digest(faults(SCENARIOS["b"], seed, 10.0, 8)) for seed in (1, 1, 2))
    assert one == same != other
