"""Choose endpoints for a group: pure, no I/O, no clock.

`eligible` is derived here and stored nowhere.  Health is advice: with a stale coordinator DOWN and roles count as
unknown, and whoever opens a connection checks the role on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from shmpool.chance import chance
from shmpool.settings import EndpointSettings, GroupSettings, Target
from shmpool.states import Admin, Health, Role, Verdict
from shmpool.words import Status

_WANTED: Final[dict[Target, frozenset[Role]]] = {
    "primary": frozenset({Role.PRIMARY}),
    "replica": frozenset({Role.REPLICA}),
    "prefer-replica": frozenset({Role.PRIMARY, Role.REPLICA}),
    "any": frozenset({Role.PRIMARY, Role.REPLICA}),
}


class Candidate(NamedTuple):
    """What is known of an endpoint at this moment."""

    settings: EndpointSettings
    status: Status
    in_use: int  # permits that are not in its semaphore
    lag_s: float | None
    lag_bytes: int | None


class Route(NamedTuple):
    """Endpoints to try, best first, by index; and for the others why not."""

    order: tuple[int, ...]
    refusals: dict[str, str]


def is_role_allowed(target: Target, role: Role) -> bool:
    """Whether a connection to a server in this role may serve a group with this target."""
    return role is Role.UNKNOWN or role in _WANTED[target]


def refusal(group: GroupSettings, candidate: Candidate, is_stale: bool) -> str | None:
    """Return why an endpoint is not eligible for a group, None if it is."""
    status = candidate.status
    if group.endpoints and candidate.settings.name not in group.endpoints:
        return "not among the group's endpoints"
    if status.epoch == 0:
        return "not in the segment yet"
    if status.admin is not Admin.READY:
        return f"{status.admin.name.lower()} by its administrators"
    if status.verdict is Verdict.ROLE_CONFLICT:
        return "claims to be the primary, but a newer one exists"
    if is_stale:
        return None
    if status.health is Health.DOWN:
        return f"DOWN ({status.verdict.name.lower()})"
    if not is_role_allowed(group.target, status.role):
        return f"is a {status.role.name.lower()}, the group wants {group.target}"
    lag_limit = group.max_lag_s
    if lag_limit is not None and status.role is Role.REPLICA and (candidate.lag_s or 0.0) > lag_limit:
        return f"lags {candidate.lag_s:.1f} s, the group allows {lag_limit:g} s"
    byte_limit = group.max_lag_bytes
    if byte_limit is not None and status.role is Role.REPLICA and (candidate.lag_bytes or 0) > byte_limit:
        return f"lags {candidate.lag_bytes} bytes, the group allows {byte_limit}"
    return None


def is_second_choice(group: GroupSettings, candidate: Candidate) -> bool:
    """Whether an endpoint serves the group only for want of a better one: a backup, or the primary for its reads."""
    return candidate.settings.backup or _falls_back(group, candidate)


def _falls_back(group: GroupSettings, candidate: Candidate) -> bool:
    return group.target == "prefer-replica" and candidate.status.role is Role.PRIMARY


def should_move(group: GroupSettings, candidates: Sequence[Candidate], current: int) -> bool:
    """Whether a connection to endpoint `current` was second choice, and a first choice has room again."""
    if not any(c.settings.index == current and is_second_choice(group, c) for c in candidates):
        return False
    first = [c for c in candidates if not is_second_choice(group, c) and refusal(group, c, is_stale=False) is None]
    return any(c.status.health is Health.UP and c.in_use < c.settings.max_connections for c in first)


def choose(
    group: GroupSettings,
    candidates: Sequence[Candidate],
    *,
    is_stale: bool,
    turn: int = 0,
    draw: Callable[[], float] = chance,
) -> Route:
    """Order the eligible endpoints by the group's target and policy.

    Args:
        is_stale: the coordinator's heartbeat is too old to believe health and roles.
        turn: a number that grows with each call, for round-robin.
        draw: a number in [0, 1), for the weighted policy.
    """
    refusals: dict[str, str] = {}
    eligible: list[Candidate] = []
    for candidate in candidates:
        reason = refusal(group, candidate, is_stale)
        if reason is None:
            eligible.append(candidate)
        else:
            refusals[candidate.settings.name] = reason
    shift = turn % len(eligible) if eligible else 0
    rotated = eligible[shift:] + eligible[:shift]

    def share(candidate: Candidate) -> float:
        weight = max(candidate.status.weight, 0.01)
        if group.policy == "weighted":
            return -float(draw() ** (1 / weight))
        if group.policy == "round-robin":
            return 0.0
        return (candidate.in_use + 1) / weight

    def rank(candidate: Candidate) -> tuple[bool, bool, float]:
        return candidate.settings.backup, _falls_back(group, candidate), share(candidate)

    return Route(tuple(c.settings.index for c in sorted(rotated, key=rank)), refusals)
