"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    within: float = 5.0,
    every: float = 0.01,
    what: str | Callable[[], str] = "",
) -> None:
    """Return as soon as `condition()` is true, looking at least twice.

    Args: `within` and `every` in seconds; `what` describes the condition, or computes a
    description of what was found instead, once time is up.
    Raises AssertionError with the description; what `condition` raises passes through.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() >= deadline:
            if condition():
                return
            found = what() if callable(what) else what
            name = getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"not true within {within:g} s: {found or name}")
        time.sleep(every)
