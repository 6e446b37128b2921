"""A parent that says that a process of its ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from shmpool.layout import WORKERS
from shmpool.rows import Locks, take_row
from shmpool_coordinator.control import RequestError
from shmpool_coordinator.daemon import Daemon
from tests.support.desk import config_of


@pytest.fixture
def daemon(pool_name: str) -> Iterator[Daemon]:
    """A coordinator in this process, whose loop does not run."""
    made = Daemon(config_of(pool_name))
    yield made
    made._end()


def test_rows_of_that_process_are_looked_at_now(daemon: Daemon) -> None:
    """Exactly the rows that name the pid are hinted, and the next tick is due at once."""
    row = take_row(daemon.segment, Locks(daemon.names, daemon.registry.locks.inode))
    daemon.tick()
    assert daemon._next_tick > 0
    for foreign in (0, 1, -1, 2**70):
        assert daemon.requests.serve(Mock(), {"type": "look", "pid": foreign}) is None
    assert not daemon._ended_rows
    assert daemon.requests.serve(Mock(), {"type": "look", "pid": os.getpid()}) is None
    assert daemon._ended_rows == {row.number}
    assert daemon._next_tick == 0
    with pytest.raises(RequestError, match="pid is 'x', expected a whole number"):
        daemon.requests.serve(Mock(), {"type": "look", "pid": "x"})
    daemon.segment.words[daemon.segment.layout.at(WORKERS, row.number, "pid")] = 0
    daemon.registry.locks.unlock_row(row.number)
