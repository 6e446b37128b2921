"""What is stopped in a worker's pool: each scenario prepares a pool and returns the operation to stop.

All of them run over groups read (4) and write (1), endpoints pg1 and pg2 (two permits each), and stand-in connections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from psycopg2 import OperationalError

from shmpool import Pool, PoolTimeout, TooManyWaiting
from shmpool.clock import monotonic
from shmpool.handle import Handle
from shmpool.layout import ENDPOINTS, HEADER, SLOTS
from shmpool.lease import BYPASS_S, Lease
from shmpool.waiting import Presence, Waiter
from shmpool.words import Status
from tests.support.crashing import Host
from tests.support.stand_in import Server, StandIn

Operation = Callable[[], object]


class Scene(NamedTuple):
    """A pool of this process, the coordinator's parts beside it, and the server."""

    host: Host
    pool: Pool
    server: Server

    def rest(self, count: int = 1) -> list[Lease]:
        """Let so many connections of the group rest, and return what they rest in."""
        handles = [self.pool.checkout("read") for _ in range(count)]
        leases = [lease_of(handle) for handle in handles]
        for handle in handles:
            self.pool.checkin(handle)
        return leases


Scenario = Callable[[Scene], Operation]


def lease_of(handle: Handle) -> Lease:
    """Return what a handle stands for."""
    assert handle._lease is not None
    return handle._lease


def session_of(handle: Handle) -> StandIn:
    """Return the stand-in behind a handle."""
    session = lease_of(handle).connection
    assert isinstance(session, StandIn)
    return session


def round_trip(scene: Scene) -> Operation:
    """Check out and in."""
    return lambda: scene.pool.checkin(scene.pool.checkout("read"))


def join_and_open(scene: Scene) -> Operation:
    """Use the pool for the first time: join, claim, open."""
    return round_trip(scene)


def open_another(scene: Scene) -> Operation:
    """Claim and open beside connections in use."""
    held = [scene.pool.checkout("read")]

    def operation() -> None:
        held.append(scene.pool.checkout("read"))

    return operation


def warm(scene: Scene) -> Operation:
    """Take a connection that rests, and give it back."""
    scene.rest()
    return round_trip(scene)


def rested_long(scene: Scene) -> Operation:
    """Look at the socket of a connection before it is lent."""
    for lease in scene.rest():
        lease.since -= 2 * BYPASS_S
    return round_trip(scene)


def died_at_rest(scene: Scene) -> Operation:
    """Find that the server hung up, and take the other connection that rests."""
    for lease in scene.rest(2):
        lease.since -= 2 * BYPASS_S
    assert isinstance(lease.connection, StandIn)
    lease.connection.hang_up()
    del lease
    return round_trip(scene)


def epoch_changed(scene: Scene) -> Operation:
    """Give back a connection to an endpoint that is another one now, and open anew."""
    scene.rest()
    for index in range(len(scene.host.endpoints)):
        at = scene.host.segment.layout.at(ENDPOINTS, index, "status")
        status = Status.of(scene.host.segment.words[at])
        scene.host.segment.words[at] = status._replace(epoch=(status.epoch + 1) % 1024).word()
    return round_trip(scene)


def refused_once(scene: Scene) -> Operation:
    """Be refused by one endpoint, and be served by the other."""
    scene.pool.checkin(scene.pool.checkout("write"))
    scene.pool.rest()
    scene.server.failures = [OperationalError("Connection refused")]
    return round_trip(scene)


def secrets_replaced(scene: Scene) -> Operation:
    """Be refused for a password that was just replaced, and be served with the one that is read then."""
    scene.pool.checkin(scene.pool.checkout("write"))
    scene.pool.rest()
    scene.server.failures = [OperationalError("FATAL:  password authentication failed")]
    return round_trip(scene)


def cut_off_once(scene: Scene) -> Operation:
    """Lose an attempt to connect of which nobody knows how far it came, and be served by the other endpoint."""
    scene.pool.checkin(scene.pool.checkout("write"))
    scene.pool.rest()
    scene.server.failures = [OperationalError("timeout expired")]
    return round_trip(scene)


def on_connect_fails(scene: Scene) -> Operation:
    """Close a connection that the application could not prepare."""
    scene.pool.checkin(scene.pool.checkout("write"))
    scene.pool.rest()

    def refuse(conn: object) -> None:
        raise ValueError(conn)

    local = scene.pool._joined().groups["read"]
    local.recipes = {index: recipe._replace(on_connect=refuse) for index, recipe in local.recipes.items()}
    good = {index: recipe._replace(on_connect=None) for index, recipe in local.recipes.items()}

    def operation() -> None:
        try:
            with contextlib.suppress(ValueError):
                scene.pool.checkout("read")
        finally:
            local.recipes = good

    return operation


def wait_in_vain(scene: Scene) -> Operation:
    """Queue, scout on the bell, and time out."""
    held = scene.pool.checkout("write")

    def operation() -> None:
        with contextlib.suppress(PoolTimeout):
            scene.pool.checkout("write", 0.01)
        assert held

    return operation


def give_back_to_the_queue(scene: Scene) -> Operation:
    """Hand a connection over to a thread that waits; that one leaves with it."""
    handle = scene.pool.checkout("read")
    local = lease_of(handle).group
    presence = Presence()
    waiter = Waiter(presence)
    local.queue.waiters.append(waiter)

    def operation() -> None:
        try:
            scene.pool.checkin(handle)
        finally:
            local._leave_queue(waiter)
            assert presence

    return operation


def with_reserve(scene: Scene, operation: Operation, reserve: int = 1) -> Operation:
    """Return an operation that runs while the group reserves permits; afterwards it reserves none."""
    local = scene.pool._joined().groups["read"]
    plain = local.settings
    local.settings = plain._replace(reserve=reserve)

    def beside_a_reserve() -> None:
        try:
            operation()
        finally:
            local.settings = plain

    return beside_a_reserve


def take_from_the_reserve(scene: Scene) -> Operation:
    """Check out with high priority what normal work may not have, and give its permits back at checkin."""
    held = [scene.pool.checkout("read") for _ in range(3)]

    def operation() -> None:
        scene.pool.checkin(scene.pool.checkout("read", 0, "high"))
        assert held

    return with_reserve(scene, operation)


def rest_beside_the_reserve(scene: Scene) -> Operation:
    """Let a connection of high priority rest, as the reserve is whole without it."""
    return with_reserve(scene, lambda: scene.pool.checkin(scene.pool.checkout("read", 0, "high")))


def leave_to_the_reserve(scene: Scene) -> Operation:
    """Wait beside a free permit that is reserved, and time out."""
    held = [scene.pool.checkout("read") for _ in range(3)]

    def operation() -> None:
        with contextlib.suppress(PoolTimeout):
            scene.pool.checkout("read", 0.01)
        assert held

    return with_reserve(scene, operation)


def wait_first(scene: Scene) -> Operation:
    """Queue before a normal thread, in vain."""
    held = scene.pool.checkout("write")
    local = lease_of(held).group
    presence = Presence()
    waiter = Waiter(presence)
    local.queue.enter(waiter)

    def operation() -> None:
        try:
            with contextlib.suppress(PoolTimeout):
                scene.pool.checkout("write", 0.01, "high")
        finally:
            local._leave_queue(waiter)
            assert held
            assert presence

    return operation


def give_back_to_high_priority(scene: Scene) -> Operation:
    """Hand a connection of the reserve over to the one of two waiting threads that goes first."""
    held = [scene.pool.checkout("read") for _ in range(4)]
    local = lease_of(held[0]).group
    lease_of(held[0]).reserve()
    presence = Presence()
    waiters = [Waiter(presence), Waiter(presence, is_high=True)]
    for waiter in waiters:
        local.queue.enter(waiter)

    def operation() -> None:
        try:
            scene.pool.checkin(held[0])
        finally:
            for waiter in waiters:
                local._leave_queue(waiter)
            assert presence

    return with_reserve(scene, operation)


def too_many_wait(scene: Scene) -> Operation:
    """Be refused, as enough threads wait already."""
    held = scene.pool.checkout("write")
    local = lease_of(held).group
    plain = local.settings
    local.settings = plain._replace(max_waiting=1)
    presence = Presence()
    waiter = Waiter(presence)
    local.queue.enter(waiter)

    def operation() -> None:
        try:
            with contextlib.suppress(TooManyWaiting):
                scene.pool.checkout("write", 0.01)
        finally:
            local.settings = plain
            local._leave_queue(waiter)
            assert held
            assert presence

    return operation


def open_ahead(scene: Scene) -> Operation:
    """Open a connection ahead of need, and let it rest."""
    scene.rest()
    local = scene.pool._joined().groups["read"]
    plain = local.settings
    local.settings = plain._replace(per_worker_min=2)
    local.warmup._due = 0.0
    segment = scene.host.segment
    segment.times[segment.layout.at(HEADER, 0, "heartbeat")] = monotonic()
    start, end = segment.layout.span(SLOTS)
    for at in range(start + SLOTS.column("opened_at"), end, SLOTS.row_words):
        segment.times[at] = 0.0  # earlier scenes had clocks of their own

    def operation() -> None:
        try:
            local.warmup.look(local)
            assert len(local.idle) == 2
        finally:
            local.settings = plain

    return operation


def in_a_transaction(scene: Scene) -> Operation:
    """Roll back what the holder left open."""
    handle = scene.pool.checkout("read")
    session_of(handle).begin()
    return lambda: scene.pool.checkin(handle)


def session_changed(scene: Scene) -> Operation:
    """Restore what the holder changed."""
    handle = scene.pool.checkout("read")
    session_of(handle).marks.append(None)
    return lambda: scene.pool.checkin(handle)


def broken(scene: Scene) -> Operation:
    """Give back a connection that cannot be lent again."""
    handle = scene.pool.checkout("read")
    session_of(handle).begin()
    StandIn.end(session_of(handle))
    return lambda: scene.pool.checkin(handle)


def recalled(scene: Scene) -> Operation:
    """Close a connection that another worker waits for."""
    handle = scene.pool.checkout("read")
    lease = lease_of(handle)
    lease.words[lease.recall_at] = lease.words[lease.word_at]
    del lease
    return lambda: scene.pool.checkin(handle)


def recalled_at_rest(scene: Scene) -> Operation:
    """Close the connections that rest and are wanted elsewhere."""
    for lease in scene.rest(2):
        lease.words[lease.recall_at] = lease.words[lease.word_at]
    del lease
    return scene.pool.look_after_idle


def give_all_back(scene: Scene) -> Operation:
    """Close every connection that rests."""
    scene.rest(2)
    return scene.pool.rest


def lend(scene: Scene) -> Operation:
    """Use a connection for the length of a block."""
    scene.rest()

    def operation() -> None:
        with scene.pool.connection("read") as handle:
            session_of(handle).begin()

    return operation


def lend_to_a_failure(scene: Scene) -> Operation:
    """Leave a block by an exception."""

    def operation() -> None:
        with contextlib.suppress(ZeroDivisionError), scene.pool.connection("read"):
            raise ZeroDivisionError

    return operation


def drop(scene: Scene) -> Operation:
    """Drop handles, and check out."""
    held = [scene.pool.checkout("read") for _ in range(3)]

    def operation() -> None:
        held.clear()
        scene.pool.checkin(scene.pool.checkout("read"))

    return operation


def close_handle(scene: Scene) -> Operation:
    """Close a handle twice."""
    handle = scene.pool.checkout("read")

    def operation() -> None:
        handle.close()
        handle.close()

    return operation


POOL_SCENARIOS: tuple[Scenario, ...] = (
    join_and_open,
    open_another,
    warm,
    rested_long,
    died_at_rest,
    epoch_changed,
    refused_once,
    secrets_replaced,
    cut_off_once,
    on_connect_fails,
    wait_in_vain,
    give_back_to_the_queue,
    take_from_the_reserve,
    rest_beside_the_reserve,
    leave_to_the_reserve,
    wait_first,
    give_back_to_high_priority,
    too_many_wait,
    open_ahead,
    in_a_transaction,
    session_changed,
    broken,
    recalled,
    recalled_at_rest,
    give_all_back,
    lend,
    lend_to_a_failure,
    drop,
    close_handle,
)
