"""Which endpoints serve a group, in which order, and why the others do not."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from shmpool.routing import Candidate, Route, choose, is_role_allowed, refusal
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
