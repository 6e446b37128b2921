"""What is left of a pool: listed, kept while somebody lives, removed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shmpool import cleanup
from shmpool.cli import main
from shmpool.names import Names
from shmpool.rows import Locks
from shmpool.states import SegmentState
from tests.support.pools import OfflinePool, offline_pool, remove_all, unique_names


@pytest.fixture
def pool() -> Iterator[OfflinePool]:
    """A pool that nobody coordinates."""
    with offline_pool() as pool:
        yield pool


@contextmanager
def other_process(pool: OfflinePool, *, coordinates: bool) -> Iterator[int]:
    """A process that holds a lock of the pool: the coordinator's, or a worker row's."""
    told, tell = os.pipe()
    hold, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(release)
            locks = Locks(pool.names)
            assert locks.try_coordinator() if coordinates else locks.try_row(1)
            os.write(tell, b"x")
            os.read(hold, 1)
        finally:
            os._exit(0)
    os.close(hold)
    os.close(tell)
    try:
        assert os.read(told, 1) == b"x"
        yield pid
    finally:
        os.close(release)
        os.close(told)
        os.waitpid(pid, 0)


def test_a_dry_run_lists_and_removes_nothing(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --yes every name is listed, and everything stays."""
    before = pool.names.leftovers()
    assert main(["cleanup", pool.names.pool]) == 0
    told = capsys.readouterr().out
    assert all(str(path) in told for path in before)
    assert "--yes" in told
    assert pool.names.leftovers() == before
    assert pool.segment.state is SegmentState.OPEN


def test_a_pool_that_nobody_uses_is_removed(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """With --yes nothing is left, and a segment that is still mapped somewhere is RETIRED."""
    assert main(["cleanup", pool.names.pool, "--yes"]) == 0
    assert pool.names.leftovers() == []
    assert pool.segment.state is SegmentState.RETIRED
    assert capsys.readouterr().out.count("removed: ") == 6
    assert main(["cleanup", pool.names.pool, "--yes"]) == 0
    assert "nothing is left" in capsys.readouterr().out


@pytest.mark.parametrize("coordinates", [True, False])
def test_nothing_is_removed_while_somebody_lives(
    pool: OfflinePool, coordinates: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A held lock, the coordinator's or a worker's, keeps everything, and the message names the pid."""
    before = pool.names.leftovers()
    with other_process(pool, coordinates=coordinates) as pid:
        for arguments in ([], ["--yes"]):
            assert main(["cleanup", pool.names.pool, *arguments]) == 1
            assert f"pid {pid}" in capsys.readouterr().err
        assert pool.names.leftovers() == before
        assert pool.segment.state is SegmentState.OPEN
    assert cleanup.look(pool.names).obstacles == ()


def test_a_worker_without_its_lock_is_seen_by_its_pid(pool: OfflinePool) -> None:
    """Where the lock file was removed, rows of processes that visibly live keep the pool."""
    told, tell = os.pipe()
    hold, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(release)
            pool.attach_worker()
            os.write(tell, b"x")
            os.read(hold, 1)
        finally:
            os._exit(0)
    os.close(hold)
    try:
        assert os.read(told, 1) == b"x"
        pool.names.lock.unlink()
        assert f"pid {pid}" in cleanup.remove(pool.names).obstacles[0]
        assert pool.names.segment.exists()
        assert not pool.names.lock.exists()
    finally:
        for fd in (release, told, tell):
            os.close(fd)
        os.waitpid(pid, 0)
    assert cleanup.remove(pool.names).obstacles == ()
    assert pool.names.leftovers() == []


def test_garbage_goes_too() -> None:
    """Files that are no segment, no lock file in use, and a dead socket are removed like any other."""
    names = unique_names()
    try:
        names.segment.write_bytes(b"garbage")
        names.lock.write_bytes(b"more of it")
        names.semaphore_path(1, "g", 0).write_bytes(b"")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(names.socket))
        assert len(cleanup.look(names).paths) == 4
        assert cleanup.remove(names) == cleanup.Remains(names, (), ())
        names.segment.symlink_to("/nowhere")
        assert cleanup.remove(names) == cleanup.Remains(names, (), ())
    finally:
        remove_all(names)


def test_all_finds_pools_without_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file, or a semaphore, alone is enough for a pool to be found."""
    uid = os.geteuid()
    first, second = unique_names(), unique_names()
    try:
        first.lock.write_bytes(b"")
        second.semaphore_path(7, "w", 3).write_bytes(b"")
        assert {first.pool, second.pool} <= set(cleanup.pools_with_remains(uid))
        monkeypatch.setattr(cleanup, "pools_with_remains", lambda _: [first.pool, second.pool])
        assert main(["cleanup", "--all", "--yes"]) == 0
        assert first.leftovers() == second.leftovers() == []
    finally:
        remove_all(first)
        remove_all(second)


def test_names_of_other_pools_are_left_alone(pool: OfflinePool) -> None:
    """A pool whose name begins alike loses nothing."""
    longer = Names.of(pool.names.pool[:20] + "-x")
    shorter = Names.of(pool.names.pool[:20])
    try:
        for names in (longer, shorter):
            names.segment.write_bytes(b"")
            names.semaphore_path(1, "g", 0).write_bytes(b"")
        cleanup.remove(shorter)
        assert shorter.leftovers() == []
        assert len(longer.leftovers()) == 2
    finally:
        remove_all(longer)
        remove_all(shorter)
