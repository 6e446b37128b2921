"""How long a worker keeps what others wait for, and what connects are found to cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.layout import SLOTS
from shmpool_coordinator.costs import FIRST_COST_S, LOOK_S, MEMORY_OPENS, Costs, averaged
from shmpool_coordinator.tenure import (
    CEILING_S,
    FLOOR_S,
    LEAST_SHARE,
    MOST_SHARE,
    PAUSE_S,
    WAIT_S,
    pause,
    tenure,
)
from tests.support.desk import config_of, desk

COSTS = st.floats(0, 10)
QUEUES = st.floats(0, 1000)
TINY = 1e-9


@given(COSTS, QUEUES)
def test_a_tenure_has_bounds(cost: float, queue: float) -> None:
    """Whatever was measured."""
    assert FLOOR_S <= tenure(cost, queue) <= CEILING_S


@given(COSTS, QUEUES)
def test_moves_cost_their_share(cost: float, queue: float) -> None:
    """Between the least and the most, but at the bounds."""
    seconds = tenure(cost, queue)
    share = cost / (seconds + cost)
    assert share >= LEAST_SHARE - TINY or seconds == FLOOR_S
    assert share <= MOST_SHARE + TINY or seconds == CEILING_S


@given(COSTS, QUEUES)
def test_a_queue_waits_no_longer_than_it_has_to(cost: float, queue: float) -> None:
    """Beyond the wait that is accepted, only because moves would cost too much, or at the floor."""
    seconds = tenure(cost, queue)
    waits = queue * (seconds + cost) > WAIT_S + TINY
    assert not waits or seconds in (FLOOR_S, CEILING_S) or cost / (seconds + cost) >= MOST_SHARE - TINY


@given(COSTS, QUEUES, QUEUES)
def test_more_waiters_never_lengthen_a_tenure(cost: float, one: float, other: float) -> None:
    """The longer the queue, the sooner a connection goes on."""
    assert tenure(cost, min(one, other)) >= tenure(cost, max(one, other))


@given(COSTS)
def test_a_pause_is_never_longer_than_a_connect(cost: float) -> None:
    """Nor than what an idle worker's connection may take to get to a waiter."""
    assert 0 <= pause(cost) <= min(cost, PAUSE_S)


def test_costs_follow_what_is_measured() -> None:
    """The newest opens count most; after some more as much as all before."""
    assert averaged(None, 4, 0.02) == pytest.approx(0.005)
    assert averaged(0.004, MEMORY_OPENS, MEMORY_OPENS * 0.008) == pytest.approx(0.006)
    assert averaged(0.004, 1000, 8.0) == pytest.approx(0.008)


def test_costs_are_read_from_the_slots(pool_name: str) -> None:
    """Of each group its own; again after a while; of a slot that began anew nothing is taken off."""
    with desk(config_of(pool_name, groups={"read": 2, "write": 2})) as pool:
        segment = pool.registry.segment
        costs = Costs(segment)
        at = segment.layout.at(SLOTS, 0)

        def count(opens: int, seconds: float, now: float) -> float:
            segment.words[at + SLOTS.column("counted_group")] = 2
            segment.words[at + SLOTS.column("opens")] = opens
            segment.times[at + SLOTS.column("open_total")] = seconds
            costs.look(now)
            return costs.of(1)

        assert count(0, 0.0, 1.0) == FIRST_COST_S
        assert count(10, 0.1, 1.0 + LOOK_S / 2) == FIRST_COST_S
        assert count(10, 0.1, 1.0 + LOOK_S) == pytest.approx(0.01)
        assert count(1, 0.5, 9.0) == pytest.approx(0.01)
        assert count(1001, 20.5, 10.0) == pytest.approx(0.02)
        assert costs.of(0) == FIRST_COST_S
