"""A connection with the permits it was opened with, as it rests and as it ends.

Guarantees: a lease whose slot is this process's own is closed and released, or abandoned to the coordinator; one that
is not is forgotten, and its socket is touched only in the process that opened it.
Threads.  A lease has one user at a time; who has taken it out of a deque, or out of a handle, is that one.
If the process dies here.  The slot says what was held (slots.py): closed or not, the coordinator settles it.
If a signal handler raises here.  The lease is dropped, and thereby given back by whoever looks next (`tidy`).
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from psycopg2.extensions import cursor

from shmpool import slots
from shmpool.clock import monotonic
from shmpool.connection import CLOSE_BOUND_S, Connection, Recipe, close_connection
from shmpool.layout import RECALL_WORDS
from shmpool.slots import Token
from shmpool.states import Health, Use
from shmpool.words import Status

if TYPE_CHECKING:
    from shmpool.local_group import LocalGroup
    from shmpool.pool import Pool
    from shmpool.waiting import Waiter

BYPASS_S: Final = 0.5  # a connection used within this window is handed out without a look at its socket
DOWN_CLOSE_BOUND_S: Final = 0.02  # at an endpoint that is DOWN, and hardly answers: others wait to be closed as well


class Lease(Token):
    """A token with its connection: what the idle deques hold, and what a handle stands for.

    Words, page and row are those of the attachment that the connection was claimed through.
    """

    __slots__ = (
        "active_use",
        "checkouts",
        "checkouts_at",
        "connection",
        "expires",
        "group",
        "idle",
        "idle_use",
        "marks",
        "page",
        "pool",
        "recipe",
        "since",
        "since_at",
        "slept",
        "status",
        "status_at",
        "table",
        "times",
        "waiters",
        "words",
    )

    active_use: int
    idle_use: int
    checkouts: int
    checkouts_at: int
    connection: Connection
    marks: list[weakref.ref[cursor] | None]  # the connection's
    expires: float
    group: LocalGroup
    idle: deque[Lease]
    page: memoryview  # the one word of the private page that stands for this row
    pool: Pool
    recipe: Recipe
    since: float  # last checkout, CLOCK_MONOTONIC
    since_at: int
    slept: float  # clock.slept() at the last look
    status: int  # the endpoint's status word when it was last judged
    status_at: int
    table: slots.SlotTable
    times: memoryview[float]
    waiters: deque[Waiter]
    words: memoryview

    @property
    def is_reserved(self) -> bool:
        """Whether its permit may be of the group's reserve; whoever gives it back finds out."""
        return self.recall_at == self.use_at

    def reserve(self) -> None:
        """Have a checkin look closer, as if recalled; a real recall is not seen until `unreserve`."""
        self.recall_at = self.use_at

    def unreserve(self) -> None:
        """Be like any other."""
        self.recall_at = self.table.segment.layout.at(RECALL_WORDS, self.number)


def give_back(lease: Lease) -> None:
    """Close a connection and give its permits back; leave them to the coordinator if the server lingers."""
    table = lease.table
    if not table.owns(lease):
        disown(lease)
        return
    if lease.connection.closed or lease.connection.is_cut:
        _lost(lease)
    lease.words[lease.use_at] = int(Use.CLOSING) | lease.group.permits.index << 8
    lease.times[lease.since_at] = monotonic()
    is_down = Status.of(lease.words[lease.status_at]).health is Health.DOWN
    if close_connection(lease.connection, within=DOWN_CLOSE_BOUND_S if is_down else CLOSE_BOUND_S):
        table.release(lease)
    else:
        table.abandon(lease)
    if lease.group.is_retired or lease.group.attachment.keeps_nothing:
        lease.group.attachment.leave_when_due()


def _lost(lease: Lease) -> None:
    """Tell the coordinator that a connection broke, and let those that rest beside it be looked at before use."""
    endpoint = lease.tether.endpoint
    if endpoint is None:
        return
    for other in tuple(lease.idle):
        if other.tether.endpoint is endpoint:
            other.since -= BYPASS_S
    lease.group.attachment.say_evidence(endpoint.index, "connection lost")


def disown(lease: Lease) -> None:
    """Forget a connection whose slot is not this process's any more.

    After a fork it is the parent's, and its socket must not be touched; else it is closed.
    """
    lease.tether.resource = None
    if lease.group.attachment.pid == os.getpid():
        close_connection(lease.connection)


def tidy(table: slots.SlotTable) -> None:
    """Close connections that were dropped without checkin, and give their permits back."""
    for token in table.tidy():
        resource = token.tether.resource
        if isinstance(resource, Connection) and close_connection(resource):
            table.release(token)
        else:
            table.abandon(token)
