"""The queue of a group's waiting threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import cast
from unittest.mock import Mock

import pytest

from shmpool import waiting
from shmpool.lease import Lease
from shmpool.local_group import LocalGroup
from shmpool.router import Attempt
from shmpool.slots import SlotTable
from shmpool.waiting import Presence, Queue, Waiter

HERE = Presence()


class Busy(deque[Waiter]):
    """A queue that another thread joins just when somebody begins to look at it."""

    def __iter__(self) -> Iterator[Waiter]:
        entries = super().__iter__()
        self.append(Waiter(HERE))
        return entries


def test_head_of_the_queue_is_found_while_others_join() -> None:
    """Whether a thread is served next can be told at any moment, also of an empty queue."""
    first, second = Waiter(HERE), Waiter(HERE)
    queue = Queue(deque())
    queue.waiters = Busy([first, second])
    assert queue.is_first(first)
    assert not queue.is_first(second)
    queue.waiters.clear()
    assert queue.is_first(second)


def test_scout_is_served_in_its_turn_where_it_can_be_woken() -> None:
    """Resting on its lock it comes first; one that sleeps on the bell lets the next one go, and stays at the head."""
    idle: deque[Lease] = deque()
    queue, bell = Queue(idle), Mock(value=0)
    scout, other, presence = Waiter(HERE), Waiter(HERE), Mock()
    for waiter in (scout, other):
        queue.enter(waiter)
    assert queue.take_scouting(scout)
    scout.is_on_bell = True
    idle.append(presence)
    queue.serve(bell)
    assert (list(other.handed), list(queue.waiters)) == ([presence], [scout])
    assert bell.mock_calls == []
    scout.is_on_bell = False
    queue.enter(late := Waiter(HERE))
    idle.append(presence)
    queue.serve(bell)
    assert (list(scout.handed), list(queue.waiters)) == ([presence], [late])


def test_looks_are_rare_while_checkins_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scout looks for permits at once, the next after a while, and each where nobody is served."""
    now = [100.0]
    monkeypatch.setattr(waiting, "monotonic", lambda: now[0])
    idle: deque[Lease] = deque()
    queue = Queue(idle)
    assert queue.is_look_due()
    assert queue.is_look_due()
    queue.enter(Waiter(HERE))
    idle.append(Mock())
    queue.serve(Mock(value=0))
    assert not queue.is_look_due()
    now[0] += 2 * waiting.LIVELY_S
    assert queue.is_look_due()


def test_length_of_the_queue_is_never_negative() -> None:
    """A scout that is just out of the queue, to be served, tells the slot table that nobody waits behind it."""
    told = []

    class Table:
        def wait(self, *_: object, queued: Callable[[], int], **__: object) -> bool:
            told.append(queued())
            return False

    group = LocalGroup.__new__(LocalGroup)
    group.idle = deque()
    group.queue = Queue(group.idle)
    group.attachment = Mock(users=())
    group.permits = Mock()
    group.table = cast(SlotTable, Table())
    assert not group._wait_for_permits(Mock(), Attempt(), 0.0, Waiter(HERE))
    assert told == [0]
