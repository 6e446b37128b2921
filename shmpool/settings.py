"""What workers and coordinator agree on about a pool: frozen, decoded once, free of secrets.

The coordinator validates the configuration file and publishes it in the segment as msgpack (config_area.py);
a worker decodes it here without any validation library.  Defaults live in the coordinator's `config` module,
where they are validated; field names are those of the configuration file.  All durations are seconds
(None: off), all sizes bytes.  A field that is added later must carry a default here, because a newer worker may
read what an older coordinator wrote; keys that this version does not know are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, Self

Target = Literal["primary", "replica", "prefer-replica", "any"]
Policy = Literal["least-connections", "round-robin", "weighted"]

GIVEN: Final = "given by a process"  # what is shown where a configuration has no file


class Credentials(NamedTuple):
    """Where a password is read at each connect; never the password itself."""

    password_file: str
    password_command: tuple[str, ...]
    password_env: str


# What may change under open connections: the next claim, wait or choice of an endpoint reads it anew.
_LIGHT_OF_ENDPOINT: Final[Mapping[str, Any]] = {"max_connections": 0, "weight": 0, "backup": False}
_LIGHT_OF_GROUP: Final[Mapping[str, Any]] = {
    "connections": 0,
    "policy": "least-connections",
    "max_lag_bytes": None,
    "max_lag_s": None,
    "fallback_connections": 0,
    "per_worker_min": 0,
    "per_worker_max": 0,
    "timeout": 0.0,
    "max_waiting": 0,
    "reserve": 0,
    "max_idle": 0.0,
    "ping_after": 0.0,
    "leak_after": None,
    "after_wait": 0.0,
}


class EndpointSettings(NamedTuple):
    """One PostgreSQL server address.  `index` is its row in the segment."""

    index: int  # type: ignore[assignment]  # a field, not tuple.index
    name: str
    conninfo: str
    max_connections: int
    weight: int
    backup: bool
    address: Literal["instance", "service"]
    via: Literal["direct", "pooler"]
    credentials: Credentials

    def of_connection(self) -> Self:
        """Return what an open connection depends on; everything else as if it had never been set."""
        return self._replace(**_LIGHT_OF_ENDPOINT)


class GroupSettings(NamedTuple):
    """One named budget.  `index` is its row in the segment; `endpoints` names those that qualify (empty: all)."""

    index: int  # type: ignore[assignment]  # a field, not tuple.index
    name: str
    connections: int
    target: Target
    endpoints: tuple[str, ...]
    conninfo: str
    policy: Policy
    max_lag_bytes: int | None
    max_lag_s: float | None
    fallback_connections: int
    autocommit: bool
    isolation_level: str
    readonly: bool
    reset: Literal["none", "session", "discard"]
    per_worker_min: int
    per_worker_max: int
    timeout: float
    max_waiting: int
    max_lifetime: float
    max_idle: float
    ping_after: float
    leak_after: float | None
    query_timeout: float | None
    statement_timeout: float | None
    lock_timeout: float | None
    idle_in_transaction_session_timeout: float | None
    settings: Mapping[str, str]
    application_name: str
    after_wait: float = 0.05
    reserve: int = 0

    def of_connection(self) -> Self:
        """Return what an open connection depends on; everything else as if it had never been set."""
        return self._replace(**_LIGHT_OF_GROUP)


class PoolSettings(NamedTuple):
    """Everything a worker needs to know about a pool."""

    name: str
    config_file: str
    autostart: bool
    stale_after: float
    endpoints: tuple[EndpointSettings, ...]
    groups: tuple[GroupSettings, ...]
    document: str = ""  # digest of the document that a process gave instead of a file (document.py)

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, ready for msgpack."""
        endpoints = [e._asdict() | {"credentials": e.credentials._asdict()} for e in self.endpoints]
        return self._asdict() | {"endpoints": endpoints, "groups": [g._asdict() for g in self.groups]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from `as_dict` output, ignoring unknown keys.

        Raises:
            KeyError, TypeError: a field is missing (the caller names the segment).
        """
        endpoints = tuple(
            EndpointSettings(
                **_known(EndpointSettings, e) | {"credentials": Credentials(**_known(Credentials, e["credentials"]))}
            )
            for e in raw["endpoints"]
        )
        groups = tuple(GroupSettings(**_known(GroupSettings, g)) for g in raw["groups"])
        return cls(**_known(cls, raw) | {"endpoints": endpoints, "groups": groups})


def _known(cls: type[Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = cls._fields
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items() if key in names}
