"""Measure two or more things in alternating rounds and say how sure the ratios are."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

ROUNDS = 11


@dataclass(frozen=True, slots=True)
class Quartiles:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


Measured = dict[str, list[float]]
Found = TypeVar("Found")


def alternate(measures: Mapping[str, Callable[[], Found]], rounds: int = ROUNDS) -> dict[str, list[Found]]:
    """Call every measure once a round, in an order that turns, after one round that does not count."""
    names = list(measures)
    found: dict[str, list[Found]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            value = measures[name]()
            if number:
                found[name].append(value)
    return found


def ratio(found: Measured, one: str, other: str) -> Quartiles:
    """Return one / other, round by round."""
    return Quartiles.of([a / b for a, b in zip(found[one], found[other], strict=True)])


def noise(values: Sequence[float]) -> str:
    """Say how much a figure that should be constant moved."""
    spread = Quartiles.of(values)
    return f"{(spread.high - spread.low) / spread.median:.0%} between quartiles"


def pin(cpu: int | None) -> None:
    """Bind this process, and what it starts, to one CPU; None: to all that it may use."""
    os.sched_setaffinity(0, {cpu} if cpu is not None else _ALL)


_ALL = os.sched_getaffinity(0)
