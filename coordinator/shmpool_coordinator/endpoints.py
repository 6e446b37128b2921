"""The endpoint rows: what the coordinator knows and wants of each endpoint, for workers to read.

Writers.  The sole writer of the endpoint rows, but that inventory.py clears one that nobody names any more.
Stale reads.  None of its own words: nobody else writes them.
If a process dies.  Its successor goes on from the rows as they are: health, roles, lag, what the operator wants.
"""

from __future__ import annotations

from typing import Final

from shmpool.clock import monotonic
from shmpool.errors import MechanismError
from shmpool.layout import ENDPOINTS
from shmpool.replication import Lag, Server, is_disputed, is_superseded
from shmpool.routing import Candidate, is_role_allowed, slowness
from shmpool.segment import Segment
from shmpool.settings import EndpointSettings, GroupSettings, PoolSettings
from shmpool.states import ADMIN_MOVES, Admin, Health, Role, Verdict
from shmpool.views import read_row
from shmpool.words import Status
from shmpool_coordinator.health import EndpointHealth, ProbeResult

_UNKNOWN_LAG: Final = -1.0
_MICROSECONDS: Final = 1_000_000


class UnknownEndpointError(MechanismError):
    """The pool has no endpoint of that name; the message tells which there are."""


class Endpoints:
    """The endpoints of one segment."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._endpoints: tuple[EndpointSettings, ...] = ()
        self._groups: tuple[GroupSettings, ...] = ()
        self._addresses: dict[int, str] = {}
        self._identities: dict[int, tuple[object, bool]] = {}  # of servers; whether they had it one probe earlier, too

    def status(self, index: int) -> Status:
        """Return an endpoint's status word, taken apart."""
        return Status.of(self._segment.words[self._segment.layout.at(ENDPOINTS, index, "status")])

    def known_health(self, index: int) -> EndpointHealth:
        """Return what the segment says of an endpoint's health (after an adoption: the last known)."""
        status = self.status(index)
        return EndpointHealth(health=status.health, role=status.role, verdict=status.verdict)

    def follow(self, settings: PoolSettings) -> None:
        """Go by these settings from now on, and forget the addresses of endpoints that they do not name."""
        self._endpoints, self._groups = settings.endpoints, settings.groups
        configured = {e.index for e in self._endpoints}
        self._addresses = {index: address for index, address in self._addresses.items() if index in configured}
        self._identities = {index: known for index, known in self._identities.items() if index in configured}

    def remember(self, settings: PoolSettings) -> None:
        """Take the servers that an earlier coordinator saw for known ones."""
        self._identities = {e.index: (self.server(e.index).identity, True) for e in settings.endpoints}

    def configure(self, endpoint: EndpointSettings, before: EndpointSettings | None) -> None:
        """Store what the configuration says of an endpoint, and said before."""
        self._set_status(
            endpoint.index,
            is_moved=before is not None and before.conninfo != endpoint.conninfo,
            weight=endpoint.weight,
            admin_config=Admin.READY if endpoint.max_connections else Admin.DRAIN,
        )

    def renew_epochs(self) -> None:
        """Have workers look at every connection anew."""
        for endpoint in self._endpoints:
            self._set_status(endpoint.index, is_moved=True)

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
        at = self._segment.layout.at(ENDPOINTS, index)
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
            self._segment.times[at + ENDPOINTS.column("since")] = monotonic()
        if new != old:
            self._segment.words[at + ENDPOINTS.column("status")] = new.word()

    def record_probe(self, index: int, health: EndpointHealth, result: ProbeResult) -> None:
        """Store what a probe saw."""
        words, times = self._segment.words, self._segment.times
        at = self._segment.layout.at(ENDPOINTS, index)

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
        row = read_row(self._segment, ENDPOINTS, index)
        server = Server.of(row | {"status": Status.of(row["status"])})
        return server._replace(is_settled=self._identities.get(index) == (server.identity, True))

    def _others(self, index: int) -> list[Server]:
        """Return the other servers; the configuration has the last word: one that it no longer names is not there."""
        return [self.server(e.index) for e in self._endpoints if e.index != index and e.max_connections]

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
        at = self._segment.layout.at(ENDPOINTS, index)
        seconds = self._segment.times[at + ENDPOINTS.column("lag")]
        return Lag(self._segment.words[at + ENDPOINTS.column("lag_bytes")], seconds if seconds >= 0 else None)

    def record_lag(self, index: int, lag: Lag) -> None:
        """Store how far a replica is behind."""
        at = self._segment.layout.at(ENDPOINTS, index)
        self._segment.words[at + ENDPOINTS.column("lag_bytes")] = lag.bytes or 0
        self._segment.times[at + ENDPOINTS.column("lag")] = _UNKNOWN_LAG if lag.seconds is None else lag.seconds

    def late(self) -> set[tuple[int, int]]:
        """Return the pairs of group and endpoint where a replica lags more than the group allows."""
        known = [(e, self.status(e.index), self.lag(e.index)) for e in self._endpoints]
        candidates = [Candidate(e, status, 0, lag.seconds, lag.bytes) for e, status, lag in known]
        return {(g.index, c.settings.index) for g in self._groups for c in candidates if slowness(g, c)}

    def record_serving(self, index: int, health: EndpointHealth) -> None:
        """Store that an endpoint serves, as a worker told; one that changed its role meanwhile has another timeline."""
        at = self._segment.layout.at(ENDPOINTS, index)
        if health.role is not self.status(index).role:
            self._segment.words[at + ENDPOINTS.column("timeline")] = 0
        self.judge(index, health)

    def has_vacant_role(self) -> bool:
        """Whether some group has no endpoint that is UP in a role that serves it."""
        usable = self.usable()
        up = {e.index for e in self._endpoints if self.status(e.index).health is Health.UP}
        return any(not usable[group.index] & up for group in self._groups if group.connections)

    def usable(self) -> dict[int, frozenset[int]]:
        """Return by group the endpoints that are not DOWN and in a role that serves it."""
        statuses = [(e, self.status(e.index)) for e in self._endpoints]
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
            for group in self._groups
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
        wishes = {e.name: self.status(e.index).admin_operator for e in self._endpoints}
        return {name: wish for name, wish in wishes.items() if wish is not Admin.READY}

    def drained(self) -> frozenset[int]:
        """Return the endpoints at which nothing is to rest: those that are not READY."""
        return frozenset(e.index for e in self._endpoints if self.status(e.index).admin is not Admin.READY)

    def groups_left_alone_by(self, name: str) -> list[str]:
        """Return the groups that have no usable endpoint and that this one would serve if it were READY."""
        index, usable = self._endpoint(name).index, self.usable()
        role, is_ready = self.status(index).role, self.status(index).admin is Admin.READY
        return [
            group.name
            for group in self._groups
            if not is_ready
            and not usable[group.index]
            and group.connections
            and (not group.endpoints or name in group.endpoints)
            and is_role_allowed(group.target, role)
        ]

    def _endpoint(self, name: str) -> EndpointSettings:
        for endpoint in self._endpoints:
            if endpoint.name == name:
                return endpoint
        there_are = ", ".join(e.name for e in self._endpoints)
        pool = self._segment.names.pool
        raise UnknownEndpointError(f"pool {pool!r} has no endpoint {name!r}; there are: {there_are}")
