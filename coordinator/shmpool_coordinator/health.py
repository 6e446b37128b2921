"""Rise and fall: what a probe's result makes of an endpoint's health and role.

Pure: no I/O, takes `now`.

    UNKNOWN ──(1 good)────▶ UP ◀──(`rise` good, or served a worker)── DOWN
       └───(`fall` bad, or STARTING)──▶ DOWN ◀──(`fall` bad, or STARTING)── UP

Guarantees.
- Rise and fall rule health only; a role acts on the first probe that shows it, and stays while
  probes are not answered.  An answer without a role is that of a name of several servers: it has none.
- No endpoint becomes UP without an answer from its server, to a probe or to a worker, nor DOWN but
  by `fall` bad probes in a row, by one that is refused just after workers lost it, or by a server
  that says itself that it does not take connections.
- FULL and MISCONFIGURED never count for fall: a server that refuses one client is alive.
Assumptions.
- `now` never goes back (monotonic seconds), and results are passed in the order of their probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol, Self

from shmpool.states import Health, Role, Verdict


class ProbeSettings(Protocol):
    """The part of `[probe]` that rules health; durations in seconds."""

    @property
    def inter(self) -> float: ...
    @property
    def fastinter(self) -> float: ...
    @property
    def downinter(self) -> float: ...
    @property
    def rise(self) -> int: ...
    @property
    def fall(self) -> int: ...


class Sign(Enum):
    """What a verdict says about taking connections."""

    GOOD = "good"  # the server answered and takes connections: counts for rise
    BAD = "bad"  # no answer that can be used: counts for fall
    CLOSED = "closed"  # the server says itself that it takes none: no need to count
    NEITHER = "neither"  # the server is alive, but the probe could not look: ends both counts


class After(Enum):
    """How many signs of a kind in a row a move takes."""

    ONE = "one"
    RISE = "rise"
    FALL = "fall"


SIGN_OF_VERDICT: Final[Mapping[Verdict, Sign]] = {
    Verdict.OK: Sign.GOOD,
    Verdict.FULL: Sign.GOOD,
    Verdict.REFUSED: Sign.BAD,
    Verdict.TIMEOUT: Sign.BAD,
    Verdict.LOST: Sign.BAD,
    Verdict.ERROR: Sign.BAD,
    Verdict.STARTING: Sign.CLOSED,
    Verdict.MISCONFIGURED: Sign.NEITHER,
    Verdict.ROLE_CONFLICT: Sign.NEITHER,
}

# Every move there is; a pair that is not here changes nothing.
MOVES: Final[Mapping[tuple[Health, Sign], tuple[After, Health]]] = {
    (Health.UNKNOWN, Sign.GOOD): (After.ONE, Health.UP),  # a start does not wait for rise
    (Health.UNKNOWN, Sign.BAD): (After.FALL, Health.DOWN),
    (Health.UNKNOWN, Sign.CLOSED): (After.ONE, Health.DOWN),
    (Health.UP, Sign.BAD): (After.FALL, Health.DOWN),
    (Health.UP, Sign.CLOSED): (After.ONE, Health.DOWN),
    (Health.DOWN, Sign.GOOD): (After.RISE, Health.UP),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one check saw.  Fields that the server did not tell are None.

    `lsn` is the current position of a primary and the replay position of a replica, in bytes.
     `lag_bytes` is what a replica has received and not replayed; how far it is behind its primary
    takes both endpoints' `lsn`. `lag_s` is the age of the last replayed transaction by the
    replica's clock: it grows on an idle primary. `started_at` is the server's own wall clock in
    seconds; compare it only for equality.
    """

    verdict: Verdict
    role: Role = Role.UNKNOWN
    read_only: bool | None = None
    latency_s: float | None = None
    lsn: int | None = None
    lag_bytes: int | None = None
    lag_s: float | None = None
    timeline: int | None = None
    system_identifier: int | None = None
    started_at: float | None = None
    server_version: int | None = None
    max_connections: int | None = None
    address: str | None = None  # to compare it: what the host's name led to, and the server's own
    error: str = ""
    asked_at: float | None = None  # monotonic, before the server answered

    def of_any_server(self) -> Self:
        """Return what holds for every server behind a name, not for the one alone that answered."""
        return replace(
            self,
            role=Role.UNKNOWN,
            read_only=None,
            lsn=None,
            lag_bytes=None,
            lag_s=None,
            timeline=None,
            system_identifier=None,
            started_at=None,
            address=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointHealth:
    """What is known of an endpoint.  Times are monotonic seconds.

    `good` and `bad` count signs in a row; `since` is when health last changed; a fresh one is due
    at once.
    """

    health: Health = Health.UNKNOWN
    role: Role = Role.UNKNOWN
    read_only: bool = False
    good: int = 0
    bad: int = 0
    since: float = 0.0
    verdict: Verdict = Verdict.NONE
    error: str = ""
    last_probe: float | None = None
    next_probe: float = 0.0

    @property
    def is_probe_failing(self) -> bool:
        """Whether probes fail on an endpoint that is not DOWN."""
        return self.health != Health.DOWN and self.bad > 0

    @property
    def is_degraded(self) -> bool:
        """Whether an endpoint that is not DOWN did not answer its last probe plainly."""
        return self.health != Health.DOWN and self.verdict not in (Verdict.NONE, Verdict.OK)


def advance(
    state: EndpointHealth,
    result: ProbeResult,
    settings: ProbeSettings,
    now: float,
    *,
    jitter: float = 0.0,
    is_used: bool = False,
    is_reported: bool = False,
    is_urgent: bool = False,
) -> EndpointHealth:
    """Return the state after one probe.

    Args:
        state: the state before.
        result: what the probe saw.
        settings: counts and intervals.
        now: monotonic seconds, when the probe ended.
        jitter: a random part of the interval to add, -0.1..0.1.
        is_used: workers used the endpoint with success since its last probe; bad probes alone do
            not take it out, and what is DOWN comes back whatever the probe failed for.
        is_reported: workers lost the endpoint a moment ago; a refused probe confirms it and is not
            counted.
        is_urgent: a role is vacant or evidence came in: the next probe follows after `fastinter`.

    Raises:
        ValueError: the result's verdict is NONE.
    """
    if result.verdict not in SIGN_OF_VERDICT:
        raise ValueError(f"found a probe result with verdict {result.verdict!r}, expected a seen one")
    sign = SIGN_OF_VERDICT[result.verdict]
    good = state.good + 1 if sign is Sign.GOOD else 0
    bad = state.bad + 1 if sign is Sign.BAD else 0
    counted = settings.fall if is_reported and result.verdict is Verdict.REFUSED else bad
    health = _moved(state.health, sign, good, counted, settings, is_used=is_used)
    moved = health != state.health
    changed = replace(
        state,
        health=health,
        role=result.role if result.verdict is Verdict.OK else state.role,
        read_only=state.read_only if result.read_only is None else result.read_only,
        good=0 if moved else good,
        bad=0 if moved else bad,
        since=now if moved else state.since,
        verdict=result.verdict,
        error=result.error,
        last_probe=now,
    )
    interval = settings.fastinter if is_urgent else _interval(changed, settings)
    return replace(changed, next_probe=now + interval * (1.0 + jitter))


def serving(state: EndpointHealth, role: Role, now: float) -> EndpointHealth:
    """Return the state after a worker got a connection, to a server in this role, whatever the probes say.

    The verdict stays: it takes `fall` bad probes, while nobody uses it with success, to take the endpoint out again.
    """
    role = state.role if role is Role.UNKNOWN else role
    return replace(state, health=Health.UP, role=role, good=0, bad=0, since=now, next_probe=min(state.next_probe, now))


def hasten(state: EndpointHealth, at: float) -> EndpointHealth:
    """Return the state with its next probe at `at`, or earlier where it was due earlier."""
    return replace(state, next_probe=min(state.next_probe, at))


def _moved(health: Health, sign: Sign, good: int, bad: int, settings: ProbeSettings, *, is_used: bool) -> Health:
    if is_used and health is Health.DOWN and sign in (Sign.BAD, Sign.NEITHER):
        return Health.UP
    move = MOVES.get((health, sign))
    if move is None or (sign is Sign.BAD and is_used):
        return health
    after, target = move
    needed = {After.ONE: 1, After.RISE: settings.rise, After.FALL: settings.fall}[after]
    seen = {Sign.GOOD: good, Sign.BAD: bad, Sign.CLOSED: 1, Sign.NEITHER: 0}[sign]
    return target if seen >= needed else health


def _interval(state: EndpointHealth, settings: ProbeSettings) -> float:
    """Return the pause that fits: a state is changing while a count runs against its health."""
    if state.health == Health.DOWN:
        changing = state.good > 0 or state.verdict == Verdict.STARTING
        return settings.fastinter if changing else settings.downinter
    return settings.fastinter if state.bad > 0 else settings.inter
