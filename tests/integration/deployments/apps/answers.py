"""What the applications of these tests have in common: they keep a connection busy and say which one it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs

Hold = Callable[[float], int]


def chosen_hold() -> Hold:
    """Return the `hold` of the module that environment variable HOLD names: one interface's way to run a query."""
    hold: Hold = import_module(f"{__package__}.{os.environ['HOLD']}").hold
    return hold


def answer(hold: Hold, query: str) -> dict[str, Any]:
    """Run a query that takes `ms` at the server; return which process and which session it was."""
    seconds = float(parse_qs(query).get("ms", ["1"])[0]) / 1000
    return {"session": hold(seconds), **health()}


def health() -> dict[str, Any]:
    """Say which process answers, without a connection."""
    return {"worker": os.getpid()}
