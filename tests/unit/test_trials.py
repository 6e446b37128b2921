"""How often one process tries an endpoint that is DOWN."""

from __future__ import annotations

import pytest

from shmpool import trials
from shmpool.trials import Trials


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the trials; no jitter."""
    clock = Clock()
    monkeypatch.setattr(trials, "monotonic", clock)
    monkeypatch.setattr(trials, "chance", lambda: 0.0)
    return clock


def test_tries_come_later_and_later(clock: Clock) -> None:
    """In t seconds an endpoint is tried 4 + t / 5 times at most, the first time at once."""
    mine, began, count = Trials(), clock.now, 0
    for _ in range(6000):
        if mine.begin(1, epoch=7):
            count += 1
            mine.failed(1, OSError("no way"))
            assert count <= 4 + (clock.now - began) / 5
        clock.now += 0.01
    assert count > 12, "it is not given up"


def test_one_try_at_a_time(clock: Clock) -> None:
    """While a try is under way there is no other one, unless its thread was lost; endpoints do not count together."""
    mine = Trials()
    assert mine.begin(1, epoch=7)
    clock.now += 1
    assert not mine.begin(1, epoch=7)
    assert mine.begin(2, epoch=7)
    clock.now += 5
    assert mine.begin(1, epoch=7)


def test_success_and_another_outage_begin_anew(clock: Clock) -> None:
    """After a success, and in another epoch of the endpoint, the next try comes at once, and nothing old is told."""
    mine = Trials()
    for _ in range(5):
        clock.now += 10
        assert mine.begin(1, epoch=7)
        mine.failed(1, OSError("no\n  way"))
    clock.now += 1.5
    assert mine.told(1, epoch=7) == "tried 1.5 s ago: no way"
    assert not mine.is_due(1, epoch=7)
    assert mine.is_due(1, epoch=8)
    assert mine.told(1, epoch=8) == ""
    mine.succeeded(1)
    assert mine.is_due(1, epoch=7)
    assert mine.told(1, epoch=7) == ""
