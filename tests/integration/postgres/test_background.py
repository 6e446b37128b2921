"""The background thread comes back, whatever kept it away."""

from __future__ import annotations

import os
from typing import Any

import pytest

from shmpool import Pool
from shmpool.attachment import Attachment
from tests.support.coordinator import CoordinatorProcess, watched_by
from tests.support.waiting import wait_until


class RaisedByHandlerError(BaseException):
    """What an application's signal handler raises."""


def background_of(pool: Pool) -> Any:
    """Return the background thread of the pool's attachment."""
    assert pool._state is not None
    return pool._state.attachment._background


def raise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next start of a background thread end by a signal handler's exception."""
    start = Attachment.start_background

    def interrupted(attachment: Attachment) -> None:
        monkeypatch.setattr(Attachment, "start_background", start)
        raise RaisedByHandlerError

    monkeypatch.setattr(Attachment, "start_background", interrupted)


def test_handler_that_raises_while_joining_leaves_a_pool_that_joins_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception before the background thread runs: the next checkout starts it, and the pool is known to forks."""
    raise_once(monkeypatch)
    with pytest.raises(RaisedByHandlerError):
        pool.checkout("auto")
    with pool.connection("auto"):
        assert background_of(pool) is not None
        assert pool._state is not None
        assert pool in pool._state.attachment.users


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 and newer: fork beside threads
def test_handler_that_raises_around_a_fork_is_made_good_by_the_next_checkout(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A background thread that a fork stopped and an exception kept away runs again after a slow checkout."""
    with pool.connection("auto"):
        raise_once(monkeypatch)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        assert background_of(pool) is None
        with pool.connection("auto"):
            assert background_of(pool) is not None


def test_coordinator_watches_the_process_as_long_as_it_is_connected(pool: Pool, shared: CoordinatorProcess) -> None:
    """The end of the process is seen even if something else keeps its connection open; nothing is kept for ever."""
    with pool.connection("auto"):
        wait_until(lambda: watched_by(shared.pid) == [os.getpid()], within=10)
    pool.close()
    wait_until(lambda: watched_by(shared.pid) == [])
