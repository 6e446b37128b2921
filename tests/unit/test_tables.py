"""Tables of pools that are larger than a screen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shmpool import tables
from shmpool.states import SegmentState, ServerKind, Use
from shmpool.status import Level, Report, RowState, SlotReport, WorkerReport

ROWS, PER_ROW = 200, 4
SLOT = SlotReport(0, "(g0,e0)", Use.IDLE, "read", "pg1", True, False, False, 1, 1.0, 1.0, 1)
WORKER = WorkerReport(
    0, 1, 1, ServerKind.GUNICORN, 7, 1, 1.0, RowState.HELD, PER_ROW, PER_ROW, 0, 0, 0, (SLOT,) * PER_ROW
)


def drawn(*, with_all: bool) -> str:
    """Return the tables of a pool with many workers, the last of which is dead."""
    workers = [replace(WORKER, row=row, pid=1000 + row) for row in range(ROWS)]
    workers[-1] = replace(workers[-1], state=RowState.DEAD)
    report = Report("some", Level.FINE, (), state=SegmentState.OPEN, workers=tuple(workers))
    target = tables.console()
    with target.capture() as captured:
        target.print(tables.whole(report, with_slots=True, with_all=with_all))
    return captured.get()


def test_large_pool_is_cut_and_what_is_odd_comes_first() -> None:
    """Only some workers and slots are drawn, a dead one among them, and the rest is counted."""
    text = drawn(with_all=False)
    assert "dead" in text
    assert f"... and {ROWS - tables.WORKERS_SHOWN} workers more; --all shows them" in text
    assert f"slots of row {ROWS - 1}" in text
    assert text.count("(g0,e0)") <= tables.SLOTS_SHOWN


@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_all_means_all(row: int) -> None:
    """With --all nothing is left out."""
    text = drawn(with_all=True)
    assert f"slots of row {row}," in text
    assert "more; --all" not in text
    assert text.count("(g0,e0)") == ROWS * PER_ROW


def test_long_path_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The listing names each pool whole, however long the paths of the configurations are."""
    name = "a-pool-with-a-rather-long-name"
    tables.print_pools([Report(name, Level.FINE, (), state=SegmentState.OPEN, config_file="/" + "directory/" * 20)])
    assert name in capsys.readouterr().out
