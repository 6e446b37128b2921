"""The configuration file: TOML, validated, frozen.  The one home of every default.

A file is checked as a whole: `ConfigError` tells all that is wrong with it, a line for each
finding, as `key.path: found X, expected Y`.  No message shows a conninfo or a credential: people
write passwords in the wrong places.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from shmpool.names import POOL_NAME
from shmpool.settings import Credentials as CredentialSettings
from shmpool.settings import EndpointSettings, GroupSettings, Policy, PoolSettings, Target
from shmpool_coordinator.probe import make_conninfo, parse_conninfo

CONFIG_VARIABLE: Final = "SHMPOOL_CONFIG"
COORDINATOR_SESSIONS: Final = 2  # at each endpoint, beside its cap
WARM_WORKERS: Final = 4  # a host has more; a warning where so many would leave nothing of a group to others
MAX_PERMITS: Final = 65_535  # a control word counts in 16 bits
MAX_SERVER_TIMEOUT_S: Final = 2_147_483  # the server counts milliseconds in an int
MIN_DURATION_S: Final = 0.001  # the server's resolution, where 0 would mean off
NAME_EXPECTED: Final = "a name of 1 to 32 lower-case letters, digits, _ and -, that starts with a letter or digit"

# Under every conninfo: without them a dead network holds a connect or a query for hours.
CONNECT_DEFAULTS: Final[Mapping[str, str]] = {
    "connect_timeout": "5",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
SECRET_KEYWORDS: Final = frozenset(
    {"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
)
PLACE_KEYWORDS: Final = ("host", "hostaddr", "port", "service", "servicefile")
# Keywords that would work against the pool, and where their purpose is served.
REFUSED_KEYWORDS: Final[Mapping[str, str]] = {
    "application_name": "`application_name` of the group instead: [groups.<name>] application_name",
    "target_session_attrs": "`target` of the group instead: [groups.<name>] target",
}
# Server settings that have a key of their own.
OWN_KEYS: Final[Mapping[str, str]] = {
    "application_name": "application_name",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_session_timeout": "idle_in_transaction_session_timeout",
    "default_transaction_isolation": "isolation_level",
    "default_transaction_read_only": "readonly",
}
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
M = TypeVar("M", bound=BaseModel)


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


@dataclass(frozen=True, slots=True)
class MaxLag:
    """How far a replica may be behind: in bytes or in seconds, or (both None) without bound."""

    bytes: int | None = None
    seconds: float | None = None


# -- Values ------------------------------------------------------------------------------------


def _expecting(expected: str, convert: Callable[[Any], T | None]) -> PlainValidator:
    """Accept what `convert` does not turn into None; else say what was expected."""

    def validate(value: Any) -> T:
        converted = convert(value)
        if converted is None:
            raise PydanticCustomError("expected", "{expected}", {"expected": expected})
        return converted

    return PlainValidator(validate)


def _whole(low: int, high: int) -> PlainValidator:
    def convert(value: Any) -> int | None:
        return value if type(value) is int and low <= value <= high else None

    return _expecting(f"a whole number from {low} to {high}", convert)


def _choice(*choices: str) -> PlainValidator:
    def convert(value: Any) -> str | None:
        return value if isinstance(value, str) and value in choices else None

    return _expecting("one of " + ", ".join(f'"{c}"' for c in choices), convert)


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
    return _expecting(f'a duration such as "30s" or "500ms"{bound}', convert)


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


Flag = Annotated[bool, _expecting("true or false", _flag)]
Text = Annotated[str, _expecting("a text of printable characters", _plain_text)]
Texts = Annotated[tuple[str, ...], _expecting("a list of texts", _texts)]
Permits = Annotated[int, _whole(1, MAX_PERMITS)]
Count = Annotated[int, _whole(0, MAX_PERMITS)]
Streak = Annotated[int, _whole(1, 100)]
Duration = Annotated[float, _duration(MIN_DURATION_S)]
DurationOrZero = Annotated[float, _duration(0)]
DurationOrOff = Annotated[float | None, _optional_duration()]
ServerTimeout = Annotated[float | None, _optional_duration(MAX_SERVER_TIMEOUT_S)]


# -- Tables ------------------------------------------------------------------------------------


class Table(BaseModel):
    """A table of the file: frozen, and without keys that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


# Group settings that are read, checked and published, and that workers of this version do not act on.
NOT_IN_EFFECT: Final = ("leak_after",)


class Limits(Table):
    """Sizes of the segment's tables: masks have 64 bits, indices 8."""

    workers: Annotated[int, _whole(1, 4096)] = 128
    slots_per_worker: Annotated[int, _whole(1, 256)] = 32
    endpoints: Annotated[int, _whole(1, 64)] = 16
    groups: Annotated[int, _whole(1, 64)] = 32


class Access(Table):
    """Who may attach."""

    mode: Annotated[int, _expecting("0o600, or with a group 0o660", _mode)] = 0o600
    group: Text = ""

    @property
    def effective_mode(self) -> int:
        """The mode to create with: a group makes it 0o660."""
        return 0o660 if self.group else self.mode


class CoordinatorOptions(Table):
    """How the coordinator starts, ends and ages; durations in seconds."""

    autostart: Flag = True
    linger: DurationOrZero = 30.0
    stale_after: Duration = 5.0
    orphan_grace: DurationOrZero = 60.0


class Probe(Table):
    """How endpoints are checked; durations in seconds."""

    inter: Duration = 2.0
    fastinter: Duration = 0.5
    downinter: Duration = 5.0
    timeout: Duration = 1.0
    rise: Streak = 2
    fall: Streak = 3
    resolve_every: Duration = 10.0
    conninfo: Text = ""


class Credentials(Table):
    """Where the password is read at each connect: one source, or libpq's own ways."""

    password_file: Annotated[
        str,
        _expecting("an absolute path (workers and coordinator start in different places)", _path),
    ] = ""
    password_command: Texts = ()
    password_env: Annotated[str, _expecting("the name of a variable", _variable)] = ""


class Endpoint(Table):
    """One PostgreSQL server address."""

    conninfo: Text
    max_connections: Permits
    weight: Annotated[int, _whole(0, 100)] = 1
    backup: Flag = False
    address: Annotated[Literal["instance", "service"], _choice("instance", "service")] = "instance"
    via: Annotated[Literal["direct", "pooler"], _choice("direct", "pooler")] = "direct"
    credentials: Credentials = Credentials()

    @property
    def effective_conninfo(self) -> str:
        """The conninfo with the defaults laid under it."""
        return make_conninfo({**CONNECT_DEFAULTS, **parse_conninfo(self.conninfo)})


IsolationLevel = Literal["default", "read committed", "repeatable read", "serializable", "read uncommitted"]
Reset = Literal["none", "session", "discard"]


class Group(Table):
    """One named budget; durations in seconds, None: off."""

    connections: Permits
    target: Annotated[Target, _choice(*get_args(Target))] = "prefer-replica"
    endpoints: Texts = ()
    conninfo: Text = ""
    policy: Annotated[Policy, _choice(*get_args(Policy))] = "least-connections"
    max_lag: Annotated[MaxLag, _expecting('a size such as "16MB", a duration such as "5s", or ""', _max_lag)] = MaxLag()
    fallback_connections: Count = 0
    autocommit: Annotated[bool | None, _expecting("true or false", _flag)] = None
    isolation_level: Annotated[IsolationLevel, _choice(*get_args(IsolationLevel))] = "default"
    readonly: Flag = False
    reset: Annotated[Reset, _choice(*get_args(Reset))] = "none"
    per_worker_min: Count = 0
    per_worker_max: Permits = 8
    timeout: DurationOrZero = 5.0
    after_wait: DurationOrZero = 0.05
    max_waiting: Count = 0
    reserve: Count = 0
    max_lifetime: Duration = 3600.0
    max_idle: Duration = 600.0
    ping_after: DurationOrZero = 30.0
    leak_after: DurationOrOff = None
    query_timeout: DurationOrOff = None
    statement_timeout: ServerTimeout = None
    lock_timeout: ServerTimeout = None
    idle_in_transaction_session_timeout: ServerTimeout = None
    settings: Annotated[
        Mapping[str, str],
        _expecting("a table of server settings with texts, numbers or flags", _server_settings),
    ] = Field(default_factory=dict)
    application_name: Text = ""

    @property
    def effective_autocommit(self) -> bool:
        """The autocommit to use: as configured, else by target."""
        if self.autocommit is None:
            return self.target in ("replica", "prefer-replica")
        return self.autocommit


class Config(Table):
    """A whole configuration.  Made by `load` or `parse`, which also check across tables."""

    name: Annotated[str, _expecting(NAME_EXPECTED, _name)]
    limits: Limits = Limits()
    access: Access = Access()
    coordinator: CoordinatorOptions = CoordinatorOptions()
    probe: Probe = Probe()
    endpoints: Mapping[str, Endpoint]
    groups: Mapping[str, Group]

    _source: str = PrivateAttr(default="")
    _document: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """The file that this was read from; "" for one that a process gave."""
        return self._source

    def with_source(self, source: str, document: str = "") -> Self:
        """Return this configuration as read from a file, or (source "") from a document with this digest."""
        copy = self.model_copy()
        copy._source, copy._document = source, document
        return copy

    def endpoints_of(self, group: Group) -> tuple[str, ...]:
        """Return the names of the endpoints that qualify for a group."""
        return group.endpoints or tuple(self.endpoints)

    def settings(self, endpoint_index: Mapping[str, int], group_index: Mapping[str, int]) -> PoolSettings:
        """Return what workers need, with the rows that the coordinator gave to each name.

        Raises:
            KeyError: a configured endpoint or group has no row.
        """
        return PoolSettings(
            name=self.name,
            config_file=self.source,
            autostart=self.coordinator.autostart,
            stale_after=self.coordinator.stale_after,
            endpoints=tuple(
                _endpoint_settings(name, endpoint_index[name], endpoint) for name, endpoint in self.endpoints.items()
            ),
            groups=tuple(_group_settings(name, group_index[name], group) for name, group in self.groups.items()),
            document=self._document,
        )

    def warnings(self) -> list[str]:
        """Return what is allowed but hardly meant, a line for each."""
        found = []
        if self.probe.fastinter > self.probe.inter:
            found.append(
                f"probe.fastinter: {duration_text(self.probe.fastinter)} is longer than inter,"
                f" {duration_text(self.probe.inter)}"
            )
        for name, group in self.groups.items():
            found += self._group_warnings(f"groups.{name}", group)
        held = sum(group.per_worker_max for group in self.groups.values())
        if held > self.limits.slots_per_worker:
            found.append(
                f"limits.slots_per_worker: one worker may hold {held} connections in all groups"
                f" and has {self.limits.slots_per_worker} slots a row; it will take further rows"
            )
        return found

    def _group_warnings(self, path: str, group: Group) -> Iterator[str]:
        names = self.endpoints_of(group)
        room = sum(self.endpoints[name].max_connections for name in names)
        if group.connections > room:
            yield (
                f"{path}.connections: {group.connections} can never be used in full, because"
                f" its endpoints allow {room} together"
            )
        if group.target == "replica" and len(names) == 1:
            yield (
                f"{path}.target: replica with the single endpoint {names[0]}: the group has no"
                " endpoint at all while that one is down or primary"
            )
        if group.fallback_connections and group.target != "prefer-replica":
            yield (f"{path}.fallback_connections: has no effect with target {group.target}, only with prefer-replica")
        if group.per_worker_min * WARM_WORKERS > group.connections - group.reserve:
            served = (group.connections - group.reserve) // group.per_worker_min
            yield (
                f"{path}.per_worker_min: {group.per_worker_min} for each worker are all there are for {served} workers,"
                " and further ones wait: nobody is asked to give them back"
            )
        for name in NOT_IN_EFFECT:
            if getattr(group, name) != type(group).model_fields[name].default:
                yield f"{path}.{name}: is accepted, but this version does nothing with it yet"

    def describe(self) -> str:
        """Return the effective values for a person, without secrets."""
        access = f"mode {self.access.effective_mode:#o}"
        if self.access.group:
            access += f", group {self.access.group}"
        lines = [
            f"pool {self.name}",
            f"  limits: {_values_text(self.limits)}",
            f"  access: {access}",
            f"  coordinator: {_values_text(self.coordinator)}",
            f"  probe: {_values_text(self.probe)}",
        ]
        for name, endpoint in self.endpoints.items():
            lines += [
                f"endpoint {name}: at most {endpoint.max_connections} connections of the groups"
                f" and {COORDINATOR_SESSIONS} sessions of the coordinator",
                f"  conninfo: {endpoint.effective_conninfo}",
                f"  {_values_text(endpoint, but=('conninfo', 'max_connections', 'credentials'))},"
                f" password from {_password_text(endpoint.credentials)}",
            ]
        for name, group in self.groups.items():
            lines += [
                f"group {name}: at most {group.connections} connections, target {group.target},"
                f" on {', '.join(self.endpoints_of(group))}",
                f"  autocommit={_value_text(group.effective_autocommit)}, "
                + _values_text(group, but=("connections", "target", "endpoints", "autocommit")),
            ]
        return "\n".join(lines)


def _values_text(table: Table, but: tuple[str, ...] = ()) -> str:
    keys = [key for key in type(table).model_fields if key not in but]
    return ", ".join(f"{key}={_value_text(getattr(table, key))}" for key in keys)


def _value_text(value: Any) -> str:
    match value:
        case None | "" | MaxLag(bytes=None, seconds=None):
            return "off" if value != "" else '""'
        case bool():
            return str(value).lower()
        case float():
            return duration_text(value)
        case MaxLag(bytes=None, seconds=float(seconds)):
            return duration_text(seconds)
        case MaxLag(bytes=int(size)):
            return f"{size}B"
        case Mapping():
            return "{" + ", ".join(f"{k}={_value_text(v)}" for k, v in value.items()) + "}"
        case str():
            return f'"{value}"' if " " in value else value
        case _:
            return str(value)


def _password_text(credentials: Credentials) -> str:
    if credentials.password_file:
        return f"the file {credentials.password_file}"
    if credentials.password_command:
        return f"the output of {credentials.password_command[0]}"
    if credentials.password_env:
        return f"the variable {credentials.password_env}"
    return "libpq's own ways (passfile, service file, PGPASSWORD)"


def _endpoint_settings(name: str, index: int, endpoint: Endpoint) -> EndpointSettings:
    return EndpointSettings(
        index=index,
        name=name,
        conninfo=endpoint.effective_conninfo,
        max_connections=endpoint.max_connections,
        weight=endpoint.weight,
        backup=endpoint.backup,
        address=endpoint.address,
        via=endpoint.via,
        credentials=CredentialSettings(**endpoint.credentials.model_dump()),
    )


def _group_settings(name: str, index: int, group: Group) -> GroupSettings:
    values = {key: getattr(group, key) for key in Group.model_fields}
    max_lag: MaxLag = values.pop("max_lag")
    values["autocommit"] = group.effective_autocommit
    return GroupSettings(
        index=index,
        name=name,
        max_lag_bytes=max_lag.bytes,
        max_lag_s=max_lag.seconds,
        **values,
    )


# -- Reading -----------------------------------------------------------------------------------


def find(path: str | None) -> Path:
    """Return the absolute path of the configuration file: the argument, else SHMPOOL_CONFIG.

    Raises:
        ConfigError: neither names a file.
    """
    name = path or os.environ.get(CONFIG_VARIABLE, "")
    if not name:
        raise ConfigError(
            "configuration",
            (f"found no file name, expected one as argument or in {CONFIG_VARIABLE}",),
        )
    return Path(name).absolute()


def load(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or is not a valid configuration.
    """
    source = str(path.absolute())
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(source, (f"cannot be read: {reason}",)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(source, (f"is not UTF-8 (at line {line})",)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, (f"is not valid TOML: {error}",)) from None
    return parse(raw, source)


def parse(raw: Mapping[str, Any], source: str) -> Config:
    """Check a configuration that was read from `source`.

    Raises:
        ConfigError: it is not valid; all findings at once.
    """
    config: Config | None = None
    findings: list[Finding] = []
    try:
        config = Config.model_validate(raw).with_source(source)
    except ValidationError as error:
        findings += (_finding(details) for details in error.errors(include_url=False))
    told = {finding.path for finding in findings}
    findings += (f for f in _cross_findings(_Parts.of(raw)) if f.path not in told)
    if findings or config is None:
        raise ConfigError(source, tuple(map(str, findings))) from None
    return config


def _finding(details: ErrorDetails) -> Finding:
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


# -- Checks across keys and tables -------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What is valid in a file, table by table, so that one error does not hide another.

    `endpoint_names` and `group_names` also hold those of whose tables nothing is valid.
    """

    limits: Limits | None
    access: Access | None
    probe: Probe | None
    endpoints: Mapping[str, Endpoint]
    groups: Mapping[str, Group]
    endpoint_names: tuple[str, ...] | None
    group_names: tuple[str, ...] | None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        endpoints, groups = raw.get("endpoints"), raw.get("groups")
        return cls(
            limits=_salvaged(Limits, raw.get("limits", {})),
            access=_salvaged(Access, raw.get("access", {})),
            probe=_salvaged(Probe, raw.get("probe", {})),
            endpoints=_salvaged_each(Endpoint, endpoints),
            groups=_salvaged_each(Group, groups),
            endpoint_names=tuple(endpoints) if isinstance(endpoints, Mapping) else None,
            group_names=tuple(groups) if isinstance(groups, Mapping) else None,
        )


# What stands in for a key that is wrong, where the model needs one or its default could be wrong
# too.
_STAND_INS: Final[Mapping[str, Any]] = {
    "conninfo": "",
    "max_connections": 1,
    "connections": MAX_PERMITS,
    "per_worker_max": MAX_PERMITS,
}


def _salvaged(model: type[M], raw: Any) -> M | None:
    """Return a table without its wrong keys, or None where nothing of it can be used."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        wrong = {details["loc"][0] for details in error.errors() if details["loc"]}
    if not isinstance(raw, Mapping) or model is Limits:
        return None
    kept = {key: value for key, value in raw.items() if key not in wrong}
    stand_ins = {key: value for key, value in _STAND_INS.items() if key in wrong}
    return model.model_validate(kept | stand_ins)


def _salvaged_each(model: type[M], raw: Any) -> dict[str, M]:
    if not isinstance(raw, Mapping):
        return {}
    tables = {name: _salvaged(model, table) for name, table in raw.items()}
    return {name: table for name, table in tables.items() if table is not None}


def _cross_findings(parts: _Parts) -> Iterator[Finding]:
    names = {"endpoints": parts.endpoint_names, "groups": parts.group_names}
    for table, known in names.items():
        if known is not None:
            limit = None if parts.limits is None else getattr(parts.limits, table)
            yield from _name_findings(table, known, limit)
    if parts.access is not None and parts.access.mode == 0o660 and not parts.access.group:
        yield Finding("access.mode", "0o660 without a group", "0o600, or access.group beside it")
    if parts.probe is not None:
        yield from _overlay_findings("probe.conninfo", parts.probe.conninfo)
    for name, endpoint in parts.endpoints.items():
        yield from _endpoint_findings(name, endpoint)
    for name, group in parts.groups.items():
        yield from _group_findings(f"groups.{name}", group, parts)


def _name_findings(table: str, names: tuple[str, ...], limit: int | None) -> Iterator[Finding]:
    one = table.removesuffix("s")
    if not names:
        yield Finding(table, "none", f"at least one [{table}.<name>] table")
    if limit is not None and len(names) > limit:
        yield Finding(table, str(len(names)), f"at most {limit}, as limits.{table} has it")
    for name in names:
        if not POOL_NAME.fullmatch(name):
            yield Finding(f"{table}.{name}", f'"{name}" as the {one}\'s name', NAME_EXPECTED)


def _endpoint_findings(name: str, endpoint: Endpoint) -> Iterator[Finding]:
    path = f"endpoints.{name}"
    sources = [key for key, value in endpoint.credentials.model_dump().items() if value]
    if len(sources) > 1:
        yield Finding(f"{path}.credentials", " and ".join(sources), "at most one of them")
    keywords = yield from _conninfo_findings(f"{path}.conninfo", endpoint.conninfo)
    if keywords is None:
        return
    if not keywords.keys() & {"host", "hostaddr", "service"}:
        yield Finding(f"{path}.conninfo", "no host", "host, hostaddr or service in it")
    places = ("host", "hostaddr", "port")
    hosts = max(len(keywords.get(key, "").split(",")) for key in places)
    if hosts > 1:
        tables = _split_tables(name, keywords, hosts)
        yield Finding(
            f"{path}.conninfo",
            f"{hosts} hosts",
            f"one; write a table for each, with its own max_connections:{tables}",
        )


def _split_tables(name: str, keywords: Mapping[str, str], hosts: int) -> str:
    """Return the tables that say the same as one conninfo with several hosts, indented."""
    kept = {k: v for k, v in keywords.items() if k not in SECRET_KEYWORDS | REFUSED_KEYWORDS.keys()}
    lines = []
    for number in range(hosts):
        own = dict(kept)
        for key in ("host", "hostaddr", "port"):
            values = kept.get(key, "").split(",")
            if len(values) > 1:
                own[key] = values[min(number, len(values) - 1)]
        conninfo = make_conninfo({key: value for key, value in own.items() if value})
        conninfo = conninfo.replace("\\", "\\\\").replace('"', '\\"')
        lines += [
            f"[endpoints.{name}{f'-{number + 1}' if number else ''}]",
            f'conninfo = "{conninfo}"',
        ]
    return "".join(f"\n      {line}" for line in lines)


def _group_findings(path: str, group: Group, parts: _Parts) -> Iterator[Finding]:
    for name in group.endpoints:
        if parts.endpoint_names is not None and name not in parts.endpoint_names:
            known = ", ".join(parts.endpoint_names) or "none"
            close = difflib.get_close_matches(name, parts.endpoint_names, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            yield Finding(f"{path}.endpoints", f'"{name}"', f"configured endpoints ({known}){hint}")
    if len(set(group.endpoints)) < len(group.endpoints):
        yield Finding(f"{path}.endpoints", "a name twice", "each name once")
    if group.per_worker_min > group.per_worker_max:
        yield Finding(
            f"{path}.per_worker_min",
            f"{group.per_worker_min}",
            f"at most per_worker_max, {group.per_worker_max}",
        )
    if group.reserve >= group.connections:
        yield Finding(f"{path}.reserve", f"{group.reserve}", f"less than connections, {group.connections}")
    if parts.limits is not None and group.per_worker_max > parts.limits.slots_per_worker:
        yield Finding(
            f"{path}.per_worker_max",
            f"{group.per_worker_max}",
            f"at most limits.slots_per_worker, {parts.limits.slots_per_worker}",
        )
    yield from _overlay_findings(f"{path}.conninfo", group.conninfo)
    for name in group.settings:
        if name.lower() in OWN_KEYS:
            own = OWN_KEYS[name.lower()]
            yield Finding(f"{path}.settings", name, f"the group's own key instead: {path}.{own}")


def _overlay_findings(path: str, conninfo: str) -> Iterator[Finding]:
    keywords = yield from _conninfo_findings(path, conninfo)
    for key in PLACE_KEYWORDS:
        if key in (keywords or {}):
            yield Finding(path, f"`{key}`", "no place in it: that is the endpoint's")


def _conninfo_findings(path: str, conninfo: str) -> Generator[Finding, None, dict[str, str] | None]:
    """Yield what no conninfo may hold; return its keywords, or None where libpq cannot parse it."""
    try:
        keywords = parse_conninfo(conninfo)
    except ValueError as error:
        # libpq quotes what it stumbled over, which may be the middle of a password.
        is_telling = not re.search("pass|secret|scram|@", conninfo, re.IGNORECASE)
        reason = f" ({error})" if is_telling else ""
        yield Finding(path, f"what libpq cannot parse{reason}", "keyword=value pairs or a URI")
        return None
    for key in sorted(SECRET_KEYWORDS & keywords.keys()):
        yield Finding(
            path,
            f"`{key}`",
            "no secret in it: give password_file, password_command or password_env in"
            " [endpoints.<name>.credentials], Pool(..., credentials=callable) in code, or use libpq's own ways"
            " (passfile, service file, PGPASSWORD)",
        )
    for key, place in REFUSED_KEYWORDS.items():
        if key in keywords:
            yield Finding(path, f"`{key}`", place)
    return keywords
