"""How a value is written in the file: quantities, names, choices; each says what was expected instead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from shmpool.names import POOL_NAME

MAX_PERMITS: Final = 65_535  # a control word counts in 16 bits
MAX_SERVER_TIMEOUT_S: Final = 2_147_483  # the server counts milliseconds in an int
MIN_DURATION_S: Final = 0.001  # the server's resolution, where 0 would mean off
NAME_EXPECTED: Final = "a name of 1 to 32 lower-case letters, digits, _ and -, that starts with a letter or digit"
DURATION_UNITS_S: Final[Mapping[str, float]] = {
    "ms": 0.001,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
SIZE_UNITS: Final[Mapping[str, int]] = {
    "B": 1,
    "kB": 1 << 10,
    "KB": 1 << 10,
    "MB": 1 << 20,
    "GB": 1 << 30,
    "TB": 1 << 40,
}
MAX_NUMBER: Final = 1e15
QUANTITY: Final = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*")
SETTING_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MaxLag:
    """How far a replica may be behind: in bytes or in seconds, or (both None) without bound."""

    bytes: int | None = None
    seconds: float | None = None


def expecting(expected: str, convert: Callable[[Any], T | None]) -> PlainValidator:
    """Accept what `convert` does not turn into None; else say what was expected."""

    def validate(value: Any) -> T:
        converted = convert(value)
        if converted is None:
            raise PydanticCustomError("expected", "{expected}", {"expected": expected})
        return converted

    return PlainValidator(validate)


def whole(low: int, high: int) -> PlainValidator:
    """Accept a whole number from `low` to `high`."""

    def convert(value: Any) -> int | None:
        return value if type(value) is int and low <= value <= high else None

    return expecting(f"a whole number from {low} to {high}", convert)


def choice(*choices: str) -> PlainValidator:
    """Accept one of some texts."""

    def convert(value: Any) -> str | None:
        return value if isinstance(value, str) and value in choices else None

    return expecting("one of " + ", ".join(f'"{c}"' for c in choices), convert)


def _plain_text(value: Any) -> str | None:
    return value if isinstance(value, str) and (value.isprintable() or not value) else None


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if abs(value) < MAX_NUMBER else None
    match = QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in DURATION_UNITS_S:
        return None
    return float(match[1]) * DURATION_UNITS_S[match[2]]


def _size(value: Any) -> int | None:
    match = QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in SIZE_UNITS:
        return None
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def _duration(low: float, high: float = math.inf) -> PlainValidator:
    def convert(value: Any) -> float | None:
        seconds = _seconds(value)
        return seconds if seconds is not None and low <= seconds <= high else None

    bound = "" if low == 0 else f", at least {duration_text(low)}"
    return expecting(f'a duration such as "30s" or "500ms"{bound}', convert)


def _optional_duration(high: float = math.inf) -> PlainValidator:
    most = "" if high == math.inf else f" and at most {high:g} s"
    expected = f'a duration such as "30s", at least {duration_text(MIN_DURATION_S)}{most}, or "" for off'

    def validate(value: Any) -> float | None:
        if value == "":
            return None
        seconds = _seconds(value)
        if seconds is None or not MIN_DURATION_S <= seconds <= high:
            raise PydanticCustomError("expected", "{expected}", {"expected": expected})
        return seconds

    return PlainValidator(validate)


def _max_lag(value: Any) -> MaxLag | None:
    if isinstance(value, MaxLag):
        return value
    if value == "":
        return MaxLag()
    if not isinstance(value, str):
        return None
    size, seconds = _size(value), _seconds(value)
    return None if size is None and seconds is None else MaxLag(size, seconds)


def _mode(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"0o?[0-7]{3}", value):
        value = int(value.replace("o", ""), 8)
    return value if type(value) is int and value in (0o600, 0o660) else None


def _texts(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list | tuple):
        return None
    texts = tuple(_plain_text(item) for item in value)
    return None if None in texts else tuple(text for text in texts if text is not None)


def _server_settings(value: Any) -> dict[str, str] | None:
    if not isinstance(value, Mapping):
        return None
    settings = {}
    for name, setting in value.items():
        if not SETTING_NAME.fullmatch(name):
            return None
        if isinstance(setting, bool):
            settings[name] = "on" if setting else "off"
        elif isinstance(setting, int | float):
            settings[name] = f"{setting}"
        elif _plain_text(setting) is not None:
            settings[name] = setting
        else:
            return None
    return settings


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _path(value: Any) -> str | None:
    text = _plain_text(value)
    return text if text == "" or (text is not None and text.startswith("/")) else None


def _variable(value: Any) -> str | None:
    text = _plain_text(value)
    return text if text == "" or (text is not None and VARIABLE_NAME.fullmatch(text)) else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and POOL_NAME.fullmatch(value) else None


def duration_text(seconds: float) -> str:
    """Return a duration as a person would write it in the file."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % DURATION_UNITS_S[unit] == 0:
            return f"{seconds / DURATION_UNITS_S[unit]:g}{unit}"
    return f"{seconds:g}s"


Flag = Annotated[bool, expecting("true or false", _flag)]
Text = Annotated[str, expecting("a text of printable characters", _plain_text)]
Texts = Annotated[tuple[str, ...], expecting("a list of texts", _texts)]
Permits = Annotated[int, whole(1, MAX_PERMITS)]
Count = Annotated[int, whole(0, MAX_PERMITS)]
Streak = Annotated[int, whole(1, 100)]
Duration = Annotated[float, _duration(MIN_DURATION_S)]
DurationOrZero = Annotated[float, _duration(0)]
DurationOrOff = Annotated[float | None, _optional_duration()]
ServerTimeout = Annotated[float | None, _optional_duration(MAX_SERVER_TIMEOUT_S)]
FileMode = Annotated[int, expecting("0o600, or with a group 0o660", _mode)]
AbsolutePath = Annotated[
    str,
    expecting("an absolute path (workers and coordinator start in different places)", _path),
]
VariableName = Annotated[str, expecting("the name of a variable", _variable)]
Name = Annotated[str, expecting(NAME_EXPECTED, _name)]
LagBound = Annotated[MaxLag, expecting('a size such as "16MB", a duration such as "5s", or ""', _max_lag)]
FlagOrDefault = Annotated[bool | None, expecting("true or false", _flag)]
ServerSettings = Annotated[
    Mapping[str, str],
    expecting("a table of server settings with texts, numbers or flags", _server_settings),
]
