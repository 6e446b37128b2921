"""The figures of the failover benchmark, from uses that are written down here."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench.failover import figures
from tools.bench.failover.crew import Use
from tools.bench.failover.peers import sqlstate
from tools.bench.failover.runs import Run

VICTIM, OTHER = "127.0.0.2", "127.0.0.3"
FAULT = 100.0


def use(worker: int, began: float, ended: float, outcome: str = "ok", **changes: Any) -> Use:
    """Return a use; times are counted from the fault."""
    values: dict[str, Any] = {"got": FAULT + began, "host": VICTIM, "session": 7, "sqlstate": ""} | changes
    return Use(worker, FAULT + began, ended=FAULT + ended, outcome=outcome, **values)


def run(*uses: Use, **at: float) -> Run:
    """Return a run of a second of good uses before the fault, and some more."""
    steady = [use(worker, -0.5, -0.4, session=7) for worker in (0, 1)]
    return Run(
        [*steady, *uses],
        VICTIM,
        {"steady": FAULT - 1, "fault": FAULT} | {key: FAULT + value for key, value in at.items()},
    )


def test_killed_is_counted_from_the_first_error_anywhere() -> None:
    """Each worker's last failed use counts; one that met no error took no time; idle connections are told apart."""
    row = figures.killed(
        run(
            use(0, -3.0, -2.9, session=9),
            use(0, -0.01, 0.010, "OperationalError"),
            use(0, 0.03, 0.050, "OperationalError", session=9),
            use(1, 0.02, 0.03, host=OTHER),
            gone=0.02,
            start=4,
        )
    )
    assert (row.median, row.longest, row.failed) == pytest.approx((0.02, 0.04, 2))
    assert {"failed: at most 1 per connection", "1 of idle ones", "1 that began later"} <= set(row.further)


def test_killed_without_errors_has_no_times() -> None:
    """Where no use failed there is nothing to count from; how long a use took is told all the same."""
    row = figures.killed(run(use(0, 0.1, 1.1, host=OTHER), gone=0.02, start=4))
    assert (row.median, row.longest, row.failed) == (None, None, 0)
    assert row.longest_use == pytest.approx(1.0)


def test_frozen_counts_what_hangs_until_the_thaw() -> None:
    """A use that ended because the server went on has not avoided it, though it succeeded."""
    row = figures.frozen(
        run(use(0, -0.01, 1.0, "QueryTimeout"), use(1, 0.5, 8.1), thaw=8, end=10), implied_s=6.3, freed_s=1.2
    )
    assert (row.median, row.longest, row.failed) == pytest.approx((4.55, 8.1, 1))
    assert any(text.endswith("(8 s): 1") for text in row.further)


def test_promotion_counts_writes_at_the_new_primary() -> None:
    """The first good write at the promoted server counts, and each write that a standby refused."""
    row = figures.promoted(
        run(
            use(0, 1.0, 1.1, "ReadOnlySqlTransaction", sqlstate="25006"),
            use(0, 1.2, 1.3),
            use(1, 1.5, 1.6, host=OTHER),
            accepts=1,
            end=5,
        )
    )
    assert (row.median, row.failed) == pytest.approx((0.3, 1))
    assert {"writes sent to a standby: 1", "workers that never wrote again: 1"} <= set(row.further)


def test_share_is_that_of_the_sessions() -> None:
    """A server has its share back when it has most of an equal one."""
    found = run(start=4, returned=5, end=60)
    found.sessions = [(FAULT + at, here, 32 - here) for at, here in ((3, 16), (6, 12), (9, 13), (12, 16))]
    assert figures.returned(found).longest == pytest.approx(4)
    found.sessions = found.sessions[:2]
    assert figures.returned(found).longest is None


def test_sqlstate_of_a_cause() -> None:
    """A pool's own exception does not hide what the server said."""

    class DriverError(Exception):
        pgcode = "25006"

    error = RuntimeError()
    assert sqlstate(error) == ""
    error.__cause__ = DriverError()
    assert sqlstate(error) == "25006"
