"""Whose connection is recalled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Pace,
    Recall,
    Waiter,
    choose,
    find_overlapping,
    queue_lengths,
    waiting_groups,
)
from shmpool_coordinator.tenure import CEILING_S
from tests.support.desk import Desk, config_of, desk

NOW = 1000.0
PACE = Pace(tenure=0.1, pause=0.005)


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
        "paces": {0: PACE, 1: PACE},
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


def busy(slot: int, row: int, **values: Any) -> Held:
    """Return a connection in short use, past its tenure."""
    return held(slot, row=row, **({"is_idle": False, "idle_since": NOW} | values))


JUST_USED = {"idle_since": NOW - PACE.pause / 2, "opened_at": NOW - PACE.tenure / 2}


def test_a_worker_between_two_requests_keeps_its_connection() -> None:
    """Unused for less than a pause, it is busy: its tenure counts, and those that rest go first."""
    assert chosen([waiter(9)], [held(1, **JUST_USED)]) == []
    assert chosen([waiter(9)], [held(1, **JUST_USED)], now=NOW + PACE.pause) == [1]
    assert chosen([waiter(9)], [held(1, **JUST_USED)], now=NOW + PACE.tenure) == [1]
    assert chosen([waiter(9)], [held(1, idle_since=NOW - 0.001), held(2)]) == [2]


def test_nothing_moves_to_a_worker_that_has_as_many() -> None:
    """Only from one that has two more: neither from the waiter's own, nor to swap who has to wait."""
    assert chosen([waiter(1)], [busy(1, row=1), busy(2, row=2)]) == []
    assert chosen([waiter(1)], [busy(1, row=1), busy(2, row=2), busy(3, row=2)]) == []
    assert chosen([waiter(1)], [busy(n, row=min(n, 2), opened_at=n) for n in (1, 2, 3, 4)]) == [2]


def test_what_rested_for_a_tenure_goes_to_whoever_waits() -> None:
    """A worker that hardly uses its second connection does not keep it from one that has many threads."""
    rested, used = NOW - PACE.tenure, NOW - PACE.tenure / 2
    connections = [busy(1, row=1), busy(2, row=2)]
    assert chosen([waiter(1)], [*connections, held(3, row=2, idle_since=used)]) == []
    assert chosen([waiter(1)], [*connections, held(3, row=2, idle_since=rested)]) == [3]


def test_connections_being_opened_count() -> None:
    """Of the waiter's worker as well as of the one that is to give."""
    connections = [busy(2, row=2), busy(3, row=2)]
    assert chosen([waiter(1)], connections) == [2]
    assert chosen([waiter(1)], connections, opening={(1, 0): 1}) == []
    assert chosen([waiter(1)], connections, opening={(1, 0): 1, (2, 0): 1}) == [2]


def test_what_was_recalled_is_its_workers_no_more() -> None:
    """A waiter whose worker is about to lose its only connection has none."""
    recalls = {1: Recall(101, 0, 0, NOW)}
    connections = [busy(1, row=1), busy(2, row=2)]
    assert chosen([waiter(9), waiter(1)], connections, recalls) == [2]


def test_those_go_first_whose_worker_has_others() -> None:
    """A worker without any takes from one that has two, not from one that has had its only one for longer."""
    connections = [busy(1, row=1, opened_at=1.0), busy(2, row=2, opened_at=2.0), busy(3, row=2, opened_at=3.0)]
    assert chosen([waiter(9)], connections) == [2]


def test_a_worker_whose_connections_are_all_in_long_use_is_served() -> None:
    """They may not be back in time; but two workers in long use gain nothing from each other."""
    assert chosen([waiter(1)], [held(1, **LONG), busy(2, row=2)]) == [2]
    assert chosen([waiter(1)], [held(1, **LONG), held(2, **LONG)]) == []


def test_a_choosy_waiter_has_nothing_of_its_own() -> None:
    """What its worker has does not serve it, nor does its worker's next checkin."""
    assert chosen([waiter(1, is_choosy=True)], [busy(1, row=1), busy(2, row=2, opened_at=1.0)]) == [2]


def test_another_groups_connections_are_not_the_waiters_own() -> None:
    """Who waits for an endpoint has nothing yet, whatever its worker holds for another group there."""
    connections = [busy(1, row=1, group=1)]
    assert chosen([waiter(1, for_endpoint=True)], connections) == [1]
    assert chosen([waiter(1, for_endpoint=True)], [*connections, busy(2, row=1)]) == []


def test_an_old_worker_gives_to_a_new_one_that_has_some() -> None:
    """Beside the new generation what rests in the old one moves at once; elsewhere a number means nothing."""
    connections = [busy(1, row=1, server_generation=2), held(2, idle_since=NOW - PACE.pause, server_generation=1)]
    new, stranger = waiter(1, server_generation=2), waiter(3)
    assert chosen([new], connections, overlapping={1, 2}) == [2]
    assert chosen([new], connections) == []
    connections.append(busy(3, row=3))
    assert chosen([stranger], connections, overlapping={1, 2}) == [2]
    assert chosen([stranger], connections) == []


@given(st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(lambda counts: sum(counts) >= len(counts)), st.data())
def test_workers_that_all_wait_come_within_one_of_each_other_and_stay(counts: list[int], data: st.DataObject) -> None:
    """Each move makes them more even, so they end; afterwards nobody's thread gets less than half of the mean."""
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    for _ in range(sum(count * count for count in counts) // 2 + 1):  # a move takes at least 2 off the sum of squares
        connections = [busy(slot, row, opened_at=data.draw(st.floats(1, 9))) for slot, row in enumerate(rows)]
        found = {row: chosen([waiter(row)], connections) for row in range(len(counts))}
        moves = [(slots[0], row) for row, slots in found.items() if slots]
        if not moves:
            break
        slot, row = data.draw(st.sampled_from(moves))
        rows[slot] = row
    else:
        pytest.fail("they never stop")
    has = [rows.count(row) for row in range(len(counts))]
    assert max(has) - min(has) <= 1
    assert min(has) >= len(rows) / len(counts) / 2


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), max_size=8), st.lists(st.integers(0, 4))
)
def test_a_waiter_that_has_none_is_never_left_without(
    connections: list[tuple[int, bool, int]], rows: list[int]
) -> None:
    """As long as anything is idle or past its tenure, each waiter that has none brings a recall; none brings two."""
    made = [
        held(slot, row=row, is_idle=is_idle, idle_since=NOW - used)
        for slot, (row, is_idle, used) in enumerate(connections)
    ]
    waiters = [waiter(100 + n, row=row) for n, row in enumerate(rows)]
    found = chosen(waiters, made)
    owners = {h.row for h in made}
    assert len(set(found)) == len(found) <= len(waiters)
    assert len(found) >= min(len(made), sum(row not in owners for row in rows))


def test_queues_are_of_workers_that_have_none() -> None:
    """For each connection of the group; who waits for an endpoint counts everywhere."""
    counts = {(1, 0): 2, (2, 1): 1}
    assert queue_lengths([waiter(1), waiter(3), waiter(4)], counts) == {0: 1.0, 1: 0.0}
    assert queue_lengths([waiter(3, for_endpoint=True), waiter(4)], counts) == {0: 1.0, 1: 1.0}
    assert queue_lengths([waiter(1)], {}) == {}


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
