"""Which endpoints serve a group, in which order, and why the others do not."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shmpool.routing import (
    Candidate,
    Route,
    choose,
    fallback_bound,
    is_fallback_spent,
    is_role_allowed,
    is_too_slow,
    refusal,
    should_move,
)
from shmpool.settings import GroupSettings, Target
from shmpool.states import Admin, Health, Role, Verdict
from tests.support.pools import endpoint_settings, group_settings, healthy


def candidate(index: int, role: Role = Role.REPLICA, *, in_use: int = 0, **changes: Any) -> Candidate:
    """Return an endpoint `pg<index>`; settings, lag and status by keyword."""
    settings = endpoint_settings(index, f"pg{index}")
    settings = settings._replace(backup=changes.pop("backup", False))
    lag_s, lag_bytes = changes.pop("lag_s", None), changes.pop("lag_bytes", None)
    return Candidate(settings, healthy(role=role, **changes), in_use, lag_s, lag_bytes)


def group(**changes: Any) -> GroupSettings:
    """Return a group that takes any endpoint, but for the changes."""
    return group_settings()._replace(**changes)


def route(settings: GroupSettings, *candidates: Candidate, **options: Any) -> Route:
    """Choose with a live coordinator."""
    return choose(settings, candidates, **{"is_stale": False, **options})


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("primary", {Role.PRIMARY, Role.UNKNOWN}),
        ("replica", {Role.REPLICA, Role.UNKNOWN}),
        ("prefer-replica", set(Role)),
        ("any", set(Role)),
    ],
)
def test_roles_of_a_target(target: Target, allowed: set[Role]) -> None:
    """Each target takes the roles it names; an unknown role is found out on the connection."""
    assert {role for role in Role if is_role_allowed(target, role)} == allowed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epoch": 0}, "not in the segment yet"),
        ({"admin_operator": Admin.DRAIN}, "drain by its administrators"),
        ({"health": Health.DOWN, "verdict": Verdict.REFUSED}, r"DOWN \(refused\)"),
        ({"role": Role.REPLICA}, "is a replica, the group wants primary"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], told: str) -> None:
    """An endpoint that does not qualify has a reason that a person understands."""
    role = changes.pop("role", Role.PRIMARY)
    reason = refusal(group(target="primary"), candidate(1, role, **changes), False)
    assert reason is not None
    assert re.search(told, reason)


def test_lag_bounds() -> None:
    """A replica beyond either bound does not qualify; an unknown lag does, and a primary has none."""
    seconds, size = group(max_lag_s=5.0), group(max_lag_bytes=1000)
    assert "lags 6.0 s" in str(refusal(seconds, candidate(1, lag_s=6.0), False))
    assert "lags 1001 bytes" in str(refusal(size, candidate(1, lag_bytes=1001), False))
    for settings in (seconds, size):
        assert refusal(settings, candidate(1, lag_s=5.0, lag_bytes=1000), False) is None
        assert refusal(settings, candidate(1), False) is None
        assert refusal(settings, candidate(1, Role.PRIMARY, lag_s=9.0, lag_bytes=9999), False) is None


def test_stale_health_is_advice() -> None:
    """With a stale coordinator DOWN, role and lag keep nobody out; the configuration still does."""
    settings = group(target="primary", max_lag_s=1.0, endpoints=("pg1", "pg2"))
    down = candidate(1, Role.REPLICA, health=Health.DOWN, lag_s=9.0)
    assert route(settings, down).order == ()
    assert route(settings, down, is_stale=True).order == (1,)
    assert "not among" in route(settings, candidate(3), is_stale=True).refusals["pg3"]


def test_last_resort() -> None:
    """Where nothing is eligible, those that are only DOWN may be tried, whatever their role was; it tells the order."""
    down = candidate(1, Role.REPLICA, health=Health.DOWN)
    primary = candidate(2, Role.PRIMARY, health=Health.DOWN)
    settings = group(target="primary")
    assert route(settings, down, primary).last_resort == (2, 1)
    assert route(settings, candidate(0), primary).last_resort == (2,), "a replica that is UP is no primary"
    assert route(settings, down, primary, candidate(3, Role.PRIMARY)).last_resort == ()
    assert route(settings, down, primary, is_stale=True).last_resort == (), "they are eligible"
    for changes in (
        {"admin_operator": Admin.DRAIN},
        {"verdict": Verdict.ROLE_CONFLICT},
        {"epoch": 0},
    ):
        assert route(settings, candidate(1, Role.PRIMARY, health=Health.DOWN, **changes)).last_resort == ()
    assert route(group(endpoints=("pg7",)), primary).last_resort == ()
    reads = group(target="prefer-replica", fallback_connections=2)
    assert route(reads, candidate(1, Role.PRIMARY, health=Health.DOWN, in_use=2), held=lambda _: 2).last_resort == ()


def test_every_endpoint_is_either_routed_or_refused() -> None:
    """A route accounts for each candidate once."""
    found = route(group(target="replica"), candidate(1), candidate(2, Role.PRIMARY), candidate(3, health=Health.DOWN))
    assert (found.order, set(found.refusals)) == ((1,), {"pg2", "pg3"})


def test_least_connections_by_weight() -> None:
    """The endpoint with the fewest permits out for its weight comes first."""
    assert route(group(), candidate(1, in_use=5), candidate(2, in_use=1)).order == (2, 1)
    assert route(group(), candidate(1, in_use=5, weight=10), candidate(2, in_use=1)).order == (1, 2)
    assert route(group(), candidate(1, weight=0), candidate(2, in_use=9)).order == (2, 1)


def test_ties_take_turns() -> None:
    """Among equals nobody is always first."""
    firsts = Counter(route(group(), *(candidate(n) for n in range(3)), turn=turn).order[0] for turn in range(9))
    assert set(firsts.values()) == {3}


def test_round_robin_ignores_use() -> None:
    """Round-robin goes in order, whatever is in use."""
    settings = group(policy="round-robin")
    candidates = [candidate(0, in_use=50), candidate(1), candidate(2, in_use=3)]
    assert [route(settings, *candidates, turn=turn).order[0] for turn in range(4)] == [0, 1, 2, 0]


def test_weighted_follows_the_weights() -> None:
    """The weighted policy puts each endpoint first in proportion to its weight."""
    settings, draw = group(policy="weighted"), random.Random(1).random
    firsts = Counter(
        route(settings, candidate(1, weight=3), candidate(2, weight=1), draw=draw).order[0] for _ in range(4000)
    )
    assert firsts[1] / 4000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("policy", ["least-connections", "round-robin", "weighted"])
def test_preferences_come_before_the_policy(policy: Any) -> None:
    """Replicas before the primary for prefer-replica, and a backup after everything else."""
    settings = group(target="prefer-replica", policy=policy)
    candidates = (candidate(1, backup=True), candidate(2, Role.PRIMARY), candidate(3, in_use=99))
    for turn in range(3):
        assert route(settings, *candidates, turn=turn).order == (3, 2, 1)


# -- the last eligible endpoint


def test_least_lagging_replica_stays() -> None:
    """When every replica lags too far, the one that lags least serves alone, and the others say why not."""
    settings = group(target="replica", max_lag_s=1.0)
    primary, far, near = candidate(1, Role.PRIMARY), candidate(2, lag_s=9.0), candidate(3, lag_s=4.0)
    found = route(settings, primary, far, near)
    assert found.order == (3,)
    assert "lags 9.0 s" in found.refusals["pg2"]
    assert set(found.refusals) == {"pg1", "pg2"}
    assert route(settings, primary, far, candidate(3, lag_s=1.0)).order == (3,)
    assert route(settings, primary, far, candidate(3, lag_s=4.0, health=Health.DOWN)).order == (2,)


def test_least_lagging_goes_by_the_groups_measure() -> None:
    """A bound in bytes compares bytes, one in seconds seconds."""
    candidates = candidate(1, lag_s=9.0, lag_bytes=100), candidate(2, lag_s=2.0, lag_bytes=900)
    assert route(group(target="replica", max_lag_bytes=10), *candidates).order == (1,)
    assert route(group(target="replica", max_lag_s=1.0), *candidates).order == (2,)


def test_primary_comes_before_a_slow_replica_while_it_has_room() -> None:
    """With prefer-replica a slow replica stays only where the group may not hold more on the primary."""
    settings = group(target="prefer-replica", max_lag_s=1.0, fallback_connections=2)
    candidates = candidate(1, Role.PRIMARY, in_use=3), candidate(2, lag_s=9.0)
    assert route(settings, *candidates, held=lambda _: 1).order == (1,)
    spent = route(settings, *candidates, held=lambda _: 2)
    assert spent.order == (2,)
    assert "holds 2 connections and may hold 2" in spent.refusals["pg1"]


def test_idle_connections_leave_a_slow_replica_for_a_better_one() -> None:
    """Connections to a replica beyond the bound are kept only while there is nothing better."""
    settings = group(target="replica", max_lag_s=1.0)
    slow, other, fine = candidate(1, lag_s=9.0), candidate(2, lag_s=5.0), candidate(3)
    assert is_too_slow(settings, [slow, other, fine], 1)
    assert not is_too_slow(settings, [slow, other, fine], 3)
    assert not is_too_slow(settings, [slow, other], 1)
    assert not is_too_slow(settings, [slow, other, candidate(3, health=Health.DOWN)], 1)


# -- falling back


def test_bound_on_falling_back() -> None:
    """The configured number; else half of what the primary groups leave of the endpoint's cap, and at least one."""
    endpoints = [endpoint_settings(n, f"pg{n}")._replace(max_connections=20) for n in (1, 2)]
    reads = group(target="prefer-replica")
    writes = group(name="write", target="primary", connections=7)
    elsewhere = group(name="other", target="primary", connections=9, endpoints=("pg2",))
    groups = [reads, writes, elsewhere]
    assert fallback_bound(reads, endpoints[0], endpoints, groups) == 6
    assert fallback_bound(reads, endpoints[1], endpoints, groups) == 2
    assert fallback_bound(reads, endpoints[0], endpoints, [*groups, writes._replace(connections=50)]) == 1
    assert fallback_bound(reads._replace(fallback_connections=11), endpoints[0], endpoints, groups) == 11


def test_single_endpoint_is_no_fallback() -> None:
    """A group with one endpoint may hold all there, unless the configuration gives a number."""
    one, two = endpoint_settings(1, "pg1"), endpoint_settings(2, "pg2")
    reads = group(target="prefer-replica")
    assert fallback_bound(reads, one, [one], [reads]) is None
    assert fallback_bound(reads._replace(endpoints=("pg1",)), one, [one, two], [reads]) is None
    assert fallback_bound(reads, one, [one, two], [reads]) == 1
    assert fallback_bound(reads._replace(fallback_connections=2), one, [one], [reads]) == 2


def test_spent_fallback_leaves_a_reason_for_each() -> None:
    """Without a replica and with all held that may be held, nothing is eligible, and each endpoint says why."""
    settings = group(target="prefer-replica", fallback_connections=2)
    candidates = candidate(1, Role.PRIMARY, in_use=2), candidate(2, health=Health.DOWN, verdict=Verdict.REFUSED)
    found = route(settings, *candidates, held=lambda _: 2)
    assert found.order == ()
    assert "may hold 2" in found.refusals["pg1"]
    assert "DOWN (refused)" in found.refusals["pg2"]
    assert is_fallback_spent(settings, candidates, 1, [settings], lambda _: 2)
    assert not is_fallback_spent(settings, candidates, 1, [settings], lambda _: 1)
    assert not is_fallback_spent(settings, candidates, 2, [settings], lambda _: 2)


def test_counting_is_spared() -> None:
    """Slots are counted only for a primary that a prefer-replica group may have filled."""

    def fail(_: int) -> int:
        raise AssertionError("counted")

    settings = group(target="prefer-replica", fallback_connections=3)
    assert route(settings, candidate(1, Role.PRIMARY, in_use=2), candidate(2, in_use=9), held=fail).order == (2, 1)
    assert route(group(target="any"), candidate(1, Role.PRIMARY, in_use=9), held=fail).order == (1,)
    assert route(settings, candidate(1, Role.PRIMARY, in_use=9), held=fail, is_stale=True).order == (1,)


# -- spare endpoints and shares


def test_spare_endpoints_wait_for_all_others() -> None:
    """A backup and an endpoint of weight 0 are spare while another is eligible; alone they are what there is."""
    plain, backup, zero = candidate(1, in_use=99), candidate(2, backup=True), candidate(3, weight=0)
    assert route(group(), zero, backup, plain) == Route((1, 2, 3), {}, frozenset({2, 3}))
    assert route(group(), zero, backup) == Route((2, 3), {}, frozenset({3}))
    assert route(group(), zero) == Route((3,), {}, frozenset())
    assert should_move(group(), [zero, candidate(1)], 3)
    assert not should_move(group(), [zero, candidate(1)], 1)


WEIGHTS = st.lists(st.integers(0, 100), min_size=1, max_size=5)


@given(WEIGHTS)
@example([100, 51])
def test_round_robin_shares_follow_the_weights(weights: list[int]) -> None:
    """Over one cycle each endpoint is first exactly as often as its weight says, and never far from its share."""
    settings = group(policy="round-robin")
    found = [candidate(n, weight=weight) for n, weight in enumerate(weights)]
    shares = weights if any(weights) else [1] * len(weights)
    cycle, firsts = sum(shares), [0] * len(weights)
    for turn in range(cycle):
        firsts[route(settings, *found, turn=turn).order[0]] += 1
        for count, share in zip(firsts, shares, strict=True):
            assert abs(count - (turn + 1) * share / cycle) <= len(weights) / 2 + 1.5
    assert firsts == shares


@given(WEIGHTS, st.integers(1, 200))
def test_least_connections_shares_follow_the_weights(weights: list[int], connections: int) -> None:
    """Opened one after the other, connections are spread by weight: each endpoint within one of its share."""
    held = [0] * len(weights)
    for _ in range(connections):
        candidates = [candidate(n, weight=weight, in_use=held[n]) for n, weight in enumerate(weights)]
        held[route(group(), *candidates).order[0]] += 1
    total = sum(weights)
    for count, weight in zip(held, weights, strict=True):
        share = connections * weight / total if total else connections / len(weights)
        assert abs(count - share) <= max(1, len(weights) - 1)


@given(WEIGHTS, st.integers(0, 2**32))
def test_weighted_never_draws_weight_0_before_another(weights: list[int], seed: int) -> None:
    """An endpoint of weight 0 comes last and is spare, unless all are."""
    settings, draw = group(policy="weighted"), random.Random(seed).random
    found = route(settings, *(candidate(n, weight=w) for n, w in enumerate(weights)), draw=draw)
    zeros = {n for n, weight in enumerate(weights) if weight == 0}
    assert set(found.order[len(weights) - len(zeros) :]) == zeros
    assert found.spare == (zeros if len(zeros) < len(weights) else set())


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Endpoints in every state that routing distinguishes."""
    return [
        candidate(
            n,
            draw(st.sampled_from(Role)),
            in_use=draw(st.integers(0, 4)),
            backup=draw(st.booleans()),
            weight=draw(st.integers(0, 3)),
            health=draw(st.sampled_from(Health)),
            verdict=draw(st.sampled_from((Verdict.OK, Verdict.ROLE_CONFLICT))),
            admin_config=draw(st.sampled_from((Admin.READY, Admin.DRAIN))),
            lag_s=draw(st.sampled_from((None, 0.0, 3.0, 9.0))),
        )
        for n in range(draw(st.integers(0, 4)))
    ]


@given(
    candidates(),
    st.sampled_from(("primary", "replica", "prefer-replica", "any")),
    st.sampled_from(("least-connections", "round-robin", "weighted")),
    st.booleans(),
    st.integers(0, 9),
)
def test_route_promises(found: list[Candidate], target: Any, policy: Any, is_stale: bool, turn: int) -> None:
    """Each endpoint is routed or has a reason; max_lag alone leaves no group without; spares follow the others."""
    settings = group(target=target, policy=policy, max_lag_s=5.0)
    chosen = route(settings, *found, is_stale=is_stale, turn=turn, held=lambda _: 0)
    names = {f"pg{index}" for index in chosen.order}
    assert names | set(chosen.refusals) == {c.settings.name for c in found}
    assert not names & set(chosen.refusals)
    assert len(chosen.order) == len(names)
    without_bound = route(settings._replace(max_lag_s=None), *found, is_stale=is_stale, held=lambda _: 0)
    assert bool(chosen.order) == bool(without_bound.order)
    is_last = [index in chosen.spare for index in chosen.order]
    assert is_last == sorted(is_last)
    assert not chosen.order or not is_last[0]
    assert not (chosen.order and chosen.last_resort)
    assert all(c.status.health is Health.DOWN for c in found if c.settings.index in chosen.last_resort)
