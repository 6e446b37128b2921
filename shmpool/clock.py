"""The clock: CLOCK_MONOTONIC for deadlines and for every time in the segment; one reading serves all processes.

It stands still while the machine sleeps, which CLOCK_BOOTTIME does not: `slept` tells whether a connection's peer may
have forgotten it meanwhile.  The monotonic clock is the one that Python reads without building arguments, and the
warm checkout reads it once.
"""

from __future__ import annotations

from time import CLOCK_BOOTTIME, clock_gettime, monotonic

__all__ = ["monotonic", "slept"]


def slept() -> float:
    """Return how many seconds this machine has been suspended since it booted."""
    return clock_gettime(CLOCK_BOOTTIME) - monotonic()
