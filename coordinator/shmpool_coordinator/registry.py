"""The segment as the coordinator keeps it: made or adopted, configured, checked, removed.

Writers.  The sole writer of the header, the endpoint and group rows and the published configuration.
Stale reads.  None of its own words: nobody else writes them.
If a process dies.  A half-made segment (CREATING) is removed by the next coordinator; any other is adopted: names
    keep their index by the published configuration, and permits go on from their control words.  One that is RETIRED
    stays so until nothing is held through it; then the daemon has it replaced.

What the configuration no longer names is drained: it stays published with a cap of 0 until nothing circulates and
no slot speaks of it; only then is its row free for another name.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shmpool import layout, rows, segment, semaphores
from shmpool.clock import monotonic
from shmpool.errors import CoordinatorRunningError, MechanismError, SegmentMissingError
from shmpool.layout import ENDPOINTS, GROUPS, PERMITS, WORKERS, Layout
from shmpool.names import Names
from shmpool.replication import Lag, Server, is_disputed, is_superseded
from shmpool.routing import is_role_allowed
from shmpool.rows import Locks, Process
from shmpool.segment import Segment
from shmpool.settings import GIVEN, EndpointSettings, GroupSettings, PoolSettings
from shmpool.states import ADMIN_MOVES, Admin, Health, Role, SegmentState, Verdict
from shmpool.views import read_row
from shmpool.words import Status
from shmpool_coordinator.config import Config, ConfigError
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from shmpool_coordinator.permits import Permits
from shmpool_coordinator.repair import repair

_TRIES: Final = 5
_MOST_ROWS: Final = 4096  # of any segment
_UNKNOWN_LAG: Final = -1.0
_MICROSECONDS: Final = 1_000_000

log = logging.getLogger(__name__)


class SegmentInUseError(MechanismError):
    """What is there can neither be used nor replaced, because processes still use it."""


class UnknownEndpointError(MechanismError):
    """The pool has no endpoint of that name; the message tells which there are."""


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


class Registry:
    """One pool's segment and semaphores, in the hands of its coordinator (which holds the lock)."""

    def __init__(
        self, names: Names, config: Config, locks: Locks, operator_wishes: Mapping[str, Admin] | None = None
    ) -> None:
        """Create or adopt the segment, and configure it.

        Args:
            operator_wishes: by endpoint, as they were in the segment before this one.

        Raises:
            SegmentMismatchError, SegmentInUseError: what is there cannot be used; says why.
            OSError: no room, or no permission.
            ValueError: the configuration does not fit into the segment.
        """
        self.names = names
        self.locks = locks
        self.config = config
        self._access = Access.of(config)
        self._addresses: dict[int, str] = {}
        self._identities: dict[int, tuple[object, bool]] = {}  # of servers; whether they had it one probe earlier, too
        found = self._adoptable()
        self.is_adopted = found is not None
        self.segment: Segment = found or self._create()
        self.permits = Permits(self.segment)
        self.settings: PoolSettings | None = None
        if self.is_adopted:
            self.settings = self.segment.read_settings()[1]
            self._open_semaphores(self.settings)
            self._identities = {e.index: (self.server(e.index).identity, True) for e in self.settings.endpoints}
        if self.settings is not None and self.is_retired:
            self._apply(self.settings, self.settings)  # it ends as it is; the file is for its successor
        else:
            if self.settings is not None:
                self._warn_of_differences(self.settings)
            try:
                self.configure(config)
            except (MechanismError, ValueError, OSError):
                if not self.is_adopted:
                    self.unlink()
                raise
        for name, wish in (operator_wishes or {}).items():
            with contextlib.suppress(UnknownEndpointError):  # the configuration has dropped it
                self.set_operator_wish(name, wish)
        me = Process.current()
        for column, value in (
            ("coordinator_pid", me.pid),
            ("coordinator_pid_namespace", me.namespace),
            ("coordinator_start", me.start),
            ("coordinator_adoptions", self.segment.header("coordinator_adoptions") + 1),
            ("ticks", 0),
        ):
            self.segment.set_header(column, value)
        self.beat()
        if not self.is_retired:
            self.segment.set_header("state", SegmentState.OPEN)

    def _warn_of_differences(self, settings: PoolSettings) -> None:
        shape, limits, info = self.segment.layout, self.config.limits, os.stat(self.names.segment)
        if self._access != Access(stat.S_IMODE(info.st_mode), info.st_gid if self._access.gid >= 0 else -1):
            log.warning(
                "pool %s: [access] differs from what its names were made with (mode %04o, gid %d); it takes effect "
                "when they are made anew: stop coordinator and workers, then start",
                self.names.pool,
                stat.S_IMODE(info.st_mode),
                info.st_gid,
            )
        if settings.config_file != self.config.source:
            log.warning(
                "pool %s: its configuration was %s, now %s",
                self.names.pool,
                settings.config_file or GIVEN,
                self.config.source or GIVEN,
            )
        for key in ("workers", "slots_per_worker", "endpoints", "groups"):
            if getattr(shape, key) != getattr(limits, key):
                log.warning(
                    "pool %s: limits.%s is %d, the segment was made with %d and keeps it until all have left it",
                    self.names.pool,
                    key,
                    getattr(limits, key),
                    getattr(shape, key),
                )

    # -- create or adopt ---------------------------------------------------------------------------

    def _adoptable(self) -> Segment | None:
        """Return the pool's segment if it is whole; remove what is not, unless somebody uses it."""
        try:
            found = segment.attach(self.names, to_repair=True)
        except SegmentMissingError:
            self._remove_remains()
            return None
        if found.state is SegmentState.CREATING:
            log.warning("segment %s: half made, starting over", self.names.segment)
            found.release()
            self._remove_remains()
            return None
        damage = self._damage(found)
        if damage is None:
            return found
        users = [row for row in range(found.layout.workers) if self._is_used(found, row)]
        found.release()
        if users:
            raise SegmentInUseError(
                f"segment {self.names.segment}: {damage}, and {len(users)} workers still use it; "
                "stop them, then start the coordinator again"
            )
        log.error("segment %s: %s; nobody uses it, starting over", self.names.segment, damage)
        self._remove_remains()
        return None

    def _is_used(self, found: Segment, row: int) -> bool:
        return self.locks.holder(row) is not None or rows.owner_of(found, row).visibly_lives()

    def _remove_remains(self) -> None:
        """Remove the names of a segment that nobody can attach to."""
        if self.locks.any_row_held(_MOST_ROWS):
            raise SegmentInUseError(
                f"pool {self.names.pool!r}: its segment {self.names.segment} is gone, and workers still hold "
                "connections of it; stop them, then start the coordinator again"
            )
        for path in self.names.leftovers():
            if path not in (self.names.lock, self.names.socket):  # the coordinator's own
                path.unlink(missing_ok=True)

    def _create(self) -> Segment:
        limits = self.config.limits
        shape = Layout(limits.workers, limits.slots_per_worker, limits.endpoints, limits.groups)
        try:
            made = segment.create(self.names, shape, mode=self._access.mode, gid=self._access.gid)
        except OSError:
            if self.locks.is_in_place():  # without a segment it is of no use
                os.unlink(self.names.lock)
            raise
        assert self.locks.inode is not None
        made.set_header("lock_inode", self.locks.inode)
        return made

    def _open_semaphores(self, settings: PoolSettings) -> None:
        self._clear_unpublished(settings)
        for group in settings.groups:
            self._open_group(group.index)
        for endpoint in settings.endpoints:
            self._open_permit(self.segment.layout.groups + endpoint.index)

    def _clear_unpublished(self, settings: PoolSettings) -> None:
        """Finish what a coordinator that died while it added or dropped a row had begun: nobody knows these rows."""
        shape, words = self.segment.layout, self.segment.words
        groups = {g.index for g in settings.groups}
        known = groups | {shape.groups + e.index for e in settings.endpoints}
        for number in set(range(shape.semaphores)) - known:
            if words[shape.at(PERMITS, number, "semaphore_inode")]:
                semaphores.unlink(self._permit_name(number))
                self._clear(PERMITS, number)
        for index in set(range(shape.groups)) - groups:
            if self._group_word(index, "bell_inode"):
                self._clear_group(index)
        for index in range(shape.endpoints):
            if shape.groups + index not in known:
                self._clear(ENDPOINTS, index)

    def _clear_group(self, index: int) -> None:
        for kind in "bw":
            semaphores.unlink(self._name(kind, index))
        self._clear(GROUPS, index)

    def _open_group(self, index: int) -> None:
        self._open_permit(index)
        self.permits.add_bells(
            index,
            semaphores.open_existing(self._name("b", index), self._group_word(index, "bell_inode")),
            semaphores.open_existing(self._name("w", index), self._group_word(index, "endpoint_bell_inode")),
        )

    def _open_permit(self, number: int) -> None:
        inode = self.segment.words[self.segment.layout.at(PERMITS, number, "semaphore_inode")]
        self.permits.add(number, semaphores.open_existing(self._permit_name(number), inode))

    def _name(self, kind: str, index: int) -> str:
        return self.names.semaphore(self.segment.token, kind, index)

    def _permit_name(self, number: int) -> str:
        return _permit_name(self.segment, number)

    def _group_word(self, index: int, column: str) -> int:
        return self.segment.words[self.segment.layout.at(GROUPS, index, column)]

    def _damage(self, found: Segment) -> str | None:
        """Return what is wrong with the names of a segment, None if all lead to its own inodes."""
        if not found.is_in_place():
            return f"{self.names.segment} leads elsewhere"
        if not self.locks.is_in_place() or found.header("lock_inode") != self.locks.inode:
            return f"lock file {self.names.lock} was replaced"
        for name, inode in _semaphores_of(found):
            if semaphores.inode_of(name) != inode:
                return f"semaphore {name} was removed or replaced"
        return None

    def damage(self) -> str | None:
        """Return which name no longer leads to its own inode, None if all do (checked every second)."""
        return self._damage(self.segment)

    # -- configuration -----------------------------------------------------------------------------

    def configure(self, config: Config) -> list[str]:
        """Make `config` the current configuration; return what changed, a line for each.

        Raises:
            ValueError: it needs more than the segment has; nothing was changed.
        """
        old = self.settings
        endpoints = self._indexes(
            "endpoints", config.endpoints, old.endpoints if old else (), self.segment.layout.endpoints
        )
        groups = self._indexes("groups", config.groups, old.groups if old else (), self.segment.layout.groups)
        wanted = config.settings(endpoints, groups)
        settings = wanted._replace(
            endpoints=wanted.endpoints + _removed_endpoints(old, wanted.endpoints),
            groups=wanted.groups + _removed_groups(old, wanted.groups),
        )
        is_changed = old is None or settings != old
        if is_changed:
            self._make_semaphores(settings)
            self.segment.publish(settings)
            if old is not None:
                self.segment.set_header("reloads", self.segment.header("reloads") + 1)
        changes = _changes(old, settings) if is_changed else []
        if config.access != self.config.access:
            changes.append("access: takes effect when the pool's names are made anew: stop coordinator and workers")
        self.settings, self.config = settings, config
        self._apply(settings, old)
        return changes

    def _indexes(
        self,
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

    def _make_semaphores(self, settings: PoolSettings) -> None:
        words, shape = self.segment.words, self.segment.layout
        for group in settings.groups:
            if not words[shape.at(GROUPS, group.index, "in_use")]:
                bells = [self._make(kind, group.index) for kind in "bw"]
                self.permits.add_bells(group.index, *bells)
                for kind, column in (("b", "bell_inode"), ("w", "endpoint_bell_inode")):
                    inode = semaphores.inode_of(self._name(kind, group.index))
                    words[shape.at(GROUPS, group.index, column)] = inode
                self._make_permit(group.index)
                words[shape.at(GROUPS, group.index, "in_use")] = 1
        for endpoint in settings.endpoints:
            number = shape.groups + endpoint.index
            if not words[shape.at(PERMITS, number, "semaphore_inode")]:
                self._make_permit(number)

    def _make(self, kind: str, index: int) -> semaphores.Semaphore:
        name = self._name(kind, index)
        semaphores.unlink(name)  # of a coordinator that died before it recorded the inode
        return semaphores.create(name, mode=self._access.mode, gid=self._access.gid)

    def _make_permit(self, number: int) -> None:
        words, at = self.segment.words, self.segment.layout.at(PERMITS, number)
        kind, index = _kind_and_index(self.segment, number)
        self.permits.add(number, self._make(kind, index))
        for column in ("control", "last_target"):
            words[at + PERMITS.column(column)] = 0
        words[at + PERMITS.column("semaphore_inode")] = semaphores.inode_of(self._permit_name(number))

    def _apply(self, settings: PoolSettings, old: PoolSettings | None) -> None:
        """Set targets and what the configuration says of each endpoint."""
        had = {e.index: e for e in old.endpoints} if old else {}
        for endpoint in settings.endpoints:
            before = had.get(endpoint.index)
            is_moved = before is not None and before.conninfo != endpoint.conninfo
            self._set_status(
                endpoint.index,
                is_moved=is_moved,
                weight=endpoint.weight,
                admin_config=Admin.READY if endpoint.max_connections else Admin.DRAIN,
            )
            self.permits.set_target(self.segment.layout.groups + endpoint.index, endpoint.max_connections)
        for group in settings.groups:
            self.permits.set_target(group.index, group.connections)
        self.permits.set_users(
            {
                e.index: [g.index for g in settings.groups if not g.endpoints or e.name in g.endpoints]
                for e in settings.endpoints
            }
        )

    def drop_drained(self) -> bool:
        """Free the rows of what was removed and holds nothing any more; return whether there were any."""
        assert self.settings is not None
        shape, settings = self.segment.layout, self.settings
        groups = [g for g in settings.groups if g.connections == 0 and self.permits.is_empty(g.index)]
        endpoints = [
            e for e in settings.endpoints if e.max_connections == 0 and self.permits.is_empty(shape.groups + e.index)
        ]
        if not groups and not endpoints:
            return False
        self.settings = settings._replace(
            groups=tuple(g for g in settings.groups if g not in groups),
            endpoints=tuple(e for e in settings.endpoints if e not in endpoints),
        )
        self.segment.publish(self.settings)
        for group in groups:
            self._free_permit(group.index)
            self._clear_group(group.index)
        for endpoint in endpoints:
            self._free_permit(shape.groups + endpoint.index)
            self._clear(ENDPOINTS, endpoint.index)
            self._addresses.pop(endpoint.index, None)
            self._identities.pop(endpoint.index, None)
        for name in [g.name for g in groups] + [e.name for e in endpoints]:
            log.info("%s: removed, nothing held it any more", name)
        return True

    def _free_permit(self, number: int) -> None:
        semaphores.unlink(self._permit_name(number))
        self._clear(PERMITS, number)
        self.permits.remove(number)

    def _clear(self, table: layout.Table, row: int) -> None:
        at = self.segment.layout.at(table, row)
        for position in range(len(table.columns)):
            self.segment.words[at + position] = 0

    # -- endpoints ---------------------------------------------------------------------------------

    def status(self, index: int) -> Status:
        """Return an endpoint's status word, taken apart."""
        return Status.of(self.segment.words[self.segment.layout.at(ENDPOINTS, index, "status")])

    def known_health(self, index: int) -> EndpointHealth:
        """Return what the segment says of an endpoint's health (after an adoption: the last known)."""
        status = self.status(index)
        return EndpointHealth(health=status.health, role=status.role, verdict=status.verdict)

    def _set_status(
        self,
        index: int,
        *,
        is_moved: bool = False,
        health: Health | None = None,
        role: Role | None = None,
        verdict: Verdict | None = None,
        weight: int | None = None,
        admin_config: Admin | None = None,
        admin_operator: Admin | None = None,
    ) -> None:
        """Store an endpoint's status in one word; the epoch grows when workers must look at connections anew."""
        at = self.segment.layout.at(ENDPOINTS, index)
        old = self.status(index)
        new = old._replace(
            health=old.health if health is None else health,
            role=old.role if role is None else role,
            verdict=old.verdict if verdict is None else verdict,
            weight=old.weight if weight is None else weight,
            admin_config=old.admin_config if admin_config is None else admin_config,
            admin_operator=old.admin_operator if admin_operator is None else admin_operator,
        )
        had_conflict, has_conflict = (s.verdict is Verdict.ROLE_CONFLICT for s in (old, new))
        is_changed = (old.health, old.role, old.admin, had_conflict) != (new.health, new.role, new.admin, has_conflict)
        if old.epoch == 0:
            self.record_lag(index, Lag(None, None))
        if is_changed or is_moved or old.epoch == 0:
            epoch = (old.epoch + 1) & 0xFFFFFFFF or 1
            new = new._replace(epoch=epoch)
            self.segment.times[at + ENDPOINTS.column("since")] = monotonic()
        if new != old:
            self.segment.words[at + ENDPOINTS.column("status")] = new.word()

    def record_probe(self, index: int, health: EndpointHealth, result: ProbeResult) -> None:
        """Store what a probe saw."""
        words, times = self.segment.words, self.segment.times
        at = self.segment.layout.at(ENDPOINTS, index)

        def place(column: str) -> int:
            return at + ENDPOINTS.column(column)

        times[place("probed_at")] = 0.0  # whoever reads meanwhile does not take the old for the new
        words[place("good")], words[place("bad")] = health.good, health.bad
        words[place("probes")] += 1
        if result.verdict in (Verdict.OK, Verdict.FULL):
            times[place("failing_since")] = 0.0
        else:
            words[place("failures")] += 1
            times[place("failing_since")] = times[place("failing_since")] or monotonic()
        if result.latency_s is not None:
            times[place("latency")] = result.latency_s
        started = None if result.started_at is None else int(result.started_at * _MICROSECONDS)
        for column, seen in (
            ("lsn", (result.lsn or 0) if result.verdict is Verdict.OK else None),  # no older one with a newer time
            ("timeline", result.timeline),
            ("system_identifier", result.system_identifier),
            ("server_start_wall", started),
            ("server_version", result.server_version),
        ):
            if seen is not None:
                words[place(column)] = seen & 0xFFFFFFFFFFFFFFFF
        is_moved = False
        if result.verdict is Verdict.OK:
            self._note_identity(index, self.server(index)._replace(role=health.role))
        if result.address is not None:
            is_moved = self._addresses.get(index, result.address) != result.address
            self._addresses[index] = result.address
        self.judge(index, health, is_moved=is_moved)
        times[place("probed_at")] = monotonic() if result.asked_at is None else result.asked_at

    def judge(self, index: int, health: EndpointHealth, *, is_moved: bool = False) -> None:
        """Store an endpoint's health, role and verdict: ROLE_CONFLICT for a primary that another one keeps out."""
        mine = self.server(index)._replace(role=health.role)
        if mine.is_down:
            mine = mine._replace(is_settled=False)  # it returns as a newcomer
        others = self._others(index)
        is_out = health.health is not Health.DOWN and (is_superseded(mine, others) or is_disputed(mine, others))
        self._set_status(
            index,
            is_moved=is_moved,
            health=health.health,
            role=health.role,
            verdict=Verdict.ROLE_CONFLICT if is_out else health.verdict,
        )

    def server(self, index: int) -> Server:
        """Return what was last known of an endpoint's server, by this coordinator or an earlier one."""
        row = read_row(self.segment, ENDPOINTS, index)
        server = Server.of(row | {"status": Status.of(row["status"])})
        return server._replace(is_settled=self._identities.get(index) == (server.identity, True))

    def _others(self, index: int) -> list[Server]:
        """Return the other servers; the configuration has the last word: one that it no longer names is not there."""
        assert self.settings is not None
        return [self.server(e.index) for e in self.settings.endpoints if e.index != index and e.max_connections]

    def conflict(self, index: int) -> str:
        """Return why a primary is kept out by another one, "" if it is not."""
        if self.status(index).verdict is not Verdict.ROLE_CONFLICT:
            return ""
        mine = self.server(index)
        if is_superseded(mine, self._others(index)):
            return f"its timeline {mine.timeline} is not the newest one of its cluster"
        return (
            f"another primary of its cluster is on timeline {mine.timeline}, too, and nobody can tell which one "
            "counts: it gets no connection until the other one is a standby, or drained by an administrator"
        )

    def _note_identity(self, index: int, server: Server) -> None:
        before, _ = self._identities.get(index, (None, False))
        self._identities[index] = (server.identity, before == server.identity)

    def lag(self, index: int) -> Lag:
        """Return how far a replica was behind when it was last known."""
        at = self.segment.layout.at(ENDPOINTS, index)
        seconds = self.segment.times[at + ENDPOINTS.column("lag")]
        return Lag(self.segment.words[at + ENDPOINTS.column("lag_bytes")], seconds if seconds >= 0 else None)

    def record_lag(self, index: int, lag: Lag) -> None:
        """Store how far a replica is behind."""
        at = self.segment.layout.at(ENDPOINTS, index)
        self.segment.words[at + ENDPOINTS.column("lag_bytes")] = lag.bytes or 0
        self.segment.times[at + ENDPOINTS.column("lag")] = _UNKNOWN_LAG if lag.seconds is None else lag.seconds

    def has_vacant_role(self) -> bool:
        """Whether some group has no endpoint that is UP in a role that serves it."""
        assert self.settings is not None
        usable = self.usable_endpoints()
        up = {e.index for e in self.settings.endpoints if self.status(e.index).health is Health.UP}
        return any(not usable[group.index] & up for group in self.settings.groups if group.connections)

    def usable_endpoints(self) -> dict[int, frozenset[int]]:
        """Return by group the endpoints that are not DOWN and in a role that serves it."""
        assert self.settings is not None
        statuses = [(e, self.status(e.index)) for e in self.settings.endpoints]
        return {
            group.index: frozenset(
                e.index
                for e, status in statuses
                if (not group.endpoints or e.name in group.endpoints)
                and status.admin is Admin.READY
                and status.health is not Health.DOWN
                and status.verdict is not Verdict.ROLE_CONFLICT
                and is_role_allowed(group.target, status.role)
            )
            for group in self.settings.groups
        }

    def set_operator_wish(self, name: str, wish: Admin) -> Status:
        """Note what the operator wants of an endpoint and return its status; the configuration's wish stays beside it.

        Kept in the segment: reloads and other coordinators leave it as it is.

        Raises:
            UnknownEndpointError: there is no such endpoint.
        """
        index = self._endpoint(name).index
        if wish in ADMIN_MOVES[self.status(index).admin_operator]:
            self._set_status(index, admin_operator=wish)
        return self.status(index)

    def operator_wishes(self) -> dict[str, Admin]:
        """Return by endpoint what the operator wants, where that is not READY."""
        assert self.settings is not None
        wishes = {e.name: self.status(e.index).admin_operator for e in self.settings.endpoints}
        return {name: wish for name, wish in wishes.items() if wish is not Admin.READY}

    def drained_endpoints(self) -> frozenset[int]:
        """Return the endpoints at which nothing is to rest: those that are not READY."""
        assert self.settings is not None
        return frozenset(e.index for e in self.settings.endpoints if self.status(e.index).admin is not Admin.READY)

    def groups_left_alone_by(self, name: str) -> list[str]:
        """Return the groups that have no usable endpoint and that this one would serve if it were READY."""
        assert self.settings is not None
        index, usable = self._endpoint(name).index, self.usable_endpoints()
        role, is_ready = self.status(index).role, self.status(index).admin is Admin.READY
        return [
            group.name
            for group in self.settings.groups
            if not is_ready
            and not usable[group.index]
            and group.connections
            and (not group.endpoints or name in group.endpoints)
            and is_role_allowed(group.target, role)
        ]

    def _endpoint(self, name: str) -> EndpointSettings:
        assert self.settings is not None
        for endpoint in self.settings.endpoints:
            if endpoint.name == name:
                return endpoint
        there_are = ", ".join(e.name for e in self.settings.endpoints)
        raise UnknownEndpointError(f"pool {self.names.pool!r} has no endpoint {name!r}; there are: {there_are}")

    # -- the header, and the end -------------------------------------------------------------------

    def beat(self) -> None:
        """Show that the coordinator lives."""
        self.segment.times[self.segment.layout.at(layout.HEADER, 0, "heartbeat")] = monotonic()
        self.segment.set_header("ticks", self.segment.header("ticks") + 1)

    def is_row_of(self, row: int, generation: int) -> bool:
        """Whether a worker row exists and has this generation."""
        if not 0 <= row < self.segment.layout.workers:
            return False
        return self.segment.words[self.segment.layout.at(WORKERS, row, "generation")] == generation

    def any_worker(self) -> bool:
        """Whether a process holds, or is just taking, a worker row."""
        return self.locks.any_row_held(self.segment.layout.workers)

    @property
    def is_retired(self) -> bool:
        """Whether the segment takes nobody in any more."""
        return self.segment.state is SegmentState.RETIRED

    def retire(self) -> None:
        """Take nobody in any more; whoever is in notices at the next checkout, by the endpoints' epochs."""
        self.segment.set_header("state", SegmentState.RETIRED)
        for endpoint in self.settings.endpoints if self.settings else ():
            self._set_status(endpoint.index, is_moved=True)

    def repair(self, *, apply: bool) -> list[str]:
        """Say what is out of bounds and what brings it in line, a line for each; with `apply`, do it.

        Raises:
            RepairError: no clean copy under this load.
        """
        assert self.settings is not None
        first = self.segment.layout.groups
        wanted = {g.index: (f"group {g.name}", g.connections) for g in self.settings.groups}
        wanted |= {first + e.index: (f"endpoint {e.name}", e.max_connections) for e in self.settings.endpoints}
        return repair(
            self.permits,
            {number: target for number, (_, target) in wanted.items()},
            {number: name for number, (name, _) in wanted.items()},
            apply=apply,
        )

    def is_left(self) -> bool:
        """Whether nothing is held through the segment and nobody can take anything (retired segments only)."""
        return not self.any_worker() and self.permits.holds_nothing()

    def reopen(self) -> None:
        """Take the retirement back."""
        self.segment.set_header("state", SegmentState.OPEN)

    def leave(self) -> None:
        """Stop being the coordinator; the segment stays for the next one."""
        self.segment.set_header("coordinator_pid", 0)

    def unlink_segment(self) -> None:
        """Remove segment and semaphores and keep what the coordinator itself needs: a successor takes their place."""
        for name, _ in _semaphores_of(self.segment):
            semaphores.unlink(name)
        self.segment.unlink()

    def unlink(self) -> None:
        """Remove every name; the lock file last, since a newcomer may start once it is gone."""
        self.unlink_segment()
        for path in self.names.leftovers():
            if path not in (self.names.segment, self.names.lock):
                path.unlink(missing_ok=True)
        if self.locks.is_in_place():
            os.unlink(self.names.lock)

    def close(self) -> None:
        """Let go of the mapping and the semaphores."""
        self.permits.close()
        self.segment.release()


def _kind_and_index(found: Segment, number: int) -> tuple[str, int]:
    groups = found.layout.groups
    return ("g", number) if number < groups else ("e", number - groups)


def _permit_name(found: Segment, number: int) -> str:
    return found.names.semaphore(found.token, *_kind_and_index(found, number))


def _semaphores_of(found: Segment) -> list[tuple[str, int]]:
    """Return name and inode of every semaphore that a segment records."""
    shape, words = found.layout, found.words
    recorded = [
        (_permit_name(found, number), words[shape.at(PERMITS, number, "semaphore_inode")])
        for number in range(shape.semaphores)
    ]
    for index in range(shape.groups):
        for kind, column in (("b", "bell_inode"), ("w", "endpoint_bell_inode")):
            recorded.append((found.names.semaphore(found.token, kind, index), words[shape.at(GROUPS, index, column)]))
    return [(name, inode) for name, inode in recorded if inode]


def _removed_endpoints(old: PoolSettings | None, wanted: tuple[EndpointSettings, ...]) -> tuple[EndpointSettings, ...]:
    names = {e.name for e in wanted}
    rows_left = old.endpoints if old else ()
    return tuple(e._replace(max_connections=0, weight=0) for e in rows_left if e.name not in names)


def _removed_groups(old: PoolSettings | None, wanted: tuple[GroupSettings, ...]) -> tuple[GroupSettings, ...]:
    names = {g.name for g in wanted}
    rows_left = old.groups if old else ()
    return tuple(g._replace(connections=0) for g in rows_left if g.name not in names)


def _changes(old: PoolSettings | None, new: PoolSettings) -> list[str]:
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


def _by_name(
    settings: Iterable[EndpointSettings] | Iterable[GroupSettings],
) -> Mapping[str, EndpointSettings | GroupSettings]:
    return {row.name: row for row in settings}


def _cap(row: EndpointSettings | GroupSettings) -> int:
    return row.connections if isinstance(row, GroupSettings) else row.max_connections
