"""The thread that cuts what waits for too long, on connections that are none."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from shmpool import watch as module
from shmpool.clock import monotonic
from shmpool.watch import Watch
from tests.support.waiting import wait_until
from tests.support.workers import in_child

SECONDS = 0.1


class Line:
    """Something watched."""

    def __init__(self) -> None:
        self.asked_at = float("inf")
        self.query_timeout = SECONDS
        self.is_waiting = True
        self.cut_at = float("inf")
        self.told = 0

    def ask(self) -> None:
        """Ask anew."""
        self.asked_at = monotonic()

    def cut_if_waiting(self, asked_at: float) -> bool:
        """Note when it was."""
        if self.is_waiting and asked_at == self.asked_at:
            self.cut_at = monotonic()
            return True
        return False

    def tell_cut(self) -> None:
        """Count."""
        self.told += 1


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A watch whose thread is gone afterwards."""
    watch = Watch()
    yield watch
    watch.stop()


def is_watching() -> bool:
    """Whether a watching thread runs in this process."""
    return any(thread.name == "shmpool-watch" for thread in threading.enumerate())


def test_what_waits_is_cut_in_time_and_once(watch: Watch) -> None:
    """Asked while the thread already sleeps: cut when it is due, not before, and told once."""
    lines = [Line() for _ in range(3)]
    for line in lines:
        watch.add(line)
    asked = lines[1]
    asked.ask()
    wait_until(lambda: asked.told)
    assert SECONDS <= asked.cut_at - asked.asked_at < SECONDS + 0.2
    wait_until(lambda: monotonic() > asked.cut_at + 2 * SECONDS)
    assert [line.told for line in lines] == [0, 1, 0]


def test_what_is_asked_anew_or_does_not_wait_is_left_alone(watch: Watch) -> None:
    """Short questions one after another are none that takes long; nor is one that waits for its application."""
    quick, slow = Line(), Line()
    slow.is_waiting = False
    slow.ask()
    watch.add(quick)
    watch.add(slow)
    end = monotonic() + 5 * SECONDS

    def is_over() -> bool:
        quick.ask()
        return monotonic() > end

    wait_until(is_over)
    assert (quick.told, slow.told) == (0, 0)
    slow.is_waiting = True
    wait_until(lambda: slow.told)


def test_process_that_stood_still_first_reads_what_came_meanwhile(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Woken far too late, it gives the other threads a moment, and cuts what still waits then."""
    stood_still = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: monotonic() + stood_still[0])
    monkeypatch.setattr(module, "GRACE_S", 0.4)
    answered, stuck = Line(), Line()
    for line in (answered, stuck):
        line.ask()
        watch.add(line)
    began = monotonic()
    wait_until(lambda: monotonic() > began + SECONDS / 2)
    stood_still[0] = 60.0
    wait_until(lambda: monotonic() > began + SECONDS + 0.1)
    answered.is_waiting = False
    wait_until(lambda: stuck.told)
    assert answered.told == 0


def test_thread_runs_only_while_something_is_watched(watch: Watch) -> None:
    """Forgotten or gone: the thread ends; the next one to watch has it again."""
    assert not is_watching()
    line = Line()
    line.query_timeout = 60
    watch.add(line)
    assert is_watching()
    watch.forget(line)
    wait_until(lambda: not is_watching())
    watch.add(line)
    assert is_watching()


def test_thread_that_failed_is_started_again(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in one connection's report does not leave the others unwatched for good."""
    failing, line = Line(), Line()
    monkeypatch.setattr(failing, "tell_cut", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    failing.ask()
    watch.add(failing)
    wait_until(lambda: not is_watching())
    line.ask()
    watch.add(line)
    wait_until(lambda: line.told)


def fork_without_handlers() -> int:
    """Fork as a C program does: no at-fork handler of Python runs."""
    return int(ctypes.PyDLL(None).fork())


@pytest.fixture
def shared_line() -> Iterator[Line]:
    """A line that this process watches, and that is not due for long."""
    line = Line()
    line.query_timeout = 60
    module.watch().add(line)
    yield line
    module.watch().forget(line)
    wait_until(lambda: not is_watching())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 and newer: fork beside threads
@pytest.mark.parametrize("fork", [os.fork, fork_without_handlers])
def test_child_does_not_watch_what_its_parent_does(shared_line: Line, fork: Callable[[], int]) -> None:
    """Whether at-fork handlers run or not: nothing of the parent's is watched in the child, and the parent goes on."""
    assert in_child(lambda: shared_line in module.watch()._watched, fork) is False
    shared_line.query_timeout = SECONDS
    shared_line.ask()
    module.watch().start()
    wait_until(lambda: shared_line.told)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 and newer: fork beside threads
@pytest.mark.usefixtures("shared_line")
def test_child_watches_its_own() -> None:
    """A child has a thread for what it opens itself."""

    def in_the_child() -> int:
        own = Line()
        own.ask()
        module.watch().add(own)
        wait_until(lambda: own.told)
        return own.told

    assert in_child(in_the_child) == 1
    assert is_watching()
