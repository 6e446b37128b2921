"""What is stopped: each scenario prepares a worker and returns the operation whose every bytecode is a point.

All of them run over `Host`'s pool: groups read (4) and write (1), endpoints pg1 and pg2 (one permit each).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from shmpool.slots import EndpointPermits, Outcome, SlotTable
from tests.support.crashing import Host, now

Operation = Callable[[], object]
Scenario = Callable[[Host, SlotTable], Operation]


def claim_granted(host: Host, table: SlotTable) -> Operation:
    """Take a token and claim a pair at the first endpoint."""

    def operation() -> None:
        token = table.take(host.groups["read"])
        assert table.claim_once(token, host.groups["read"], host.route())

    return operation


def claim_group_busy(host: Host, table: SlotTable) -> Operation:
    """Find the group busy, and put the token back."""
    held = host.hold(table, "write")

    def operation() -> None:
        token = table.take(host.groups["write"])
        assert not table.claim_once(token, host.groups["write"], host.route())
        table.put_back(token)
        assert held

    return operation


def claim_overtaken(host: Host, table: SlotTable) -> Operation:
    """Take a permit that is left to others, as others took theirs just before, and give it back."""
    held = [host.hold_group(table, "read")]
    overtaken = copy.copy(host.groups["read"])
    acquire = overtaken.acquire

    def overtake(timeout: float) -> None:
        held.append(host.hold_group(table, "read"))
        acquire(timeout)

    overtaken.acquire = overtake

    def operation() -> None:
        token = table.take(host.groups["read"])
        assert not table.claim_once(token, overtaken, host.route(), leave=2)
        table.put_back(token)
        assert held

    return operation


def claim_second_endpoint(host: Host, table: SlotTable) -> Operation:
    """Find the first endpoint busy and be granted at the second."""
    held = host.hold(table, "write", "pg1")

    def operation() -> None:
        token = table.take(host.groups["read"])
        assert table.claim_once(token, host.groups["read"], host.route("pg1", "pg2"))
        assert held

    return operation


def claim_endpoints_busy(host: Host, table: SlotTable) -> Operation:
    """Find every endpoint busy and give the group permit up."""
    held = [host.hold(table, "read"), host.hold(table, "read")]

    def operation() -> None:
        token = table.take(host.groups["read"])
        assert not table.claim_once(token, host.groups["read"], host.route())
        table.put_back(token)
        assert held

    return operation


def claim_endpoint_later(host: Host, table: SlotTable) -> Operation:
    """Hold a group permit and get an endpoint at the second try."""
    token = host.hold_group(table, "read")

    def operation() -> None:
        assert table.claim_endpoint(token, []) is Outcome.ENDPOINTS_BUSY
        assert table.claim_endpoint(token, host.route()) is Outcome.GRANTED

    return operation


def claim_failing(host: Host, table: SlotTable) -> Operation:
    """Meet an error that no semaphore ever gives, in the inner bracket, so that the handler runs."""

    def fail(timeout: float) -> None:
        raise OSError(timeout)

    broken: EndpointPermits = copy.copy(host.endpoints["pg1"])
    broken.acquire = fail

    def operation() -> None:
        token = table.take(host.groups["read"])
        try:
            table.claim(token, host.groups["read"], [broken])
        except OSError:
            table.abandon(token)

    return operation


def wait_with_a_ring(host: Host, table: SlotTable) -> Operation:
    """Sleep on the group's bell, be rung, be granted what another connection of the process gave back."""
    held = [host.hold(table, "write")]
    looks = iter(range(9))
    host.ring("write")

    def route() -> Sequence[EndpointPermits]:
        if next(looks) == 1:
            table.release(held.pop())
        return host.route()

    def operation() -> None:
        token = table.take(host.groups["write"])
        assert table.wait(token, host.groups["write"], route, deadline=float("inf"))

    return operation


def wait_beside_a_reserve(host: Host, table: SlotTable) -> Operation:
    """Be rung for a permit that is left to others, pass the ring on, and time out."""
    host.ring("write")

    def operation() -> None:
        token = table.take(host.groups["write"])
        assert not table.wait(
            token,
            host.groups["write"],
            host.route,
            deadline=now() + 4.5,
            leave=lambda: 1,
            stand_aside=lambda seconds: None,
        )
        table.put_back(token)

    return operation


def wait_timed_out(host: Host, table: SlotTable) -> Operation:
    """Wait for a group permit until the deadline."""
    held = host.hold(table, "write")

    def operation() -> None:
        token = table.take(host.groups["write"])
        assert not table.wait(token, host.groups["write"], host.route, deadline=now() + 4.5)
        table.put_back(token)
        assert held

    return operation


def wait_for_endpoint_timed_out(host: Host, table: SlotTable) -> Operation:
    """Wait for an endpoint, start over after some slices, and time out."""
    held = [host.hold(table, "read"), host.hold(table, "read")]

    def operation() -> None:
        token = table.take(host.groups["read"])
        assert not table.wait(token, host.groups["read"], host.route, deadline=now() + 9.5)
        table.put_back(token)
        assert held

    return operation


def release(host: Host, table: SlotTable) -> Operation:
    """Give both permits and the token back."""
    token = host.hold(table, "read")
    return lambda: table.release(token)


def give_up(host: Host, table: SlotTable) -> Operation:
    """Give a group permit back without having had an endpoint."""
    token = host.hold_group(table, "read")

    def operation() -> None:
        table.give_up(token)
        table.put_back(token)

    return operation


def abandon(host: Host, table: SlotTable) -> Operation:
    """Leave a pair to the coordinator."""
    token = host.hold(table, "read")
    return lambda: table.abandon(token)


def tidy(host: Host, table: SlotTable) -> Operation:
    """Revive tokens that were dropped in every state, and close what was open."""
    resting = host.hold(table, "read")
    resting.tether.resource = object()
    for token in (resting, host.hold(table, "read"), host.hold_group(table, "read"), table.take(host.groups["read"])):
        assert token
    del resting, token

    def operation() -> None:
        for again in table.tidy():
            table.release(again)

    return operation


def come_back(host: Host, table: SlotTable) -> Operation:
    """Take tokens whose slots were abandoned and that the coordinator has freed since."""
    for token in [host.hold(table, "read"), host.hold_group(table, "read")]:
        table.abandon(token)
    for _ in range(3):
        host.permits.tick(lambda slot, word: True)

    def operation() -> None:
        for again in [table.take(host.groups["read"]) for _ in range(4)]:
            table.put_back(again)

    return operation


SCENARIOS: tuple[Scenario, ...] = (
    claim_granted,
    claim_group_busy,
    claim_overtaken,
    claim_second_endpoint,
    claim_endpoints_busy,
    claim_endpoint_later,
    claim_failing,
    wait_with_a_ring,
    wait_beside_a_reserve,
    wait_timed_out,
    wait_for_endpoint_timed_out,
    release,
    give_up,
    abandon,
    tidy,
    come_back,
)
