"""Chance, for jitter and weights: differs between processes that were forked from one, needs no state."""

from __future__ import annotations

import os


def chance() -> float:
    """Return a number in [0, 1)."""
    return int.from_bytes(os.urandom(4), "little") / (1 << 32)
