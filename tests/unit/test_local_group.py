"""The queue of a group's waiting threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import cast
from unittest.mock import Mock

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
    assert not group._wait_on_bell(Mock(), Attempt(), 0.0, Waiter(HERE))
    assert told == [0]
