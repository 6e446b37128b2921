"""What stands in for the background thread tells a coordinator what it is to know."""

from __future__ import annotations

import itertools

import pytest

from shmpool import background
from shmpool.background import ROUND_S, Rounds


def test_each_coordinator_is_greeted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is there, and the next after one was missing."""
    times = itertools.count(step=2 * ROUND_S)
    presence = iter((False, True, True, False, False, True))
    greeted: list[int] = []
    monkeypatch.setattr(background, "monotonic", lambda: next(times))
    rounds = Rounds(lambda: None, lambda: None, lambda: next(presence), lambda: greeted.append(1))
    seen = []
    for _ in range(6):
        rounds.go()
        seen.append(len(greeted))
    assert seen == [0, 1, 1, 1, 1, 2]
