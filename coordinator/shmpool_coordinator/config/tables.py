"""The tables of the file, frozen, and what workers get of them.  The one home of every default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from shmpool.settings import Credentials as CredentialSettings
from shmpool.settings import EndpointSettings, GroupSettings, Policy, PoolSettings, Target
from shmpool_coordinator.config.values import (
    AbsolutePath,
    Count,
    Duration,
    DurationOrOff,
    DurationOrZero,
    FileMode,
    Flag,
    FlagOrDefault,
    LagBound,
    MaxLag,
    Name,
    Permits,
    ServerSettings,
    ServerTimeout,
    Streak,
    Text,
    Texts,
    VariableName,
    choice,
    whole,
)
from shmpool_coordinator.probe import make_conninfo, parse_conninfo

# Under every conninfo: without them a dead network holds a connect or a query for hours.
CONNECT_DEFAULTS: Final[Mapping[str, str]] = {
    "connect_timeout": "5",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}


class Table(BaseModel):
    """A table of the file: frozen, and without keys that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Limits(Table):
    """Sizes of the segment's tables: masks have 64 bits, indices 8."""

    workers: Annotated[int, whole(1, 4096)] = 128
    slots_per_worker: Annotated[int, whole(1, 256)] = 32
    endpoints: Annotated[int, whole(1, 64)] = 16
    groups: Annotated[int, whole(1, 64)] = 32


class Access(Table):
    """Who may attach."""

    mode: FileMode = 0o600
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

    password_file: AbsolutePath = ""
    password_command: Texts = ()
    password_env: VariableName = ""


class Endpoint(Table):
    """One PostgreSQL server address."""

    conninfo: Text
    max_connections: Permits
    weight: Annotated[int, whole(0, 100)] = 1
    backup: Flag = False
    address: Annotated[Literal["instance", "service"], choice("instance", "service")] = "instance"
    via: Annotated[Literal["direct", "pooler"], choice("direct", "pooler")] = "direct"
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
    target: Annotated[Target, choice(*get_args(Target))] = "prefer-replica"
    endpoints: Texts = ()
    conninfo: Text = ""
    policy: Annotated[Policy, choice(*get_args(Policy))] = "least-connections"
    max_lag: LagBound = MaxLag()
    fallback_connections: Count = 0
    autocommit: FlagOrDefault = None
    isolation_level: Annotated[IsolationLevel, choice(*get_args(IsolationLevel))] = "default"
    readonly: Flag = False
    reset: Annotated[Reset, choice(*get_args(Reset))] = "none"
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
    settings: ServerSettings = Field(default_factory=dict)
    application_name: Text = ""

    @property
    def effective_autocommit(self) -> bool:
        """The autocommit to use: as configured, else by target."""
        if self.autocommit is None:
            return self.target in ("replica", "prefer-replica")
        return self.autocommit


class Config(Table):
    """A whole configuration.  Made by `load` or `parse`, which also check across tables."""

    name: Name
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
