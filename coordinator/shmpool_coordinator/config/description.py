"""The effective values of a configuration, for a person; without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shmpool_coordinator.config.tables import Config, Credentials, Table
from shmpool_coordinator.config.values import MaxLag, duration_text

COORDINATOR_SESSIONS: Final = 2  # at each endpoint, beside its cap


def describe(config: Config) -> str:
    """Return the effective values for a person, without secrets."""
    access = f"mode {config.access.effective_mode:#o}"
    if config.access.group:
        access += f", group {config.access.group}"
    lines = [
        f"pool {config.name}",
        f"  limits: {_values_text(config.limits)}",
        f"  access: {access}",
        f"  coordinator: {_values_text(config.coordinator)}",
        f"  probe: {_values_text(config.probe)}",
    ]
    for name, endpoint in config.endpoints.items():
        lines += [
            f"endpoint {name}: at most {endpoint.max_connections} connections of the groups"
            f" and {COORDINATOR_SESSIONS} sessions of the coordinator",
            f"  conninfo: {endpoint.effective_conninfo}",
            f"  {_values_text(endpoint, but=('conninfo', 'max_connections', 'credentials'))},"
            f" password from {_password_text(endpoint.credentials)}",
        ]
    for name, group in config.groups.items():
        lines += [
            f"group {name}: at most {group.connections} connections, target {group.target},"
            f" on {', '.join(config.endpoints_of(group))}",
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
