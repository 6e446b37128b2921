"""What is wrong with a configuration: a line for each finding, `key.path: found X, expected Y`.

No line shows a conninfo or a credential: people write passwords in the wrong places.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from shmpool_coordinator.config.tables import Config


class ConfigError(ValueError):
    """The configuration cannot be used.  `findings` has a line for each reason."""

    def __init__(self, source: str, findings: tuple[str, ...]) -> None:
        self.source = source
        self.findings = findings
        if len(findings) == 1:
            message = f"{source}: {findings[0]}"
        else:
            message = "\n  ".join((f"{source}: {len(findings)} errors", *findings))
        super().__init__(message)


class Finding(NamedTuple):
    """One thing that is wrong: where, what is there, what should be."""

    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}"


def finding_of(details: ErrorDetails) -> Finding:
    """Return what pydantic found wrong with a table or a value."""
    loc = details["loc"]
    path = ".".join(map(str, loc)) or "the file"
    kind, value = details["type"], details["input"]
    if kind == "missing":
        return Finding(path, "nothing", "a value, this key is required")
    if kind == "extra_forbidden":
        known = list(_table_at(loc[:-1]).model_fields)
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        if close:
            return Finding(path, "an unknown key", f'a known one; did you mean "{close[0]}"?')
        return Finding(path, "an unknown key", "one of " + ", ".join(known))
    if kind == "expected":
        return Finding(path, _shown(loc, value), details["msg"])
    return Finding(path, _kind_text(value), "a table")


def _shown(loc: tuple[int | str, ...], value: Any) -> str:
    """Return a value for a message; where people put passwords, only what kind of value it is."""
    if isinstance(value, list | dict) or {"conninfo", "credentials"} & set(loc):
        return _kind_text(value)
    if loc == ("access", "mode") and type(value) is int:
        return f"{value:#o}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _kind_text(value: Any) -> str:
    kinds = {str: "a text", list: "a list", dict: "a table", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _table_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model of the table at a place in the file."""
    table: type[BaseModel] = Config
    parts = iter(loc)
    for part in parts:
        annotation = table.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            next(parts, None)  # the name of an endpoint or a group
            annotation = get_args(annotation)[1]
        table = annotation
    return table
