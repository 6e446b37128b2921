"""What uWSGI's hooks need of the library: work without threads, a coordinator that the server starts."""

from __future__ import annotations

import importlib

import pytest

from shmpool import attachment, background
from shmpool.attachment import MISSED_ANEW_S, is_server_starting, leave_starting_to_server
from shmpool.background import ALONE_S, ROUND_S, Rounds

STEP_S = ROUND_S / 4


class Clock:
    """A time that only tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the modules under test."""
    clock = Clock()
    monkeypatch.setattr(background, "monotonic", clock)
    monkeypatch.setattr(attachment, "monotonic", clock)
    return clock


class Work:
    """What rounds do, counted."""

    def __init__(self) -> None:
        self.looks = 0
        self.starts = 0
        self.is_coordinated = True
        self.rounds = Rounds(self.look, self.start, lambda: self.is_coordinated)

    def look(self) -> None:
        """Count it."""
        self.looks += 1

    def start(self) -> None:
        """Count it."""
        self.starts += 1

    def go_for(self, clock: Clock, seconds: float) -> None:
        """Go again and again for some time."""
        end = clock.now + seconds
        while clock.now < end:
            self.rounds.go()
            clock.now += STEP_S


def test_import_outside_uwsgi_says_what_to_do() -> None:
    """Who imports the hooks in another server's process learns where they belong."""
    with pytest.raises(ImportError, match=r"`import = shmpool\.hooks\.uwsgi` in uWSGI"):
        importlib.import_module("shmpool.hooks.uwsgi")


def test_rounds_are_limited(clock: Clock) -> None:
    """However many requests there are, idle connections are looked after ten times a second."""
    work = Work()
    work.go_for(clock, 20 * ROUND_S)
    assert 15 <= work.looks <= 20


def test_a_missing_coordinator_is_started_after_a_while(clock: Clock) -> None:
    """Whoever restarts it goes first; one that comes back in time is not doubled."""
    work = Work()
    for _ in range(3):
        work.is_coordinated = False
        work.go_for(clock, ALONE_S - ROUND_S)
        assert work.starts == 0
        work.is_coordinated = True
        work.go_for(clock, ROUND_S * 2)
    work.is_coordinated = False
    work.go_for(clock, ALONE_S + 2 * ROUND_S)
    assert work.starts > 0


def test_the_server_has_some_time_to_start_a_coordinator(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has it from the first miss on, and again when a later coordinator is missed."""
    monkeypatch.setattr(attachment, "_has_own_coordinator", False)
    assert not is_server_starting(30)
    leave_starting_to_server()
    clock.now += MISSED_ANEW_S
    for _ in range(2):
        began = clock.now
        while clock.now < began + 30:
            assert is_server_starting(30)
            clock.now += MISSED_ANEW_S / 2
        assert not is_server_starting(30)
        clock.now += MISSED_ANEW_S
