"""The segment as the coordinator keeps it: made or adopted, configured, checked, removed.

Writers.  The sole writer of the header and the published configuration; endpoints.py and inventory.py write the rows.
Stale reads.  None of its own words: nobody else writes them.
If a process dies.  The next coordinator adopts the segment (adoption.py): names keep their index by the published
    configuration, and permits go on from their control words.  One that is RETIRED stays so until nothing is held
    through it; then the daemon has it replaced.

What the configuration no longer names is drained: it stays published with a cap of 0 until nothing circulates and
no slot speaks of it; only then is its row free for another name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping

from shmpool import layout
from shmpool.clock import monotonic
from shmpool.errors import MechanismError
from shmpool.layout import WORKERS, Layout
from shmpool.names import Names
from shmpool.rows import Locks, Process
from shmpool.segment import Segment
from shmpool.settings import PoolSettings
from shmpool.states import Admin, SegmentState
from shmpool_coordinator.adoption import Access, adopt, create, damage_of, warn_of_differences
from shmpool_coordinator.config import Config
from shmpool_coordinator.endpoints import Endpoints, UnknownEndpointError
from shmpool_coordinator.inventory import Inventory
from shmpool_coordinator.permits import Permits
from shmpool_coordinator.repair import repair
from shmpool_coordinator.revision import changes_between, revise

log = logging.getLogger(__name__)


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
        access, limits = Access.of(config), config.limits
        found = adopt(names, locks)
        self.is_adopted = found is not None
        shape = Layout(limits.workers, limits.slots_per_worker, limits.endpoints, limits.groups)
        self.segment: Segment = found or create(names, shape, locks, access)
        self.permits = Permits(self.segment)
        self.endpoints = Endpoints(self.segment)
        self._inventory = Inventory(self.segment, self.permits, mode=access.mode, gid=access.gid)
        self.settings: PoolSettings | None = None
        if self.is_adopted:
            self.settings = self.segment.read_settings()[1]
            self._inventory.open(self.settings)
            self.endpoints.remember(self.settings)
        if self.settings is not None and self.is_retired:
            self._apply(self.settings, self.settings)  # it ends as it is; the file is for its successor
        else:
            if self.settings is not None:
                warn_of_differences(self.segment, self.settings, config, access)
            try:
                self.configure(config)
            except (MechanismError, ValueError, OSError):
                if not self.is_adopted:
                    self.unlink()
                raise
        for name, wish in (operator_wishes or {}).items():
            with contextlib.suppress(UnknownEndpointError):  # the configuration has dropped it
                self.endpoints.set_operator_wish(name, wish)
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

    def damage(self) -> str | None:
        """Return which name no longer leads to its own inode, None if all do (checked every second)."""
        return damage_of(self.segment, self.locks)

    # -- configuration -----------------------------------------------------------------------------

    def configure(self, config: Config) -> list[str]:
        """Make `config` the current configuration; return what changed, a line for each.

        Raises:
            ValueError: it needs more than the segment has; nothing was changed.
        """
        old = self.settings
        settings = revise(old, config, self.segment.layout)
        is_changed = old is None or settings != old
        if is_changed:
            self._inventory.make(settings)
            self.segment.publish(settings)
            if old is not None:
                self.segment.set_header("reloads", self.segment.header("reloads") + 1)
        changes = changes_between(old, settings) if is_changed else []
        if config.access != self.config.access:
            changes.append("access: takes effect when the pool's names are made anew: stop coordinator and workers")
        self.settings, self.config = settings, config
        self._apply(settings, old)
        return changes

    def _apply(self, settings: PoolSettings, old: PoolSettings | None) -> None:
        """Set targets and what the configuration says of each endpoint."""
        had = {e.index: e for e in old.endpoints} if old else {}
        self.endpoints.follow(settings)
        for endpoint in settings.endpoints:
            self.endpoints.configure(endpoint, had.get(endpoint.index))
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
            self._inventory.drop_group(group.index)
        for endpoint in endpoints:
            self._inventory.drop_endpoint(endpoint.index)
        self.endpoints.follow(self.settings)
        for name in [g.name for g in groups] + [e.name for e in endpoints]:
            log.info("%s: removed, nothing held it any more", name)
        return True

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
        self.endpoints.renew_epochs()

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
        self._inventory.unlink()
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
