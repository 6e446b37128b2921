"""pgdbpool's configuration dictionary: checked as a whole, turned into frozen settings.

The dictionary is only read: it may be used again, shared by several scripts of one interpreter, or be constant.
Defaults and units are those that pgdbpool 1.0 acts on; docs/pgdbpool.md says where its documentation differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from shmpool.pgdbpool.errors import DBConfigurationError

THREADED: Final = "threaded"
NON_THREADED: Final = "non-threaded"
SHARED: Final = "shared"
TYPES: Final = (THREADED, NON_THREADED, SHARED)

_SSL_WORDS: Final = {False: "disable", "off": "disable", True: "require", "on": "require"}
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_REQUIRED: Final = object()


class EndpointSettings(NamedTuple):
    """One entry of `db`."""

    host: str | None
    name: str | None
    user: str | None
    password: str | None
    ssl: str
    connect_timeout: int  # seconds
    connection_retry_sleep: float  # seconds
    query_timeout: int  # milliseconds
    session_tmp_buffer: int  # megabytes
    port: int | None

    @property
    def label(self) -> str:
        """What messages call it."""
        where = self.host or "the default host"
        return f"{self.name!r} at {where}" + (f" port {self.port}" if self.port else "")

    def __repr__(self) -> str:
        return f"<EndpointSettings {self.label}>"  # without the password


class GroupSettings(NamedTuple):
    """One entry of `groups`."""

    name: str
    connection_count: int
    autocommit: bool
    sqlprepare: bool
    timeout: float  # seconds that a handler waits at most, for a connection and for a server together


class Settings(NamedTuple):
    """A whole configuration."""

    type: str
    endpoints: tuple[EndpointSettings, ...]
    groups: Mapping[str, GroupSettings]
    linger: float  # seconds; type 'shared' only


class _Key(NamedTuple):
    expected: str
    convert: Callable[[Any], Any]  # raises ValueError if it is something else
    default: Any = _REQUIRED
    is_secret: bool = False


def parse(config: object) -> Settings:
    """Check a configuration dictionary and return its settings; it is not changed.

    Raises:
        DBConfigurationError: names every key that is wrong, with what was found and what is expected.
    """
    problems: list[str] = []
    whole = _read("configuration", config, _ROOT_KEYS, problems)
    given = whole.get("db", {})
    entries = [given] if isinstance(given, Mapping) else list(given)
    where = "db" if isinstance(given, Mapping) else "db[{}]"
    endpoints = [_read(where.format(n), entry, _ENDPOINT_KEYS, problems) for n, entry in enumerate(entries)]
    groups = {
        name: _read(f"groups[{name!r}]", group, _GROUP_KEYS, problems)
        for name, group in whole.get("groups", {}).items()
    }
    if problems:
        raise DBConfigurationError(problems)
    return Settings(
        whole["type"],
        tuple(EndpointSettings(password=endpoint.pop("pass"), **endpoint) for endpoint in endpoints),
        MappingProxyType(
            {name: GroupSettings(name=name, **_without(group, _INTERNAL_KEYS)) for name, group in groups.items()}
        ),
        whole["linger"],
    )


def _read(where: str, given: object, keys: Mapping[str, _Key], problems: list[str]) -> dict[str, Any]:
    """Return the converted values, defaults included, as far as they are right."""
    if not isinstance(given, Mapping):
        problems.append(f"{where}: found {_shown(given)}, expected a dictionary")
        return {}
    known = ", ".join(name for name in keys if name not in _INTERNAL_KEYS)
    problems += [f"{where}: found the key {name!r}, expected one of {known}" for name in given if name not in keys]
    values = {}
    for name, key in keys.items():
        value = given.get(name, key.default)
        if value is _REQUIRED:
            problems.append(f"{where}: found no key {name!r}, expected {key.expected}")
            continue
        try:
            values[name] = key.convert(value)
        except ValueError:
            found = f"a value of type {type(value).__name__}" if key.is_secret else _shown(value)
            problems.append(f"{where}: found {name} = {found}, expected {key.expected}")
    return values


def _shown(value: object) -> str:
    """Show a value; what is inside a collection may be a password."""
    return repr(value) if isinstance(value, str | int | float | None) else f"a value of type {type(value).__name__}"


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError


def _whole(least: int, value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if type(value) is int and value >= least:
        return value
    raise ValueError


def _seconds(value: Any) -> float:
    if type(value) in (int, float) and value >= 0:
        return float(value)
    raise ValueError


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError


def _ssl(value: Any) -> str:
    if isinstance(value, str | bool):
        mode = _SSL_WORDS.get(value, value)
        if mode in _SSL_MODES:
            return str(mode)
    raise ValueError


def _type(value: Any) -> str:
    if value in TYPES:
        return str(value)
    raise ValueError


def _db(value: Any) -> Any:
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and value):
        return value
    raise ValueError


def _groups(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return value
    raise ValueError


_ROOT_KEYS: Final = {
    "type": _Key(" or ".join(map(repr, TYPES)), _type, THREADED),
    "db": _Key("a dictionary, or a list of at least one", _db),
    "groups": _Key("a dictionary of groups by name", _groups),
    "linger": _Key("a number of seconds", _seconds, 30),
}

_ENDPOINT_KEYS: Final = {
    "host": _Key("a text", _text),
    "name": _Key("a text", _text),
    "user": _Key("a text", _text),
    "pass": _Key("a text", _text, is_secret=True),
    "ssl": _Key(f"True, False or one of {', '.join(_SSL_MODES)}", _ssl, "disable"),
    "connect_timeout": _Key("a whole number of seconds", lambda value: _whole(0, value), 10),
    "connection_retry_sleep": _Key("a number of seconds", _seconds, 1),
    "query_timeout": _Key("a whole number of milliseconds", lambda value: _whole(0, value), 5000),
    "session_tmp_buffer": _Key("a whole number of megabytes, 1 or more", lambda value: _whole(1, value), 128),
    "port": _Key("a port number, or None", lambda value: None if value is None else _whole(1, value), None),
}

_INTERNAL_KEYS: Final = ("connections", "connection_iter")  # pgdbpool writes them into the dictionary

_GROUP_KEYS: Final = {
    "connection_count": _Key("a whole number, 1 or more", lambda value: _whole(1, value)),
    "autocommit": _Key("True or False", _flag, False),
    "sqlprepare": _Key("True or False", _flag, False),
    "timeout": _Key("a number of seconds", _seconds, 30),
} | {name: _Key("anything", lambda value: value, None) for name in _INTERNAL_KEYS}
