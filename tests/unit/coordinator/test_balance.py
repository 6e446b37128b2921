"""Which connections move until each endpoint holds its share, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.clock import monotonic
from shmpool.layout import ENDPOINTS, GROUPS
from shmpool.routing import RAMP_S, Candidate, pause_between_moves
from shmpool.settings import GroupSettings, Policy
from shmpool.slots import Outcome, Token
from shmpool.states import Health, Role, Use, Verdict
from shmpool.words import MOVE, UseWord
from shmpool_coordinator.arbiter import PATIENCE_S, Arbiter
from shmpool_coordinator.balance import (
    CATCH_UP_S,
    LOOK_S,
    SETTLE_S,
    YOUNG_S,
    Balancer,
    Drift,
    after,
    first_move,
)
from shmpool_coordinator.health import EndpointHealth
from tests.support.desk import Desk, config_of, desk
from tests.support.pools import endpoint_settings, group_settings, healthy

CAP = 100


def candidate(index: int, weight: int = 1, **changes: Any) -> Candidate:
    """Return an endpoint with room."""
    age_s = changes.pop("age_s", RAMP_S)
    settings = endpoint_settings(index, f"pg{index}")._replace(max_connections=changes.pop("cap", CAP))
    return Candidate(settings, healthy(weight=weight, **changes), 0, None, None, age_s)


def counted(candidates: list[Candidate], counts: Counter[tuple[int, int]]) -> list[Candidate]:
    """Return the endpoints with what all groups hold there."""
    used: Counter[int] = Counter()
    for (_, endpoint), number in counts.items():
        used[endpoint] += number
    return [c._replace(in_use=used[c.settings.index]) for c in candidates]


groups_of_any_policy = st.lists(st.sampled_from(get_args(Policy)), min_size=1, max_size=3).map(
    lambda policies: [group_settings(n, f"g{n}")._replace(policy=policy) for n, policy in enumerate(policies)]
)
endpoints_of_any_weight = st.lists(st.tuples(st.integers(1, 9), st.sampled_from((0.0, 1.0, 5.0, RAMP_S))), min_size=2)


@given(groups_of_any_policy, endpoints_of_any_weight.filter(lambda found: len(found) < 5), st.data())
def test_moves_come_to_an_end_at_the_shares(
    groups: list[GroupSettings], weights: list[tuple[int, float]], data: st.DataObject
) -> None:
    """From any state few moves lead to shares that match as well as whole numbers can, and no move is taken back."""
    candidates = [candidate(n, weight, age_s=age) for n, (weight, age) in enumerate(weights)]
    pairs = [(g.index, c.settings.index) for g in groups for c in candidates]
    counts = Counter({pair: data.draw(st.integers(0, 12)) for pair in pairs})
    total = counts.total()
    moves = is_moving = 0
    while is_moving or not moves:
        is_moving = 0
        for group in groups:
            made: set[tuple[int, int]] = set()
            while (move := first_move(group, counted(candidates, counts), groups, counts)) is not None:
                assert move[::-1] not in made
                made.add(move)
                _, counts = after([(group.index, *move)], candidates, counts)
                is_moving = 1
                moves += 1
                assert moves <= total * (len(groups) + 1)
        if not is_moving:
            break
    assert counts.total() == total
    assert min(counts.values()) >= 0


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 60))
def test_shares_follow_the_weights(weights: list[int], held: int) -> None:
    """Connections that all were at one endpoint end within one of each endpoint's share."""
    group, candidates = group_settings(), [candidate(n, weight) for n, weight in enumerate(weights)]
    counts = Counter({(0, 0): held})
    while (move := first_move(group, counted(candidates, counts), [group], counts)) is not None:
        _, counts = after([(0, *move)], candidates, counts)
    for n, weight in enumerate(weights):
        assert abs(counts[0, n] - held * weight / sum(weights)) <= len(weights) - 1


@pytest.mark.parametrize(
    "changes",
    [{"health": Health.DOWN}, {"health": Health.UNKNOWN}, {"verdict": Verdict.MISCONFIGURED}, {"cap": 0}],
    ids=["down", "unknown", "misconfigured", "full"],
)
def test_nothing_moves_where_it_may_not_be_taken(changes: dict[str, Any]) -> None:
    """A target is UP, well and has room."""
    counts = Counter({(0, 0): 8})
    candidates = counted([candidate(0), candidate(1, **changes)], counts)
    assert first_move(group_settings(), candidates, [], counts) is None
    assert first_move(group_settings(), counted([candidate(0), candidate(1)], counts), [], counts) == (0, 1)


def test_fallen_back_connections_go_home() -> None:
    """Also a single one leaves the primary, or a backup, for a replica; none leaves the replica."""
    group, counts = group_settings()._replace(target="prefer-replica"), Counter({(0, 0): 1})
    for second in ({"role": Role.PRIMARY}, {"role": Role.REPLICA, "weight": 0}):
        candidates = counted([candidate(0, **second), candidate(1, role=Role.REPLICA, age_s=0.0)], counts)
        assert first_move(group, candidates, [group], counts) == (0, 1)
    home = counted([candidate(0, role=Role.PRIMARY), candidate(1, role=Role.REPLICA)], Counter({(0, 1): 9}))
    assert first_move(group, home, [group], Counter({(0, 1): 9})) is None


def test_returned_endpoint_gets_what_has_grown_of_its_share() -> None:
    """Over the ramp it holds more and more, at the end its share, and at no moment more than that part."""
    group, counts = group_settings(), Counter({(0, 0): 8})
    had = []
    for age in range(int(RAMP_S) + 1):
        while True:
            found = counted([candidate(0), candidate(1, age_s=age)], counts)
            move = first_move(group, found, [group], counts)
            if move is None:
                break
            assert move == (0, 1)
            _, counts = after([(0, *move)], found, counts)
        had.append(counts[0, 1])
    assert had == sorted(had)
    assert had[0] == 0
    assert had[-1] == 4
    assert all(number <= 8 * age / RAMP_S for age, number in enumerate(had))


def test_pace_is_kept_and_slows_down_where_nothing_arrives() -> None:
    """Two moves are a n-th of the ramp apart; what brings its target nothing is tried less and less often."""
    held = 8
    drift, now = Drift(next_at=0.0), 100.0
    drift.moved(1, has=0, held=held, now=now)
    assert drift.next_at == pytest.approx(now - CATCH_UP_S + RAMP_S / held)
    assert pause_between_moves(held) == RAMP_S / held
    pauses = []
    for has in (0, 0, 0, 1, 2):
        drift.answered, now = 1, drift.next_at + 1.0
        drift.next_at = now
        drift.moved(1, has, held, now)
        pauses.append(drift.next_at - now)
    base = RAMP_S / held
    assert pauses == pytest.approx([2 * base, 4 * base, 8 * base, base, base])


# -- on real tables


@pytest.fixture
def pool(pool_name: str) -> Iterator[Desk]:
    """A pool of two endpoints that have been UP for long."""
    with desk(config_of(pool_name, {"read": 4}, {"pg0": 4, "pg1": 4})) as made:
        for index in made.endpoints:
            made.registry.endpoints.judge(
                index, EndpointHealth(health=Health.UP, role=Role.PRIMARY, verdict=Verdict.OK)
            )
            made.registry.segment.times[made.registry.segment.layout.at(ENDPOINTS, index, "since")] = 1.0
        yield made


def connection(pool: Desk, endpoint: int) -> Token:
    """Claim a permit at an endpoint and rest there."""
    token = pool.table.take(pool.groups[0])
    assert pool.table.claim(token, pool.groups[0], [pool.endpoints[endpoint]]) is Outcome.GRANTED
    pool.registry.segment.words[token.use_at] = UseWord(Use.IDLE, 0).word()
    return token


class Clock:
    """A balancer of a pool, and the time that it is told."""

    def __init__(self, pool: Desk) -> None:
        segment = pool.registry.segment
        self.arbiter = Arbiter(segment, lambda row: True)
        self.balancer = Balancer(segment, pool.registry.permits, self.arbiter.connections)
        self.now = monotonic() + YOUNG_S
        self._pool = pool

    def tick(self, seconds: float = 0.0, waiting: frozenset[int] = frozenset()) -> set[int]:
        """Let time pass, and tick."""
        self.now += seconds
        settings = self._pool.registry.settings
        assert settings is not None
        return self.balancer.tick(settings, waiting, self.now)

    def recalled(self, tokens: list[Token]) -> list[bool]:
        """Return which connections are asked for."""
        words = self._pool.registry.segment.words
        return [words[token.recall_at] == words[token.word_at] | MOVE for token in tokens]

    def recalls(self) -> int:
        """Return how many were asked for so far."""
        segment = self._pool.registry.segment
        return int(segment.words[segment.layout.at(GROUPS, 0, "recalls")])


@pytest.fixture
def clock(pool: Desk) -> Iterator[Clock]:
    """A balancer that has not looked yet."""
    made = Clock(pool)
    yield made
    made.arbiter.close()


def test_one_is_asked_for_once_the_difference_has_lasted(pool: Desk, clock: Clock) -> None:
    """Of three connections at one endpoint one is asked for, after a while, and no other while that is about to go."""
    tokens = [connection(pool, 0) for _ in range(3)]
    assert clock.tick() == set()
    assert clock.tick(SETTLE_S / 2) == set()
    assert clock.recalled(tokens) == [False] * 3
    assert clock.tick(SETTLE_S / 2) == {0}
    assert sum(clock.recalled(tokens)) == 1
    assert clock.tick(PATIENCE_S / 2) == set()
    asked = tokens[clock.recalled(tokens).index(True)]
    pool.table.release(asked)
    connection(pool, 1)
    for _ in range(5):
        assert clock.tick(LOOK_S) == set()
    assert clock.recalls() == 1


def test_who_does_not_answer_is_passed_over(pool: Desk, clock: Clock) -> None:
    """After its patience another connection is asked for; what is needed no more is taken back."""
    tokens = [connection(pool, 0) for _ in range(3)]
    clock.tick()
    clock.tick(SETTLE_S)
    clock.tick(RAMP_S)
    assert sum(clock.recalled(tokens)) == 2
    pool.table.release(tokens[clock.recalled(tokens).index(False)])
    connection(pool, 1)
    clock.tick(PATIENCE_S)
    clock.tick(LOOK_S)
    assert clock.recalled(tokens) == [False] * 3


def test_balanced_pool_is_left_alone(pool: Desk, clock: Clock) -> None:
    """Nothing moves where shares match, as well as they can: two and two, or two and one."""
    tokens = [connection(pool, 0), connection(pool, 0), connection(pool, 1), connection(pool, 1)]
    for _ in range(5):
        assert clock.tick(LOOK_S) == set()
    pool.table.release(tokens.pop())
    for _ in range(5):
        assert clock.tick(LOOK_S) == set()
    assert clock.recalls() == 0


def test_group_that_waits_is_left_alone(pool: Desk, clock: Clock) -> None:
    """While somebody waits for a permit nothing is asked for; afterwards it is."""
    for _ in range(3):
        connection(pool, 0)
    for _ in range(5):
        assert clock.tick(LOOK_S, frozenset({0})) == set()
    clock.tick(LOOK_S)
    assert clock.tick(SETTLE_S) == {0}


def test_recall_for_a_waiter_takes_the_place_of_a_move(pool: Desk, clock: Clock) -> None:
    """A connection that was to move and is wanted for a waiter is the arbiter's: its word is not touched."""
    tokens = [connection(pool, 0) for _ in range(3)]
    clock.tick()
    clock.tick(SETTLE_S)
    asked = tokens[clock.recalled(tokens).index(True)]
    words = pool.registry.segment.words
    words[asked.recall_at] = words[asked.word_at]
    clock.tick(LOOK_S, frozenset({0}))
    assert words[asked.recall_at] == words[asked.word_at]
    assert clock.balancer.moves == {}
