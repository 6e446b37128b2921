"""Forks in the middle of a bracket, and in between: the child of a worker changes nothing."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
from collections.abc import Callable, Iterator

import pytest

from shmpool import attachment, semaphores, slots
from shmpool.attachment import Attachment, join
from shmpool.errors import DisownedError, TableFullError
from shmpool.slots import SlotTable
from tests.crash import scenarios
from tests.crash.conftest import Sweep
from tests.crash.scenarios import Operation, Scenario
from tests.support.crashing import CountingClock, Host, host, points_of, run_until


@pytest.fixture
def pool(pool_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A pool whose waits take no time and run the same bytecodes each time."""
    monkeypatch.setattr(slots, "monotonic", CountingClock())
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    with host(pool_name) as made:
        yield made
        for joined in attachment.attached():
            if joined.names == made.registry.names:
                assert joined.leave()
                joined.segment.release()


def seen_through(pool: Host, joined: Attachment) -> Host:
    """Return the pool as an attachment's frames see it: its semaphores are closed in a child."""
    other = copy.copy(pool)
    other.groups = {name: permits for name, (_, permits) in joined.groups.items()}
    other.endpoints = {e.name: joined.endpoints[e.index] for e in joined.settings.endpoints}
    return other


class Fork:
    """A fork whose child goes on where it was made; the parent waits for its end."""

    def __init__(self, pool: Host, fork: Callable[[], int] = os.fork) -> None:
        self._pool = pool
        self._fork = fork
        self.is_child = False
        self.is_done = False

    def __call__(self) -> None:
        read_fd, write_fd = os.pipe()
        pid = self._fork()
        if pid == 0:
            self.is_child = True
            os.read(read_fd, 1)
            return
        before = self._pool.shared()
        os.write(write_fd, b"x")
        _, status = os.waitpid(pid, 0)
        os.close(read_fd)
        os.close(write_fd)
        assert status == 0, os.waitstatus_to_exitcode(status)
        assert self._pool.shared() == before
        self.is_done = True


def go_on(fork: Fork, operation: Operation, table: SlotTable, event: int) -> None:
    """Run an operation that forks at an event; the child runs the copied frame, tidies, drops everything and ends."""
    try:
        with contextlib.suppress(DisownedError, TableFullError):  # a parent with all tokens at home has left the pool
            run_until(operation, event, fork)
    except BaseException:
        if not fork.is_child:
            raise
    if fork.is_child:
        with contextlib.suppress(BaseException):
            table.tidy()
        del operation
        gc.collect()
        os._exit(0)


FORKED = (
    scenarios.claim_granted,
    scenarios.claim_second_endpoint,
    scenarios.claim_endpoints_busy,
    scenarios.claim_failing,
    scenarios.release,
    scenarios.give_up,
    scenarios.abandon,
    scenarios.tidy,
    scenarios.come_back,
)


@pytest.mark.parametrize("scenario", FORKED, ids=lambda scenario: scenario.__name__)
def test_fork_anywhere(pool: Host, sweep: Sweep, scenario: Scenario) -> None:
    """A child that was forked inside a bracket runs the copied frame and changes no word and no semaphore."""
    joined = join(pool.registry.names)
    points = points_of(scenario(seen_through(pool, joined), joined.table))
    pool.settle(joined.table)
    for point in sweep.choose(points):
        joined = join(pool.registry.names)
        pool.begin_anew(joined.table)
        fork = Fork(pool)
        operation = scenario(seen_through(pool, joined), joined.table)
        go_on(fork, operation, joined.table, point.event)
        del operation
        pool.settle(*[one.table for one in attachment.attached() if one is joined])


def test_fork_without_handlers(pool: Host) -> None:
    """Where no at-fork handler runs, the wiped page keeps a child from every store, post and acquire."""
    table = pool.add_worker()
    held, partial, free = pool.hold(table, "read"), pool.hold_group(table, "read"), table.take(pool.groups["read"])
    dropped = pool.hold(table, "read")
    fork = Fork(pool, ctypes.PyDLL(None).fork)
    del dropped
    fork()
    if fork.is_child:
        failed = 1
        try:
            for attempt in (
                lambda: table.claim(free, pool.groups["read"], pool.route()),
                lambda: table.claim_once(free, pool.groups["read"], pool.route()),
                lambda: table.wait(free, pool.groups["read"], pool.route, deadline=float("inf")),
                lambda: table.claim_endpoint(partial, pool.route()),
                lambda: table.give_up(partial),
                lambda: table.release(held),
            ):
                with pytest.raises(DisownedError):
                    attempt()
            table.abandon(held)
            table.tidy_away()
            assert table.tidy() == []
            gc.collect()
            failed = 0
        finally:
            os._exit(failed)
    assert fork.is_done
    table.release(held)
    table.give_up(partial)
    for token in (partial, free):
        table.put_back(token)
    pool.settle(table)


def test_child_does_not_own_the_row(pool: Host) -> None:
    """A forked child may claim through a row of its own only, and its parent's row stays the parent's."""
    joined = join(pool.registry.names)
    token = joined.take_token(joined.groups["read"][1])
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            again = join(pool.registry.names)
            assert again is not joined
            assert again.table.rows[0].number != joined.table.rows[0].number
            assert again.locks.holder(joined.table.rows[0].number) == parent
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(pid, 0)[1] == 0
    joined.table.put_back(token)
    del token
    pool.settle(joined.table)
