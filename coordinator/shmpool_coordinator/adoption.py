"""Take a pool over: become its coordinator, adopt the segment that is there or make one.

If a process dies.  A half-made segment (CREATING) is removed by the next coordinator, as is a damaged one that nobody
    uses; any other is adopted.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import stat
from dataclasses import dataclass
from typing import Final

from shmpool import rows, segment, semaphores
from shmpool.errors import CoordinatorRunningError, MechanismError, SegmentMissingError
from shmpool.layout import Layout
from shmpool.names import Names
from shmpool.rows import Locks
from shmpool.segment import Segment
from shmpool.settings import GIVEN, PoolSettings
from shmpool.states import SegmentState
from shmpool_coordinator.config import Config, ConfigError
from shmpool_coordinator.inventory import recorded_semaphores

_TRIES: Final = 5
_MOST_ROWS: Final = 4096  # of any segment

log = logging.getLogger(__name__)


class SegmentInUseError(MechanismError):
    """What is there can neither be used nor replaced, because processes still use it."""


@dataclass(frozen=True, slots=True)
class Access:
    """Mode and group of everything that is made."""

    mode: int
    gid: int  # -1: none

    @classmethod
    def of(cls, config: Config) -> Access:
        """Look the configured group up; a number is one without a name, as containers have them.

        Raises:
            ConfigError: there is no such group, or this process is not in it and can give nothing to it.
        """
        group = config.access.group
        if not group:
            return cls(config.access.effective_mode, -1)
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            found = f'"{group}", which is no group here'
        else:
            if os.geteuid() == 0 or gid in (os.getegid(), *os.getgroups()):
                return cls(config.access.effective_mode, gid)
            found = f'"{group}" (gid {gid}), of which uid {os.geteuid()} is no member'
        expected = "a unix group of the user that the coordinator runs as"
        raise ConfigError(config.source or GIVEN, (f"access.group: found {found}, expected {expected}",))


def lock_pool(names: Names, access: Access) -> Locks:
    """Become the pool's coordinator.

    Raises:
        CoordinatorRunningError: there is one; tells its pid and configuration.
    """
    for _ in range(_TRIES):
        locks = Locks(names, rows.create_lock_file(names, mode=access.mode, gid=access.gid))
        if not locks.try_coordinator():
            pid = locks.coordinator_pid()
            raise CoordinatorRunningError(
                f"pool {names.pool!r}: already running, pid {pid if pid else 'unknown'}{_config_of_other(names)}"
            )
        if locks.is_in_place():
            return locks
        # The last coordinator removed the file while we opened it: ours leads nowhere.
    raise CoordinatorRunningError(f"pool {names.pool!r}: {names.lock} is being replaced again and again")


def _config_of_other(names: Names) -> str:
    with contextlib.suppress(MechanismError):
        other = segment.attach(names)
        try:
            return f", with config {other.read_settings()[1].config_file or GIVEN}"
        finally:
            other.release()
    return ""


def adopt(names: Names, locks: Locks) -> Segment | None:
    """Return the pool's segment if it is whole; remove what is not, unless somebody uses it.

    Raises:
        SegmentMismatchError, SegmentInUseError: what is there cannot be used; says why.
    """
    try:
        found = segment.attach(names, to_repair=True)
    except SegmentMissingError:
        _remove_remains(names, locks)
        return None
    if found.state is SegmentState.CREATING:
        log.warning("segment %s: half made, starting over", names.segment)
        found.release()
        _remove_remains(names, locks)
        return None
    damage = damage_of(found, locks)
    if damage is None:
        return found
    users = [row for row in range(found.layout.workers) if _is_used(found, locks, row)]
    found.release()
    if users:
        raise SegmentInUseError(
            f"segment {names.segment}: {damage}, and {len(users)} workers still use it; "
            "stop them, then start the coordinator again"
        )
    log.error("segment %s: %s; nobody uses it, starting over", names.segment, damage)
    _remove_remains(names, locks)
    return None


def _is_used(found: Segment, locks: Locks, row: int) -> bool:
    return locks.holder(row) is not None or rows.owner_of(found, row).visibly_lives()


def _remove_remains(names: Names, locks: Locks) -> None:
    """Remove the names of a segment that nobody can attach to."""
    if locks.any_row_held(_MOST_ROWS):
        raise SegmentInUseError(
            f"pool {names.pool!r}: its segment {names.segment} is gone, and workers still hold "
            "connections of it; stop them, then start the coordinator again"
        )
    for path in names.leftovers():
        if path not in (names.lock, names.socket):  # the coordinator's own
            path.unlink(missing_ok=True)


def create(names: Names, shape: Layout, locks: Locks, access: Access) -> Segment:
    """Make the pool's segment.

    Raises:
        OSError: no room, or no permission.
    """
    try:
        made = segment.create(names, shape, mode=access.mode, gid=access.gid)
    except OSError:
        if locks.is_in_place():  # without a segment it is of no use
            os.unlink(names.lock)
        raise
    assert locks.inode is not None
    made.set_header("lock_inode", locks.inode)
    return made


def damage_of(found: Segment, locks: Locks) -> str | None:
    """Return what is wrong with the names of a segment, None if all lead to its own inodes."""
    if not found.is_in_place():
        return f"{found.names.segment} leads elsewhere"
    if not locks.is_in_place() or found.header("lock_inode") != locks.inode:
        return f"lock file {found.names.lock} was replaced"
    for name, inode in recorded_semaphores(found):
        if semaphores.inode_of(name) != inode:
            return f"semaphore {name} was removed or replaced"
    return None


def warn_of_differences(found: Segment, settings: PoolSettings, config: Config, access: Access) -> None:
    """Log what the configuration wants otherwise than an adopted segment was made with."""
    names, shape, limits = found.names, found.layout, config.limits
    info = os.stat(names.segment)
    if access != Access(stat.S_IMODE(info.st_mode), info.st_gid if access.gid >= 0 else -1):
        log.warning(
            "pool %s: [access] differs from what its names were made with (mode %04o, gid %d); it takes effect "
            "when they are made anew: stop coordinator and workers, then start",
            names.pool,
            stat.S_IMODE(info.st_mode),
            info.st_gid,
        )
    if settings.config_file != config.source:
        log.warning(
            "pool %s: its configuration was %s, now %s",
            names.pool,
            settings.config_file or GIVEN,
            config.source or GIVEN,
        )
    for key in ("workers", "slots_per_worker", "endpoints", "groups"):
        if getattr(shape, key) != getattr(limits, key):
            log.warning(
                "pool %s: limits.%s is %d, the segment was made with %d and keeps it until all have left it",
                names.pool,
                key,
                getattr(limits, key),
                getattr(shape, key),
            )
