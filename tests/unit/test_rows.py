"""Worker rows and the record locks that say who owns them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shmpool.errors import SegmentMismatchError, SegmentRetiredError, TableFullError
from shmpool.layout import SLOT_WORDS, WORKERS, Layout
from shmpool.names import Names
from shmpool.rows import Locks, Process, Row, Server, create_lock_file, leave_row, owner_of, start_time, take_row
from shmpool.segment import Segment, create
from shmpool.states import SegmentState, ServerKind
from shmpool.words import MAYBE, ORPHAN, SEQ_ONE, YES, endpoint_part, group_part
from shmpool_coordinator.reaper import Reaper
from tests.support.pools import remove_all, unique_names

HELD = group_part(0, YES) | endpoint_part(0, YES) | 5 * SEQ_ONE
RACERS = 64


@contextmanager
def table_of(workers: int) -> Iterator[tuple[Segment, Locks]]:
    """A segment with some worker rows of three slots each, and its lock file."""
    names = unique_names()
    segment = create(names, Layout(workers, 3, 1, 1))
    try:
        segment.set_header("lock_inode", create_lock_file(names))
        segment.set_header("state", SegmentState.OPEN)
        yield segment, Locks(names, segment.header("lock_inode"))
    finally:
        segment.release()
        remove_all(names)


@pytest.fixture
def pool() -> Iterator[tuple[Segment, Locks]]:
    """Three rows."""
    with table_of(3) as made:
        yield made


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked child; return its exit code: 0 if nothing was raised."""
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            work()
            failed = 0
        finally:
            os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def own_locks(segment: Segment) -> Locks:
    """Return the locks as another process opens them."""
    return Locks(segment.names, segment.header("lock_inode"))


def store(segment: Segment, slot: int, word: int) -> None:
    """Write a slot word."""
    segment.words[segment.layout.at(SLOT_WORDS, slot)] = word


def slot_words(segment: Segment) -> list[int]:
    """Return every slot word."""
    start, end = segment.layout.span(SLOT_WORDS)
    return list(segment.words[start:end])


def name_owner(segment: Segment, row: int, owner: Process) -> None:
    """Write an owner into a row."""
    for column, value in owner._asdict().items():
        name = {"namespace": "pid_namespace"}.get(column, column)
        segment.words[segment.layout.at(WORKERS, row, name)] = value


def test_row_names_its_owner_and_slots_stay_untouched(pool: tuple[Segment, Locks]) -> None:
    """Taking a row writes who owns it, counts a generation, and changes no slot word."""
    segment, locks = pool
    for slot in range(9):
        store(segment, slot, (slot + 1) * SEQ_ONE)
    before = slot_words(segment)
    row = take_row(segment, locks, server=Server(ServerKind.GUNICORN, 70, 7))
    assert row == Row(0, 1, (0, 1, 2), ())
    assert owner_of(segment, 0) == Process.current()
    told = [segment.words[segment.layout.at(WORKERS, 0, c)] for c in ("server", "server_pid", "server_generation")]
    assert told == [ServerKind.GUNICORN, 70, 7]
    assert slot_words(segment) == before


def test_own_row_is_never_taken_twice(pool: tuple[Segment, Locks]) -> None:
    """A process that takes again gets other rows, though its record lock does not exclude itself."""
    segment, locks = pool
    assert [take_row(segment, locks).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TableFullError):
        take_row(segment, locks)


def test_left_row_is_free_and_keeps_counting(pool: tuple[Segment, Locks]) -> None:
    """A row that was given back can be taken again, by its next generation."""
    segment, locks = pool
    row = take_row(segment, locks)
    assert leave_row(segment, locks, row)
    assert take_row(segment, locks) == row._replace(generation=2)


def test_row_that_holds_something_is_not_left(pool: tuple[Segment, Locks]) -> None:
    """A row with a slot that is neither FREE nor an orphan stays its process's."""
    segment, locks = pool
    row = take_row(segment, locks)
    store(segment, 1, HELD)
    assert not leave_row(segment, locks, row)
    store(segment, 1, HELD | ORPHAN)
    assert leave_row(segment, locks, row)


def test_living_owner_keeps_its_row(pool: tuple[Segment, Locks]) -> None:
    """Another process finds a held row held, tells the holder's pid, and takes the next one."""
    segment, locks = pool
    take_row(segment, locks)
    parent = os.getpid()

    def look() -> None:
        mine = own_locks(segment)
        assert mine.holder(0) == parent
        assert mine.any_row_held(3)
        assert take_row(segment, mine).number == 1

    assert in_child(look) == 0
    assert locks.holder(1) is None


def test_child_does_not_own_its_parents_row(pool: tuple[Segment, Locks]) -> None:
    """A row's lock is not inherited: it ends with the parent, whatever the child does."""
    segment, locks = pool
    pid = os.fork()
    if pid == 0:
        take_row(segment, own_locks(segment))
        if os.fork() == 0:
            signal.pause()
        os._exit(0)
    children = f"/proc/{pid}/task/{pid}/children"
    grandchildren: list[int] = []
    while start_time(pid) is not None:
        with open(children) as file:
            grandchildren = [int(word) for word in file.read().split()] or grandchildren
    os.waitpid(pid, 0)
    try:
        assert locks.holder(0) is None
        assert take_row(segment, locks).number == 0
    finally:
        for grandchild in grandchildren:
            os.kill(grandchild, signal.SIGKILL)


def test_take_over_reads_orphans_as_away(pool: tuple[Segment, Locks]) -> None:
    """An orphan's slot is away until it is FREE; rows with most FREE slots are taken first."""
    segment, locks = pool
    store(segment, 1, HELD | ORPHAN)
    for slot in (3, 4, 5):
        store(segment, slot, HELD | ORPHAN)
    assert take_row(segment, locks).number == 2
    assert take_row(segment, locks) == Row(0, 1, (0, 2), (1,))
    with pytest.raises(TableFullError):
        take_row(segment, locks)


@pytest.mark.parametrize("word", [HELD, group_part(0, MAYBE), group_part(0, YES)])
def test_dirty_rows_are_not_taken(pool: tuple[Segment, Locks], word: int) -> None:
    """A table full of dead rows that nobody has reaped yet is full."""
    segment, locks = pool
    for slot in (0, 3, 6):
        store(segment, slot, word)
    with pytest.raises(TableFullError, match="all 3 worker rows"):
        take_row(segment, locks)
    store(segment, 3, word | ORPHAN)
    assert take_row(segment, locks) == Row(1, 1, (4, 5), (3,))


def test_pid_of_another_process_is_not_mine(pool: tuple[Segment, Locks]) -> None:
    """A row that names this pid with another start time belonged to a dead process: it is free, and it is reaped."""
    segment, locks = pool
    me = Process.current()
    name_owner(segment, 0, me._replace(start=me.start - 1))
    store(segment, 0, HELD)
    assert not owner_of(segment, 0).visibly_lives()
    reaper = Reaper(segment, locks)
    assert reaper.tick() == [0]
    assert slot_words(segment)[0] == HELD | ORPHAN
    reaper.close()
    rows_taken = {take_row(segment, locks).number for _ in range(3)}
    assert rows_taken == {0, 1, 2}


def test_other_pid_namespace_is_not_seen_alive(pool: tuple[Segment, Locks]) -> None:
    """A pid counts only within its own namespace."""
    me = Process.current()
    assert me.visibly_lives()
    assert not me._replace(namespace=me.namespace + 1).visibly_lives()
    assert start_time(2**22 + 1) is None


def test_row_of_the_same_pid_in_another_namespace_is_not_mine(pool: tuple[Segment, Locks]) -> None:
    """The first processes of two containers that started together: both are pid 1, and one takes the dead one's row."""
    segment, locks = pool
    me = Process.current()
    name_owner(segment, 0, me._replace(namespace=me.namespace + 1))
    assert {take_row(segment, locks).number for _ in range(3)} == {0, 1, 2}


def test_closed_descriptor_loses_the_lock_but_not_the_row(pool: tuple[Segment, Locks]) -> None:
    """A process that closes any descriptor of the lock file loses its lock; seen alive, it is not reaped."""
    segment, locks = pool
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        row = take_row(segment, own_locks(segment))
        store(segment, row.number * 3, HELD)
        os.close(os.open(segment.names.lock, os.O_RDWR))
        os.write(write_fd, b"x")
        signal.pause()
        os._exit(1)
    os.read(read_fd, 1)
    os.close(read_fd)
    os.close(write_fd)
    reaper = Reaper(segment, locks)
    try:
        assert locks.holder(0) is None
        assert reaper.tick() == []
        assert slot_words(segment)[0] == HELD
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert reaper.tick() == [0]
    reaper.close()


def test_guard_excludes_this_process_too(pool: tuple[Segment, Locks]) -> None:
    """While a row is being taken, neither another process nor a thread or handler of this one may take it."""
    segment, locks = pool

    def cannot() -> None:
        with own_locks(segment).guard(0) as taken:
            assert not taken

    with locks.guard(0) as taken:
        assert taken
        with own_locks(segment).guard(0) as again:
            assert not again
        assert in_child(cannot) == 0
        assert take_row(segment, locks).number == 1
    assert take_row(segment, locks).number == 0


def test_one_coordinator(pool: tuple[Segment, Locks]) -> None:
    """Neither this process nor another becomes coordinator while one is."""
    segment, locks = pool
    parent = os.getpid()

    def look() -> None:
        mine = own_locks(segment)
        assert not mine.try_coordinator()
        assert mine.coordinator_pid() == parent

    assert locks.try_coordinator()
    assert not own_locks(segment).try_coordinator()
    assert in_child(look) == 0
    locks.release_coordinator()
    assert locks.try_coordinator()
    locks.release_coordinator()


def test_retired_segment_takes_nobody_in(pool: tuple[Segment, Locks]) -> None:
    """A retired segment refuses newcomers and keeps no row for them."""
    segment, locks = pool
    segment.set_header("state", SegmentState.RETIRED)
    with pytest.raises(SegmentRetiredError):
        take_row(segment, locks)
    segment.set_header("state", SegmentState.OPEN)
    assert take_row(segment, locks).number == 0


def test_race_for_rows() -> None:
    """Of 64 processes that want 64 rows at once, each gets exactly one, and no two the same."""
    with table_of(RACERS) as (segment, _):
        start_read, start_write = os.pipe()
        result_read, result_write = os.pipe()
        pids = []
        for _ in range(RACERS):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(start_write)
                    os.read(start_read, 1)  # end of file is the signal
                    os.write(result_write, bytes([take_row(segment, own_locks(segment)).number]))
                    signal.pause()
                finally:
                    os._exit(1)
            pids.append(pid)
        os.close(start_write)
        try:
            taken = [os.read(result_read, 1)[0] for _ in range(RACERS)]
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for fd in (start_read, result_read, result_write):
                os.close(fd)
        assert sorted(taken) == list(range(RACERS))
        owners = {owner_of(segment, row).pid for row in range(RACERS)}
        assert owners == set(pids)


def test_names_of_another_lock_file_are_refused(pool: tuple[Segment, Locks]) -> None:
    """A lock file that was replaced is not the segment's."""
    segment, _ = pool
    other = Names.of(f"{segment.names.pool}x")
    inode = create_lock_file(other)
    try:
        with pytest.raises(SegmentMismatchError, match="expected inode"):
            Locks(other, inode + 1)
    finally:
        remove_all(other)
