"""Whose connection is recalled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shmpool.clock import monotonic
from shmpool.layout import GROUPS, RECALL_WORDS
from shmpool.rows import Server
from shmpool.states import ServerKind, Use
from shmpool.words import UseWord
from shmpool_coordinator.arbiter import (
    LONG_USE_S,
    PATIENCE_S,
    Arbiter,
    Held,
    Recall,
    Waiter,
    choose,
    find_overlapping,
    waiting_groups,
)
from shmpool_coordinator.tenure import CEILING_S
from tests.support.desk import Desk, config_of, desk

NOW = 1000.0
TENURE_S = 0.1


def held(slot: int, **values: Any) -> Held:
    """Return a connection; slot n belongs to worker row n unless told otherwise."""
    defaults: dict[str, Any] = {
        "slot": slot,
        "word": 100 + slot,
        "row": slot,
        "group": 0,
        "endpoint": 0,
        "is_idle": True,
        "idle_since": 10.0,
        "opened_at": 5.0,
        "server_generation": 0,
    }
    return Held(**(defaults | values))


def waiter(slot: int, group: int = 0, for_endpoint: bool = False, **values: Any) -> Waiter:
    """Return a waiter of a row of its own."""
    return Waiter(slot, **({"row": slot, "group": group, "for_endpoint": for_endpoint} | values))


def chosen(
    waiters: list[Waiter], connections: list[Held], recalls: dict[int, Recall] | None = None, **values: Any
) -> list[int]:
    """Return the slots that are recalled, in order."""
    arguments: dict[str, Any] = {
        "group_values": {},
        "endpoint_values": {},
        "usable": {0: frozenset({0}), 1: frozenset({0, 1})},
        "least": {},
        "tenures": {0: TENURE_S, 1: TENURE_S},
        "now": NOW,
    }
    found = choose(waiters, connections, recalls or {}, **(arguments | values))
    return [h.slot for h in found]


def test_longest_idle_first() -> None:
    """Of idle connections the one that rested longest is wanted back."""
    assert chosen([waiter(9)], [held(1, idle_since=20.0), held(2, idle_since=10.0)]) == [2]


def test_busy_only_when_none_is_idle() -> None:
    """A busy connection is recalled after the idle ones, the one its worker has had longest first."""
    connections = [
        held(1, is_idle=False, idle_since=NOW, opened_at=2.0),
        held(2, is_idle=False, idle_since=NOW, opened_at=1.0),
        held(3, idle_since=99.0),
    ]
    assert chosen([waiter(9), waiter(8)], connections) == [3, 2]


def test_old_server_generations_first() -> None:
    """During a reload the old workers' connections go first."""
    connections = [held(1, idle_since=1.0, server_generation=2), held(2, idle_since=9.0, server_generation=1)]
    assert chosen([waiter(9)], connections) == [2]
    busy = [
        held(1, is_idle=False, idle_since=NOW, opened_at=1.0, server_generation=2),
        held(2, is_idle=False, idle_since=NOW, opened_at=9.0, server_generation=1),
    ]
    assert chosen([waiter(9)], busy) == [2]


LONG = {"is_idle": False, "idle_since": NOW - LONG_USE_S, "opened_at": 1.0}
SHORT = {"is_idle": False, "idle_since": NOW - LONG_USE_S / 2, "opened_at": 9.0}


def test_a_connection_in_long_use_is_recalled_last() -> None:
    """Who has one checked out for long may go on, even in an old worker: others are asked first."""
    connections = [held(1, **LONG, server_generation=1), held(2, **SHORT, server_generation=2)]
    assert chosen([waiter(9)], connections) == [2]
    assert chosen([waiter(9), waiter(8)], connections) == [2, 1]


def test_a_recall_of_a_connection_in_long_use_is_not_waited_for() -> None:
    """Another one that is expected sooner is recalled, once there is one, and not every other one in long use."""
    recalls = {1: Recall(101, 0, 0, NOW)}
    assert chosen([waiter(9)], [held(1, **LONG), held(2, **SHORT)], recalls) == [2]
    assert chosen([waiter(9)], [held(1, **LONG), held(2)], recalls) == [2]
    assert chosen([waiter(9)], [held(1, **LONG), held(2, **LONG)], recalls) == []
    assert chosen([waiter(9)], [held(1, **SHORT), held(2)], recalls) == []
    late = {1: Recall(101, 0, 0, NOW - PATIENCE_S)}
    assert chosen([waiter(9)], [held(1, **LONG), held(2, **LONG)], late) == [2]


def test_minimum_of_a_worker_is_kept() -> None:
    """No worker is brought below its group's minimum."""
    assert chosen([waiter(9), waiter(8)], [held(1, row=1), held(2, row=1)], least={0: 1}) == [1]


def test_nobody_keeps_a_minimum_beside_another_generation() -> None:
    """While old and new workers serve side by side, what each would keep is there for all; the old ones' goes first."""
    connections = [held(1, row=1, server_generation=2), held(2, row=2, server_generation=1), held(3, row=3)]
    assert chosen([waiter(9), waiter(8)], connections, least={0: 1}) == []
    assert chosen([waiter(9), waiter(8), waiter(7)], connections, least={0: 1}, overlapping={1, 2}) == [2, 1]


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([(100, 1), (100, 1)], []),
        ([(100, 1), (100, 2)], [0, 1]),  # HUP
        ([(100, 1), (200, 2)], [0, 1]),  # USR2: 200 is a child of 100
        ([(100, 1), (300, 2)], []),  # another service
        ([(100, 1), (300, 2), (300, 2), (300, 1)], [1, 2, 3]),
    ],
)
def test_whose_generations_overlap(servers: list[tuple[int, int]], expected: list[int]) -> None:
    """Those of one Gunicorn, be it of one master or of the two of an upgrade; not of two services."""
    parents = {100: 1, 200: 100, 300: 1}
    rows = {row: Server(ServerKind.GUNICORN, pid, generation) for row, (pid, generation) in enumerate(servers)}
    assert sorted(find_overlapping(rows, parents.get)) == expected


def test_free_permits_serve_waiters_first() -> None:
    """As many waiters as there are free permits need nothing recalled."""
    connections = [held(1), held(2)]
    assert chosen([waiter(9), waiter(8)], connections, group_values={0: 1}) == [1]


def test_outstanding_recalls_serve_waiters() -> None:
    """A waiter that a recall under way will serve brings no other recall, until patience ends."""
    recalls = {1: Recall(101, 0, 0, NOW - PATIENCE_S / 2)}
    assert chosen([waiter(9)], [held(1), held(2)], recalls) == []
    late = {1: Recall(101, 0, 0, NOW - PATIENCE_S)}
    assert chosen([waiter(9)], [held(1), held(2)], late) == [2]


def test_other_groups_connections_count_for_endpoint_waiters_only() -> None:
    """Who waits for an endpoint gets any group's connection there; who waits for the group, only the group's."""
    connections = [held(1, group=1)]
    assert chosen([waiter(9)], connections) == []
    assert chosen([waiter(9, for_endpoint=True)], connections) == [1]
    assert chosen([waiter(9, for_endpoint=True)], [held(1, endpoint=1)]) == []


@pytest.fixture
def pool(pool_name: str) -> Iterator[Desk]:
    """A pool whose two group permits can be held."""
    with desk(config_of(pool_name)) as made:
        yield made


def test_recall_is_written_and_withdrawn(pool: Desk) -> None:
    """A recall equals the slot's word while somebody waits, is counted, and goes when nobody waits any more."""
    registry = pool.registry
    segment, settings = registry.segment, registry.settings
    assert settings is not None
    arbiter = Arbiter(segment, lambda row: True)
    token, _other = pool.claim(), pool.claim()
    segment.words[token.use_at] = UseWord(Use.IDLE, 0).word()
    waiting = pool.table.take(pool.groups[0])
    segment.words[waiting.use_at] = UseWord(Use.WAITING, 0).word()

    def tick(now: float) -> set[int]:
        usable = registry.endpoints.usable()
        return arbiter.tick(arbiter.waiters(), settings, usable, registry.permits, now)

    now = monotonic() + CEILING_S  # it has rested for long
    assert waiting_groups(arbiter.waiters()) == ({0}, set())
    assert tick(now) == {0}
    assert segment.words[token.recall_at] == pool.word(token)
    assert segment.words[segment.layout.at(GROUPS, 0, "recalls")] == 1
    assert tick(now) == set()
    segment.words[waiting.use_at] = 0
    assert tick(now) == set()
    assert segment.words[token.recall_at] == 0
    arbiter.close()


def test_waiting_word_of_a_dead_worker_is_no_waiter(pool: Desk) -> None:
    """A use word that its dead owner left behind makes nobody give anything back."""
    arbiter = Arbiter(pool.registry.segment, lambda row: False)
    token = pool.table.take(pool.groups[0])
    pool.registry.segment.words[token.use_at] = UseWord(Use.WAITING, 0).word()
    assert arbiter.waiters() == []
    arbiter.close()


def test_new_coordinator_withdraws_all_recalls(pool: Desk) -> None:
    """Recalls of an earlier coordinator are cleared."""
    segment = pool.registry.segment
    at = segment.layout.at(RECALL_WORDS, 3)
    segment.words[at] = 7
    Arbiter(segment, lambda row: True).close()
    assert segment.words[at] == 0
