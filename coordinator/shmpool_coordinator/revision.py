"""Revise the published settings by a configuration.  Pure: no I/O.

A name keeps its row, and so does what the configuration no longer names, at a cap of 0: the registry drops it once it
is drained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shmpool.layout import Layout
from shmpool.settings import EndpointSettings, GroupSettings, PoolSettings
from shmpool_coordinator.config import Config


def revise(old: PoolSettings | None, config: Config, shape: Layout) -> PoolSettings:
    """Return what to publish for a configuration, after `old`.

    Raises:
        ValueError: it needs more rows than the segment has.
    """
    endpoints = _indexes("endpoints", config.endpoints, old.endpoints if old else (), shape.endpoints)
    groups = _indexes("groups", config.groups, old.groups if old else (), shape.groups)
    wanted = config.settings(endpoints, groups)
    return wanted._replace(
        endpoints=wanted.endpoints + _removed_endpoints(old, wanted.endpoints),
        groups=wanted.groups + _removed_groups(old, wanted.groups),
    )


def changes_between(old: PoolSettings | None, new: PoolSettings) -> list[str]:
    """Say in words what a configuration changes, without values that may be delicate."""
    if old is None:
        return [f"{name}: added" for name in (*_by_name(new.endpoints), *_by_name(new.groups))]
    found = []
    for what, before, after in (
        ("endpoint", _by_name(old.endpoints), _by_name(new.endpoints)),
        ("group", _by_name(old.groups), _by_name(new.groups)),
    ):
        for name, row in after.items():
            earlier = before.get(name)
            if earlier is None:
                found.append(f"{what} {name}: added, at most {_cap(row)} connections")
            elif _cap(row) == 0 != _cap(earlier):
                found.append(f"{what} {name}: removed, {_cap(earlier)}->0 connections")
            elif _cap(row) != _cap(earlier):
                found.append(f"{what} {name}: {_cap(earlier)}->{_cap(row)} connections")
            elif row != earlier:
                found.append(f"{what} {name}: settings changed")
    return found or ["pool settings changed"]


def _indexes(
    what: str,
    names: Iterable[str],
    old: tuple[EndpointSettings, ...] | tuple[GroupSettings, ...],
    room: int,
) -> dict[str, int]:
    """Give each name its row: the one it had, or a free one."""
    had = {row.name: row.index for row in old}
    free = [index for index in range(room) if index not in had.values()]
    given = {}
    for name in names:
        if name not in had and not free:
            raise ValueError(
                f"{what}: no row is free for {name!r}: the segment has {room}, and what was removed keeps its "
                f"row until it is drained; wait, or raise limits.{what} and restart all"
            )
        given[name] = had[name] if name in had else free.pop(0)
    return given


def _removed_endpoints(old: PoolSettings | None, wanted: tuple[EndpointSettings, ...]) -> tuple[EndpointSettings, ...]:
    names = {e.name for e in wanted}
    rows_left = old.endpoints if old else ()
    return tuple(e._replace(max_connections=0, weight=0) for e in rows_left if e.name not in names)


def _removed_groups(old: PoolSettings | None, wanted: tuple[GroupSettings, ...]) -> tuple[GroupSettings, ...]:
    names = {g.name for g in wanted}
    rows_left = old.groups if old else ()
    return tuple(g._replace(connections=0) for g in rows_left if g.name not in names)


def _by_name(
    settings: Iterable[EndpointSettings] | Iterable[GroupSettings],
) -> Mapping[str, EndpointSettings | GroupSettings]:
    return {row.name: row for row in settings}


def _cap(row: EndpointSettings | GroupSettings) -> int:
    return row.connections if isinstance(row, GroupSettings) else row.max_connections
