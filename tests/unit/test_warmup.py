"""When a worker opens connections ahead of need."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shmpool import warmup
from shmpool.router import Attempt
from shmpool.warmup import PACE_S, PAUSE_MAX_S, START_S, WarmUp


class Group:
    """A group of a worker that keeps two connections; `outcomes` is what its tries come to."""

    def __init__(self, *outcomes: object) -> None:
        self.settings = SimpleNamespace(per_worker_min=2, name="read")
        self.pool = SimpleNamespace(name="web")
        self.is_retired = False
        self.permits = None
        self.held = 0
        self.outcomes = list(outcomes)
        self.idle: list[object] = []
        self.table = SimpleNamespace(out=lambda permits: self.held)
        self.attachment = SimpleNamespace(
            may_open_ahead=lambda: True, segment=None, settings=SimpleNamespace(stale_after=5.0)
        )

    def try_open(self, attempt: Attempt, deadline: float, *, may_wait: bool) -> object:
        """Open, fail, or raise; never wait, and leave alone what is DOWN."""
        assert attempt.has_tried
        assert not may_wait
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def put_idle(self, lease: object) -> None:
        """Let it rest."""
        self.held += 1
        self.idle.append(lease)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host where nobody else opens or waits, without chance, at a time of the test's own."""
    at = SimpleNamespace(now=100.0, last_open=0.0, heartbeat_age=0.0)
    monkeypatch.setattr(warmup, "monotonic", lambda: at.now)
    monkeypatch.setattr(warmup, "chance", lambda: 0.5)
    monkeypatch.setattr(warmup, "heartbeat_age", lambda segment: at.heartbeat_age)
    monkeypatch.setattr(warmup, "_last_open", lambda group: at.last_open)
    monkeypatch.setattr(warmup, "_is_waited_for", lambda group: False)
    return at


def looks(clock: Any, group: Any, warm: WarmUp, count: int) -> list[float]:
    """Look as often, each time when it is due, and return the pauses."""
    pauses = []
    for _ in range(count):
        pauses.append(warm.look(group))
        clock.now += pauses[-1]
    return pauses


def test_one_at_a_time_until_there_are_enough(clock: Any) -> None:
    """The first is opened a while after the group came to be, the next a pause later, and no more than are kept."""
    group, warm = Group("a", "b", "c"), WarmUp()
    assert looks(clock, group, warm, 4) == [1.5 * START_S, PACE_S, PACE_S, PAUSE_MAX_S]
    assert group.idle == ["a", "b"]


def test_pauses_grow_while_nothing_comes_of_it(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, or without a permit, a worker tries later and later, says why once, and is quick again after success."""
    group, warm = Group(OSError("refused"), None, OSError("refused"), *[None] * 5, "a"), WarmUp()
    pauses = looks(clock, group, warm, 11)[1:]
    assert pauses[:5] == [2 * PACE_S, 4 * PACE_S, 8 * PACE_S, 16 * PACE_S, 32 * PACE_S]
    assert pauses[5:8] == [PAUSE_MAX_S] * 3
    assert pauses[8] == PACE_S
    assert caplog.text.count("refused") == 1


def test_turn_is_another_worker_s(clock: Any) -> None:
    """Nobody opens ahead of need within the pace of any other open on the host; the pauses do not grow."""
    group: Any = Group("a")
    warm = WarmUp()
    looks(clock, group, warm, 1)
    clock.last_open = clock.now
    assert warm.look(group) == PACE_S
    assert group.idle == []
    clock.now += PACE_S
    warm.look(group)
    assert group.idle == ["a"]


def test_nothing_without_a_coordinator(clock: Any) -> None:
    """While nobody looks after the endpoints, nothing is opened that nobody asked for."""
    group: Any = Group("a")
    warm = WarmUp()
    clock.heartbeat_age = 6.0
    looks(clock, group, warm, 3)
    assert group.idle == []


def test_process_that_keeps_nothing_opens_nothing(clock: Any) -> None:
    """A master, and a group that was replaced, open nothing."""
    group: Any = Group("a")
    warm = WarmUp()
    clock.now += 10
    group.attachment.may_open_ahead = lambda: False
    assert looks(clock, group, warm, 1) == [PAUSE_MAX_S]
    group.attachment.may_open_ahead = lambda: True
    group.is_retired = True
    assert looks(clock, group, warm, 1) == [PAUSE_MAX_S]
    assert group.idle == []
