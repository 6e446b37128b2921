"""Checks across keys and tables: what no single value can tell."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ValidationError

from shmpool.names import POOL_NAME
from shmpool_coordinator.config.conninfo import overlay_findings, place_findings
from shmpool_coordinator.config.findings import Finding
from shmpool_coordinator.config.tables import Access, Config, Endpoint, Group, Limits, Probe
from shmpool_coordinator.config.values import MAX_PERMITS, NAME_EXPECTED, MaxLag, duration_text
from shmpool_coordinator.probe import parse_conninfo

# Server settings that have a key of their own.
OWN_KEYS: Final[Mapping[str, str]] = {
    "application_name": "application_name",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_session_timeout": "idle_in_transaction_session_timeout",
    "default_transaction_isolation": "isolation_level",
    "default_transaction_read_only": "readonly",
}
# What reaches a server behind a pooler in SQL; the second where transactions do not begin with it.
SESSION_KEYS: Final = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "settings")
TRANSACTION_KEYS: Final = ("isolation_level", "readonly")
OPTIONS_WARNING: Final = (
    "`options` behind a pooler: many refuse or ignore it (PgBouncer); use the group's `settings` instead"
)
WARM_WORKERS: Final = 4  # a host has more; a warning where so many would leave nothing of a group to others
# Group settings that are read, checked and published, and that workers of this version do not act on.
NOT_IN_EFFECT: Final = ("leak_after",)


M = TypeVar("M", bound=BaseModel)


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


def cross_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong across keys and tables, also where some value is wrong in itself."""
    parts = _Parts.of(raw)
    names = {"endpoints": parts.endpoint_names, "groups": parts.group_names}
    for table, known in names.items():
        if known is not None:
            limit = None if parts.limits is None else getattr(parts.limits, table)
            yield from _name_findings(table, known, limit)
    if parts.access is not None and parts.access.mode == 0o660 and not parts.access.group:
        yield Finding("access.mode", "0o660 without a group", "0o600, or access.group beside it")
    if parts.probe is not None:
        yield from overlay_findings("probe.conninfo", parts.probe.conninfo)
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
    yield from place_findings(f"{path}.conninfo", name, endpoint)


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
    yield from overlay_findings(f"{path}.conninfo", group.conninfo)
    for name in group.settings:
        if name.lower() in OWN_KEYS:
            own = OWN_KEYS[name.lower()]
            yield Finding(f"{path}.settings", name, f"the group's own key instead: {path}.{own}")


def warnings_of(config: Config) -> list[str]:
    """Return what is allowed but hardly meant, a line for each."""
    found = []
    if config.probe.fastinter > config.probe.inter:
        found.append(
            f"probe.fastinter: {duration_text(config.probe.fastinter)} is longer than inter,"
            f" {duration_text(config.probe.inter)}"
        )
    for name, endpoint in config.endpoints.items():
        if endpoint.via == "pooler" and "options" in parse_conninfo(endpoint.conninfo):
            found.append(f"endpoints.{name}.conninfo: {OPTIONS_WARNING}")
    for name, group in config.groups.items():
        found += _group_warnings(f"groups.{name}", group, config)
    held = sum(group.per_worker_max for group in config.groups.values())
    if held > config.limits.slots_per_worker:
        found.append(
            f"limits.slots_per_worker: one worker may hold {held} connections in all groups"
            f" and has {config.limits.slots_per_worker} slots a row; it will take further rows"
        )
    return found


def _group_warnings(path: str, group: Group, config: Config) -> Iterator[str]:
    names = config.endpoints_of(group)
    room = sum(config.endpoints[name].max_connections for name in names)
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
    yield from _pooler_warnings(path, group, [name for name in names if config.endpoints[name].via == "pooler"])
    services = [name for name in names if config.endpoints[name].address == "service"]
    if services and group.max_lag != MaxLag():
        yield f"{path}.max_lag: has no effect at {', '.join(services)}: a name of several servers has no lag"
    if group.per_worker_min * WARM_WORKERS > group.connections - group.reserve:
        served = (group.connections - group.reserve) // group.per_worker_min
        yield (
            f"{path}.per_worker_min: {group.per_worker_min} for each worker are all there are for {served} workers,"
            " and further ones wait: nobody is asked to give them back"
        )
    for name in NOT_IN_EFFECT:
        if getattr(group, name) != type(group).model_fields[name].default:
            yield f"{path}.{name}: is accepted, but this version does nothing with it yet"


def _pooler_warnings(path: str, group: Group, poolers: Sequence[str]) -> Iterator[str]:
    if not poolers:
        return
    if "options" in parse_conninfo(group.conninfo):
        yield f"{path}.conninfo: {OPTIONS_WARNING}"
    in_sql = [key for key in SESSION_KEYS if getattr(group, key)]
    if group.effective_autocommit:
        in_sql += [key for key in TRANSACTION_KEYS if getattr(group, key) not in (False, "default")]
    if in_sql:
        yield (
            f"{path}: {', '.join(in_sql)} behind {', '.join(poolers)}: set in SQL after each connect, which lasts in"
            " session pooling only; in transaction pooling set them at the server, ALTER ROLE ... SET"
        )
