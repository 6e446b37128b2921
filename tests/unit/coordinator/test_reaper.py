"""Dead workers' rows."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

from shmpool.layout import WORKERS
from shmpool.rows import Locks, Process, take_row
from shmpool.segment import private_page
from shmpool.slots import SlotTable
from shmpool.words import ORPHAN
from shmpool_coordinator.reaper import Reaper
from tests.support.desk import Desk, config_of, desk
from tests.support.waiting import wait_until


@pytest.fixture
def pool(pool_name: str) -> Iterator[Desk]:
    """A pool with a live worker row of this process."""
    with desk(config_of(pool_name)) as made:
        yield made


def worker(pool: Desk) -> tuple[int, int]:
    """Fork a worker that takes a row and claims a permit pair; return its pid and row."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            segment = pool.registry.segment
            row = take_row(segment, Locks(pool.registry.names, pool.registry.locks.inode))
            table = SlotTable(segment, private_page())
            table.add_row(row)
            token = table.take(pool.groups[0])
            table.claim(token, pool.groups[0], list(pool.endpoints.values()))
            os.write(write_fd, bytes([row.number]))
            signal.pause()
        finally:
            os._exit(1)
    os.close(write_fd)
    row_number = os.read(read_fd, 1)[0]
    os.close(read_fd)
    return pid, row_number


def test_killed_worker_is_reaped_and_its_permits_come_back(pool: Desk) -> None:
    """A killed worker's slots become orphans, its generation grows, and every permit is usable again."""
    registry = pool.registry
    reaper = Reaper(registry.segment, registry.locks)
    pid, row = worker(pool)
    try:
        assert reaper.tick() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    generation = registry.segment.words[registry.segment.layout.at(WORKERS, row, "generation")]
    assert reaper.tick() == [row]
    assert registry.segment.header("reaped_rows") == 1
    assert registry.segment.words[registry.segment.layout.at(WORKERS, row, "generation")] == generation + 1
    assert sum(word & ORPHAN for word in pool.slot_words()) == 1
    registry.permits.tick(lambda slot, word: True)
    assert (registry.permits.value(0), registry.permits.value(3)) == (2, 3)
    assert pool.violations() == []
    assert reaper.tick() == []
    reaper.close()


def test_zombie_is_dead(pool: Desk) -> None:
    """A killed worker that its parent has not waited for is reaped all the same."""
    reaper = Reaper(pool.registry.segment, pool.registry.locks)
    pid, row = worker(pool)
    os.kill(pid, signal.SIGKILL)
    try:
        wait_until(lambda: row in reaper.tick())
    finally:
        os.waitpid(pid, 0)
        reaper.close()


def test_own_and_visibly_living_rows_are_reported_and_left_alone(
    pool: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose lock stays free while its process lives is reported once and not touched."""
    reaper = Reaper(pool.registry.segment, pool.registry.locks)
    pool.claim()
    before = pool.slot_words()
    with caplog.at_level(logging.ERROR):
        assert reaper.tick() == []
        assert not caplog.records  # a process that ends loses its locks a moment before it is gone
        monkeypatch.setattr("shmpool_coordinator.reaper.LOCKLESS_S", 0.0)
        assert reaper.tick() == []
        assert reaper.tick() == []
    assert pool.slot_words() == before
    assert len([r for r in caplog.records if "lost the row's lock" in r.message]) == 1
    reaper.close()


def test_clean_row_of_a_dead_worker_is_not_locked(pool: Desk) -> None:
    """Rows that hold nothing are not even looked at."""
    reaper = Reaper(pool.registry.segment, pool.registry.locks)
    assert list(reaper.dirty_rows()) == []
    reaper.close()


def test_process_that_is_just_ending_is_looked_at_again_until_it_is_gone(
    pool: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose lock is gone before the process is reaped as soon as it is dead, not at some later tick."""
    registry = pool.registry
    reaper = Reaper(registry.segment, registry.locks)
    pool.claim()  # through a row of this process, whose own lock it does not see
    assert reaper.tick() == []
    assert reaper.awaits_an_end
    monkeypatch.setattr(Process, "visibly_lives", lambda process: False)
    assert reaper.tick() == [pool.table.rows[0].number]
    assert not reaper.awaits_an_end
    reaper.close()
