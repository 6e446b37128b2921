"""Which faults happen when: computed beforehand from a seed, so that a run can be repeated.

What the faults hit is not repeatable (processes run as they like), but when they come and whom they are aimed at is.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

ENDPOINT_CAPS: Final = {"pg1": (5, 10), "pg2": (4, 8)}  # least and most that is ever configured
GROUP_CAPS: Final = {"read": (6, 12), "write": (3, 7)}

FaultKind = Literal[
    "kill", "stop", "caps", "kill coordinator", "stop coordinator", "terminate backends", "restart server"
]


class Caps(NamedTuple):
    """What the configuration file says at one time, by name."""

    endpoints: Mapping[str, int]
    groups: Mapping[str, int]

    @classmethod
    def most(cls) -> Caps:
        """Return the largest that is ever configured."""
        return cls({k: most for k, (_, most) in ENDPOINT_CAPS.items()}, {k: m for k, (_, m) in GROUP_CAPS.items()})

    @classmethod
    def drawn(cls, rng: random.Random) -> Caps:
        """Return caps at random."""
        return cls(
            {k: rng.randint(*bounds) for k, bounds in ENDPOINT_CAPS.items()},
            {k: rng.randint(*bounds) for k, bounds in GROUP_CAPS.items()},
        )


class Fault(NamedTuple):
    """One thing that is done to somebody.  Times in seconds since the run began."""

    at: float
    kind: FaultKind
    worker: int = -1
    seconds: float = 0.0  # how long a stop lasts
    caps: Caps | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """How often each fault happens, per second; 0: never."""

    name: str
    kills: float
    stops: float
    caps: float
    coordinator_kills: float = 0.0
    coordinator_stops: float = 0.0
    backend_ends: float = 0.0
    server_restarts: float = 0.0

    def with_server_faults(self) -> Scenario:
        """Return the same with ended backends and a standby that is restarted now and then."""
        return replace(self, backend_ends=1.0, server_restarts=1 / 20)


SCENARIOS: Final = {
    "a": Scenario("a", kills=42, stops=3, caps=2),
    "b": Scenario("b", kills=6, stops=4, caps=4, coordinator_kills=0.5, coordinator_stops=0.4),
}


def faults(scenario: Scenario, seed: int, seconds: float, workers: int) -> list[Fault]:
    """Return the faults of a run in their order; the same for the same arguments."""
    rng = random.Random(f"faults {seed}")
    found = [Fault(at, "kill", worker=rng.randrange(workers)) for at in _times(rng, scenario.kills, seconds)]
    found += [
        Fault(at, "stop", worker=rng.randrange(workers), seconds=rng.uniform(0.02, 0.3))
        for at in _times(rng, scenario.stops, seconds)
    ]
    found += [Fault(at, "caps", caps=Caps.drawn(rng)) for at in _times(rng, scenario.caps, seconds)]
    found += [Fault(at, "kill coordinator") for at in _times(rng, scenario.coordinator_kills, seconds)]
    found += [
        Fault(at, "stop coordinator", seconds=rng.uniform(0.05, 0.5))
        for at in _times(rng, scenario.coordinator_stops, seconds)
    ]
    found += [Fault(at, "terminate backends") for at in _times(rng, scenario.backend_ends, seconds)]
    found += [Fault(at, "restart server") for at in _times(rng, scenario.server_restarts, seconds)]
    return sorted(found, key=lambda fault: fault.at)


def _times(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """One moment in each period of 1 / rate seconds."""
    for period in range(int(rate * seconds)):
        yield (period + rng.random()) / rate


def digest(schedule: list[Fault]) -> str:
    """Return a short name of a schedule: equal for equal runs."""
    return hashlib.sha256(repr(schedule).encode()).hexdigest()[:12]
