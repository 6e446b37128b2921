"""Choose endpoints for a group: pure, no I/O, no clock.

`eligible` is derived here and stored nowhere.  Health is advice: with a stale coordinator DOWN, roles, lag and the
bound on falling back count as unknown, and whoever opens a connection checks the role on it.

- *Slow* (`max_lag`).  A replica behind the bound is not eligible while the group has any other endpoint.  When it has
  none, the least lagging replica stays: slow is better than nothing.  The primary of a `prefer-replica` group is such
  another endpoint, as long as the group may hold more there.  An unknown lag is no reason.
- *Falling back* (`fallback_connections`).  What a `prefer-replica` group holds on a primary is bounded, lest reads
  push the writes out.  Workers count and then claim, so that several at once may exceed the bound by a few: the caps
  of group and endpoint are the hard ones.  A group with a single endpoint has nothing to fall back from and is
  bounded only where the configuration gives a number.
- *Spare*.  A `backup`, and an endpoint of weight 0, serve only while no other endpoint is eligible or takes
  connections; that the others are full is no reason to use them.
- *Last resort*.  Where nothing is eligible, endpoints that only the probes' verdict keeps out, which may be wrong:
  workers try them for themselves now and then.  What their role was when they were seen last counts for the order.
- *Shares*.  Among equals, new connections follow the weights: by use (least-connections), by turns spread evenly
  (round-robin), by chance (weighted).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
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
    spare: frozenset[int] = frozenset()  # those in `order` to be tried only if none of the others serves
    last_resort: tuple[int, ...] = ()  # where `order` is empty: those that are DOWN and no more than that


def _nothing_held(_endpoint: int) -> int:
    return 0


def is_role_allowed(target: Target, role: Role) -> bool:
    """Whether a connection to a server in this role may serve a group with this target."""
    return role is Role.UNKNOWN or role in _WANTED[target]


def refusal(group: GroupSettings, candidate: Candidate, is_stale: bool) -> str | None:
    """Return why an endpoint is not eligible for a group, whatever the others are, None if it is."""
    return _standing(group, candidate, is_stale) or (None if is_stale else slowness(group, candidate))


def _standing(group: GroupSettings, candidate: Candidate, is_stale: bool) -> str | None:
    """Return why an endpoint is not eligible for a group, but for its lag; None if it is."""
    reason = _exclusion(group, candidate)
    if reason is not None or is_stale:
        return reason
    status = candidate.status
    if status.health is Health.DOWN:
        return f"DOWN ({status.verdict.name.lower()})"
    if not is_role_allowed(group.target, status.role):
        return f"is a {status.role.name.lower()}, the group wants {group.target}"
    return None


def _exclusion(group: GroupSettings, candidate: Candidate) -> str | None:
    """Return why an endpoint must not be used by a group, whatever its server says; None if it may be."""
    status = candidate.status
    if group.endpoints and candidate.settings.name not in group.endpoints:
        return "not among the group's endpoints"
    if status.epoch == 0:
        return "not in the segment yet"
    if status.admin is not Admin.READY:
        return f"{status.admin.name.lower()} by its administrators"
    if status.verdict is Verdict.ROLE_CONFLICT:
        return "claims to be the primary, as another one of its cluster does"
    return None


def slowness(group: GroupSettings, candidate: Candidate) -> str | None:
    """Return by how much a replica lags more than the group allows, None if it does not."""
    if candidate.status.role is not Role.REPLICA:
        return None
    lag_limit = group.max_lag_s
    if lag_limit is not None and (candidate.lag_s or 0.0) > lag_limit:
        return f"lags {candidate.lag_s:.1f} s, the group allows {lag_limit:g} s"
    byte_limit = group.max_lag_bytes
    if byte_limit is not None and (candidate.lag_bytes or 0) > byte_limit:
        return f"lags {candidate.lag_bytes} bytes, the group allows {byte_limit}"
    return None


def is_spare(candidate: Candidate) -> bool:
    """Whether an endpoint gets nothing while another one is eligible."""
    return candidate.settings.backup or candidate.status.weight == 0


def is_second_choice(group: GroupSettings, candidate: Candidate) -> bool:
    """Whether an endpoint serves the group only for want of a better one: a spare, or the primary for its reads."""
    return is_spare(candidate) or _falls_back(group, candidate)


def _falls_back(group: GroupSettings, candidate: Candidate) -> bool:
    return group.target == "prefer-replica" and candidate.status.role is Role.PRIMARY


def fallback_bound(
    group: GroupSettings,
    endpoint: EndpointSettings,
    endpoints: Sequence[EndpointSettings],
    groups: Sequence[GroupSettings],
) -> int | None:
    """Return how many connections a prefer-replica group may hold at an endpoint that is a primary; None: no bound.

    Where the configuration gives no number it is half of what the primary groups that may use this endpoint leave of
    its cap, and at least 1.

    Args:
        endpoints, groups: all of the pool.
    """
    if group.fallback_connections:
        return group.fallback_connections
    if sum(_qualifies(group, other) for other in endpoints) < 2:
        return None
    taken = sum(g.connections for g in groups if g.target == "primary" and _qualifies(g, endpoint))
    return max(1, (endpoint.max_connections - taken) // 2)


def _qualifies(group: GroupSettings, endpoint: EndpointSettings) -> bool:
    return not group.endpoints or endpoint.name in group.endpoints


def is_fallback_spent(
    group: GroupSettings,
    candidates: Sequence[Candidate],
    current: int,
    groups: Sequence[GroupSettings],
    held: Callable[[int], int],
) -> bool:
    """Whether endpoint `current` is a primary where the group holds all that it may.  Args as `choose`."""
    found = [c for c in candidates if c.settings.index == current]
    return any(_overdraft(group, c, candidates, groups, held) is not None for c in found)


def _overdraft(
    group: GroupSettings,
    candidate: Candidate,
    candidates: Sequence[Candidate],
    groups: Sequence[GroupSettings],
    held: Callable[[int], int],
) -> str | None:
    """Return why the group may hold no more at a primary, None if it may or if this is none."""
    if not _falls_back(group, candidate):
        return None
    bound = fallback_bound(group, candidate.settings, [c.settings for c in candidates], groups)
    if bound is None or candidate.in_use < bound:  # not in use, not held: counting is spared
        return None
    count = held(candidate.settings.index)
    return f"is a primary, where the group holds {count} connections and may hold {bound}" if count >= bound else None


def is_too_slow(
    group: GroupSettings,
    candidates: Sequence[Candidate],
    current: int,
    groups: Sequence[GroupSettings] = (),
    held: Callable[[int], int] = _nothing_held,
) -> bool:
    """Whether endpoint `current` lags too far for its idle connections to be kept.  Args as `choose`.

    While every endpoint that the group may use does, they stay where they are.
    """
    slow = {c.settings.index for c in candidates if slowness(group, c) is not None}
    if current not in slow:
        return False
    return any(index not in slow for index in choose(group, candidates, is_stale=False, groups=groups, held=held).order)


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
    groups: Sequence[GroupSettings] = (),
    held: Callable[[int], int] = _nothing_held,
    turn: int = 0,
    draw: Callable[[], float] = chance,
) -> Route:
    """Order the eligible endpoints by the group's target and policy.

    Args:
        is_stale: the coordinator's heartbeat is too old to believe health and roles.
        groups: all of the pool.
        held: tells how many connections the group holds at an endpoint, on the whole host; asked only where it counts.
        turn: a number that grows with each call, for round-robin.
        draw: a number in [0, 1), for the weighted policy.
    """
    refusals: dict[str, str] = {}
    eligible: list[Candidate] = []
    slow: list[Candidate] = []
    for candidate in candidates:
        reason = _standing(group, candidate, is_stale)
        if reason is None and not is_stale:
            reason = slowness(group, candidate)
            if reason is not None:
                slow.append(candidate)
            else:
                reason = _overdraft(group, candidate, candidates, groups, held)
        if reason is None:
            eligible.append(candidate)
        else:
            refusals[candidate.settings.name] = reason
    if slow and not eligible:
        eligible = [min(slow, key=lambda c: _distance(group, c))]
        del refusals[eligible[0].settings.name]
    if not eligible:
        down = [] if is_stale else [c for c in candidates if _is_worth_trying(group, c, candidates, groups, held)]
        down = sorted(_by_share(group, down, turn, draw), key=lambda c: _hope(group, c))
        return Route((), refusals, last_resort=tuple(c.settings.index for c in down))
    last = [c for c in eligible if is_spare(c)]
    if len(last) == len(eligible):
        last = [c for c in eligible if c.status.weight == 0]
    spare = frozenset(c.settings.index for c in last) if len(last) < len(eligible) else frozenset()
    ordered = sorted(_by_share(group, eligible, turn, draw), key=lambda c: _rank(group, c))
    return Route(tuple(c.settings.index for c in ordered), refusals, spare)


def _is_worth_trying(
    group: GroupSettings,
    candidate: Candidate,
    candidates: Sequence[Candidate],
    groups: Sequence[GroupSettings],
    held: Callable[[int], int],
) -> bool:
    """Whether nothing but being DOWN keeps an endpoint out; a role that was seen before that is old."""
    return (
        candidate.status.health is Health.DOWN
        and _exclusion(group, candidate) is None
        and _overdraft(group, candidate, candidates, groups, held) is None
    )


def _hope(group: GroupSettings, candidate: Candidate) -> tuple[bool, bool, bool, bool]:
    """Return the order of endpoints that are DOWN; the lesser is the better."""
    return not is_role_allowed(group.target, candidate.status.role), *_rank(group, candidate)


def _rank(group: GroupSettings, candidate: Candidate) -> tuple[bool, bool, bool]:
    """Return what comes before the policy; the lesser is the better."""
    return candidate.status.weight == 0, candidate.settings.backup, _falls_back(group, candidate)


def _distance(group: GroupSettings, candidate: Candidate) -> float:
    """Return how far a replica is behind, as the group counts it."""
    return (candidate.lag_bytes if group.max_lag_s is None else candidate.lag_s) or 0.0


def _by_share(
    group: GroupSettings, eligible: Sequence[Candidate], turn: int, draw: Callable[[], float]
) -> list[Candidate]:
    """Order endpoints by the group's policy alone."""
    if group.policy == "round-robin":
        return _in_turn(group, eligible, turn)
    if group.policy == "weighted":
        return sorted(eligible, key=lambda c: -(draw() ** (1 / max(c.status.weight, 1))))
    shift = turn % len(eligible) if eligible else 0
    return sorted([*eligible[shift:], *eligible[:shift]], key=lambda c: (c.in_use + 1) / max(c.status.weight, 1))


def _in_turn(group: GroupSettings, eligible: Sequence[Candidate], turn: int) -> list[Candidate]:
    """Order endpoints by whose turn it is, each rank of preference with turns of its own, spread by weight."""
    ordered: list[Candidate] = []
    for rank in sorted({_rank(group, c) for c in eligible}):
        equals = [c for c in eligible if _rank(group, c) == rank]
        common = gcd(*(c.status.weight for c in equals)) or 1
        turns = sorted(
            ((nth + 0.5) / weight, at)
            for at, weight in enumerate(max(1, c.status.weight // common) for c in equals)
            for nth in range(weight)
        )
        first = turn % len(turns) if turns else 0
        ordered += [equals[at] for at in dict.fromkeys(at for _, at in turns[first:] + turns[:first])]
    return ordered
