"""Judge a pool: from a frozen view to a report for people and monitors.  Pure: no I/O, no clock of its own.

`judge` turns a view and what the kernel says about liveness into numbers and findings; `as_json` turns
those into plain values with stable names.  Neither knows connection strings, so no report can carry a secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from typing import Any, Final

from shmpool.invariants import check
from shmpool.replication import Server, is_lag_old, is_superseded
from shmpool.settings import EndpointSettings, GroupSettings, PoolSettings
from shmpool.states import Admin, Health, Role, SegmentState, ServerKind, Use, Verdict
from shmpool.views import PermitRow, PoolView, SlotRow, WorkerRow
from shmpool.words import NONE, YES, Kind, Status

SCHEMA: Final = 1  # of `as_json`; grows when a name goes or changes its meaning


class Level(IntEnum):
    """How well a pool is; also the exit code of `shmpool status`."""

    FINE = 0  # nothing to do
    DEGRADED = 1  # works, but something needs a look
    NOT_RUNNING = 2  # no segment, or no coordinator


class RowState(Enum):
    """Who stands behind a worker row."""

    HELD = "held"  # its owner lives
    FREE = "free"  # nobody, and nothing is held
    DEAD = "dead"  # the owner is gone, permits wait for the reaper
    LOST_LOCK = "lost lock"  # the owner lives, but its record lock is gone
    UNSEEN = "unseen"  # the lock file could not be asked


@dataclass(frozen=True, slots=True)
class LostName:
    """A name that does not lead to what the header means, or to what nobody may open."""

    name: str
    expected: int  # inode
    found: int  # inode; 0: there is no such name
    refusal: str = ""  # what is wrong with its owner or mode


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says, beside the words of the segment."""

    coordinator_pid: int | None  # who holds the coordinator's lock; 0: cannot be seen from here; None: nobody
    lost_names: tuple[LostName, ...] = ()
    alive_without_lock: frozenset[int] = frozenset()  # worker rows


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth a look."""

    level: Level
    code: str  # stable, for monitors
    found: str
    meaning: str
    cure: str

    def __str__(self) -> str:
        return f"{self.found}: {self.meaning}; {self.cure}"


@dataclass(frozen=True, slots=True)
class CoordinatorReport:
    """The coordinator, as the segment and the kernel know it."""

    pid: int | None  # of the lock's holder; 0: cannot be seen; None: not running
    heartbeat_age: float | None  # seconds; None: there never was a heartbeat
    adoptions: int
    ticks: int
    reloads: int
    reaped_rows: int


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint.  Times in seconds; None: unknown."""

    index: int
    name: str
    health: Health
    role: Role
    admin: Admin  # the stricter of the two wishes
    admin_operator: Admin
    admin_configuration: Admin
    verdict: Verdict
    weight: int
    epoch: int
    target: int
    issued: int
    free: int | None  # the semaphore's value; None: it could not be read
    held: int
    unknown: int
    idle: int
    active: int
    latency: float | None
    lag: float | None
    lag_bytes: int
    is_lag_old: bool  # a replica's, as of an earlier moment: its primary is not seen now
    is_superseded: bool  # a primary of a cluster that has one on a newer timeline
    since: float | None  # age of the present state
    probed: float | None  # age of the last probe
    failing: float | None  # age of the first failed probe, of those that failed in a row until now

    @property
    def admin_by(self) -> str:
        """Who wants what `admin` says."""
        wishes = (("operator", self.admin_operator), ("configuration", self.admin_configuration))
        return " and ".join(who for who, wish in wishes if wish is self.admin)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group.  Times in seconds; None: there was nothing to measure."""

    index: int
    name: str
    wants: str  # the kind of endpoint: primary, replica ...
    target: int
    issued: int
    free: int | None
    held: int
    unknown: int
    idle: int
    active: int
    waiting: int
    waiting_for_endpoint: int
    oldest_wait: float | None
    checkouts: int
    waits: int
    mean_wait: float | None
    longest_wait: float | None
    timeouts: int
    opens: int
    mean_open: float | None
    errors: int
    recalls: int


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot.  Times are ages in seconds."""

    number: int
    word: str
    use: Use
    group: str | None
    endpoint: str | None
    is_held: bool  # a permit is held or in doubt
    is_orphan: bool
    is_recalled: bool
    backend_pid: int
    since: float | None
    opened: float | None
    checkouts: int


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker row and its slots."""

    row: int
    pid: int
    generation: int
    server: ServerKind
    server_pid: int
    server_generation: int
    age: float | None
    state: RowState
    held: int
    idle: int
    active: int
    waiting: int
    orphans: int
    slots: tuple[SlotReport, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `shmpool status` shows."""

    name: str
    level: Level
    findings: tuple[Finding, ...]
    taken_wall: float | None = None
    state: SegmentState | None = None  # None: there is no segment to read
    config_file: str = ""
    config_generation: int = 0
    is_judged: bool = False  # whether the invariants could be checked
    violations: tuple[str, ...] = ()
    coordinator: CoordinatorReport | None = None
    endpoints: tuple[EndpointReport, ...] = ()
    groups: tuple[GroupReport, ...] = ()
    workers: tuple[WorkerReport, ...] = field(default=(), repr=False)


def duration(seconds: float | None) -> str:
    """Write a duration for people: `0.4 ms`, `12 ms`, `3.1 s`, `4.0 m`, `2.5 h`, `3.0 d`; `-` for None."""
    if seconds is None:
        return "-"
    for limit, unit, scale in ((0.01, "ms", 1000), (1, "ms", 1000), (60, "s", 1), (3600, "m", 1 / 60)):
        if seconds < limit:
            digits = 0 if limit == 1 else 1
            return f"{max(seconds, 0.0) * scale:.{digits}f} {unit}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


def missing(name: str, problem: str) -> Report:
    """Return the report on a pool whose segment is not there or cannot be read."""
    finding = Finding(
        Level.NOT_RUNNING,
        "no-segment",
        problem,
        "no worker can attach",
        "start its coordinator as this user: shmpool-coordinator run --config FILE",
    )
    return Report(name, Level.NOT_RUNNING, (finding,))


def judge(view: PoolView, facts: Facts) -> Report:
    """Return the report on a pool."""
    lost_semaphore = any("/sem." in lost.name for lost in facts.lost_names)
    is_judged = view.is_clean and not lost_semaphore
    violations = tuple(str(v) for v in check(view)) if is_judged else ()
    names = _Names(view)
    workers = tuple(_worker(view, facts, names, row) for row in view.workers)
    endpoints = tuple(_endpoint(view, workers, index, names.endpoint(index)) for index in names.endpoints)
    groups = tuple(_group(view, workers, index, names.group(index)) for index in names.groups)
    has_heartbeat = view.header["heartbeat"] > 0
    coordinator = CoordinatorReport(
        pid=facts.coordinator_pid,
        heartbeat_age=view.heartbeat_age if has_heartbeat else None,
        adoptions=view.header["coordinator_adoptions"],
        ticks=view.header["ticks"],
        reloads=view.header["reloads"],
        reaped_rows=view.header["reaped_rows"],
    )
    is_live = _is_live(view, coordinator)
    findings = (
        *_coordinator_findings(view, coordinator),
        *_segment_findings(view, facts, workers),
        *_invariant_findings(view, violations, is_judged),
        *(f for endpoint in endpoints for f in _endpoint_findings(endpoint)),
        *(f for group in groups for f in _group_findings(group)),
        *_cap_findings(endpoints, groups),
        *(f for worker in workers for f in _worker_findings(worker, is_live)),
        *_orphan_findings(workers, is_live),
    )
    return Report(
        name=view.name,
        level=max((f.level for f in findings), default=Level.FINE),
        findings=tuple(sorted(findings, key=lambda f: -f.level)),
        taken_wall=view.taken_wall,
        state=view.state,
        config_file=view.settings.config_file,
        config_generation=view.header["config_generation"],
        is_judged=is_judged,
        violations=violations,
        coordinator=coordinator,
        endpoints=endpoints,
        groups=groups,
        workers=workers,
    )


def as_json(report: Report) -> dict[str, Any]:
    """Return plain values with stable names: enums in lower case, times in seconds, None: unknown."""
    plain = _plain(asdict(report))
    assert isinstance(plain, dict)
    return {"schema": SCHEMA, "exit_code": int(report.level), **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name.lower().replace("_", "-")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _Names:
    """The names behind the indices: configured ones, and rows that outlive their configuration."""

    def __init__(self, view: PoolView) -> None:
        self._endpoints: dict[int, EndpointSettings] = {e.index: e for e in view.settings.endpoints}
        self._groups: dict[int, GroupSettings] = {g.index: g for g in view.settings.groups}
        used = {kind: {p.index for p in view.permits if p.kind is kind} for kind in Kind}
        self.endpoints = sorted({*self._endpoints, *view.endpoints, *used[Kind.ENDPOINT]})
        self.groups = sorted({*self._groups, *view.groups, *used[Kind.GROUP]})

    def endpoint(self, index: int) -> str:
        return self._endpoints[index].name if index in self._endpoints else f"#{index} (removed)"

    def group(self, index: int) -> str:
        return self._groups[index].name if index in self._groups else f"#{index} (removed)"


def _age(view: PoolView, at: float) -> float | None:
    return max(0.0, view.taken_at - at) if at > 0 else None


def _permit(view: PoolView, kind: Kind, index: int) -> PermitRow | None:
    return next((p for p in view.permits if p.kind is kind and p.index == index), None)


def _is_live(view: PoolView, coordinator: CoordinatorReport) -> bool:
    age = coordinator.heartbeat_age
    return coordinator.pid is not None and age is not None and age <= view.settings.stale_after


def _server_kind(code: int) -> ServerKind:
    """Return the kind that a worker row names; a code that a damaged or later row holds is none that we know."""
    return ServerKind(code) if code < len(ServerKind) else ServerKind.NONE


def _worker(view: PoolView, facts: Facts, names: _Names, row: WorkerRow) -> WorkerReport:
    slots = tuple(_slot(view, names, slot) for slot in row.slots)
    own = [slot for slot in slots if slot.is_held and not slot.is_orphan]
    if row.is_held is None:
        state = RowState.UNSEEN
    elif row.is_held:
        state = RowState.HELD
    elif row.number in facts.alive_without_lock:
        state = RowState.LOST_LOCK
    else:
        state = RowState.DEAD if own else RowState.FREE
    return WorkerReport(
        row=row.number,
        pid=row.values["pid"],
        generation=row.values["generation"],
        server=_server_kind(row.values["server"]),
        server_pid=row.values["server_pid"],
        server_generation=row.values["server_generation"],
        age=_age(view, row.values["attached_at"]) if state is not RowState.FREE else None,
        state=state,
        held=len(own),
        idle=_count(own, Use.IDLE),
        active=_count(own, Use.ACTIVE),
        waiting=_count(slots, Use.WAITING) if state not in (RowState.FREE, RowState.DEAD) else 0,
        orphans=sum(slot.is_orphan for slot in slots),
        slots=slots,
    )


def _count(slots: Iterable[SlotReport], use: Use) -> int:
    return sum(slot.use is use for slot in slots)


def _slot(view: PoolView, names: _Names, row: SlotRow) -> SlotReport:
    word = row.word
    is_used = row.use.use is not Use.FREE or not word.is_free
    group = row.use.group if word.group_field == NONE else word.group
    return SlotReport(
        number=row.number,
        word=str(word),
        use=row.use.use,
        group=names.group(group) if is_used else None,
        endpoint=names.endpoint(word.endpoint) if word.endpoint_field != NONE else None,
        is_held=not word.is_free,
        is_orphan=word.orphan,
        is_recalled=row.is_recalled,
        backend_pid=row.details["backend_pid"] if not word.is_free else 0,
        since=_age(view, row.details["since"]) if is_used else None,
        opened=_age(view, row.details["opened_at"]) if not word.is_free else None,
        checkouts=row.details["checkouts"],
    )


def _slots(view: PoolView, workers: Sequence[WorkerReport]) -> Iterator[tuple[SlotRow, WorkerReport]]:
    for row, worker in zip(view.workers, workers, strict=True):
        for slot in row.slots:
            yield slot, worker


def _endpoint(view: PoolView, workers: Sequence[WorkerReport], index: int, name: str) -> EndpointReport:
    row = view.endpoints.get(index, {})
    status = row.get("status", Status.of(0))
    permit = _permit(view, Kind.ENDPOINT, index)
    uses = [
        slot.use.use
        for slot, _ in _slots(view, workers)
        if slot.word.endpoint_field == YES and slot.word.endpoint == index and not slot.word.orphan
    ]
    has_probe = bool(row) and row["probed_at"] > 0
    return EndpointReport(
        index=index,
        name=name,
        health=status.health,
        role=status.role,
        admin=status.admin,
        admin_operator=status.admin_operator,
        admin_configuration=status.admin_config,
        verdict=status.verdict,
        weight=status.weight,
        epoch=status.epoch,
        target=permit.control.target if permit else 0,
        issued=permit.control.issued if permit else 0,
        free=permit.value if permit else None,
        held=permit.certain if permit else 0,
        unknown=permit.unknown_live + permit.unknown_orphan if permit else 0,
        idle=uses.count(Use.IDLE),
        active=uses.count(Use.ACTIVE),
        latency=row["latency"] if has_probe and row["latency"] > 0 else None,
        lag=row["lag"] if has_probe and row["lag"] >= 0 and status.role is Role.REPLICA else None,
        lag_bytes=row.get("lag_bytes", 0),
        is_lag_old=has_probe and status.role is Role.REPLICA and is_lag_old(*_servers(view, index)),
        is_superseded=has_probe and is_superseded(*_servers(view, index)),
        since=_age(view, row["since"]) if row else None,
        probed=_age(view, row["probed_at"]) if row else None,
        failing=_age(view, row["failing_since"]) if row and row["failing_since"] else None,
    )


def _servers(view: PoolView, index: int) -> tuple[Server, list[Server]]:
    """Return an endpoint's server and the others."""
    servers = {other: Server.of(row) for other, row in view.endpoints.items()}
    return servers.pop(index), list(servers.values())


def _group(view: PoolView, workers: Sequence[WorkerReport], index: int, name: str) -> GroupReport:
    settings = next((g for g in view.settings.groups if g.index == index), None)
    permit = _permit(view, Kind.GROUP, index)
    uses: list[Use] = []
    waits: list[float] = []
    waiting = waiting_for_endpoint = 0
    counted: list[dict[str, Any]] = []
    for slot, worker in _slots(view, workers):
        if slot.word.group_field == YES and slot.word.group == index and not slot.word.orphan:
            uses.append(slot.use.use)
        is_waiting = slot.use.use is Use.WAITING and slot.use.group == index
        if is_waiting and worker.state not in (RowState.FREE, RowState.DEAD):
            threads = 1 + slot.details["queued"]
            waiting += threads
            waiting_for_endpoint += threads * slot.use.waits_for_endpoint
            waits.append(_age(view, slot.details["since"]) or 0.0)
        if slot.details["counted_group"] == index + 1:
            counted.append(slot.details)

    def total(column: str) -> Any:
        return sum(details[column] for details in counted)

    return GroupReport(
        index=index,
        name=name,
        wants=settings.target if settings else "-",
        target=permit.control.target if permit else 0,
        issued=permit.control.issued if permit else 0,
        free=permit.value if permit else None,
        held=permit.certain if permit else 0,
        unknown=permit.unknown_live + permit.unknown_orphan if permit else 0,
        idle=uses.count(Use.IDLE),
        active=uses.count(Use.ACTIVE),
        waiting=waiting,
        waiting_for_endpoint=waiting_for_endpoint,
        oldest_wait=max(waits, default=None),
        checkouts=total("checkouts"),
        waits=total("waits"),
        mean_wait=total("wait_total") / total("waits") if total("waits") else None,
        longest_wait=max(d["wait_longest"] for d in counted) if total("waits") else None,
        timeouts=total("timeouts"),
        opens=total("opens"),
        mean_open=total("open_total") / total("opens") if total("opens") else None,
        errors=total("errors"),
        recalls=view.groups[index]["recalls"] if index in view.groups else 0,
    )


def _coordinator_findings(view: PoolView, coordinator: CoordinatorReport) -> Iterator[Finding]:
    age = coordinator.heartbeat_age
    if coordinator.pid is None:
        yield Finding(
            Level.NOT_RUNNING,
            "coordinator-not-running",
            f"no coordinator runs (last heartbeat {duration(age)} ago)" if age is not None else "no coordinator",
            "workers go on, but health is unknown, dead workers' permits stay away, caps cannot change",
            _how_to_start(view.settings),
        )
    elif not _is_live(view, coordinator):
        who = f"pid {coordinator.pid}" if coordinator.pid else "a process of another pid namespace"
        yield Finding(
            Level.DEGRADED,
            "coordinator-stalled",
            f"heartbeat {duration(age)} old while {who} holds the coordinator's lock"
            if age is not None
            else f"no heartbeat yet while {who} holds the coordinator's lock",
            "the coordinator is stopped or stuck, and as long as it lives no other can take over",
            f"continue it (kill -CONT {coordinator.pid or 'PID'}), or kill it and start another",
        )


def _how_to_start(settings: PoolSettings) -> str:
    if settings.document:
        return "its next checkout starts one: this configuration is in the processes that use the pool"
    return f"start it: shmpool-coordinator run --config {settings.config_file or 'FILE'}"


_TOLD: Final = 8  # rows of a retired segment that are named


def _segment_findings(view: PoolView, facts: Facts, workers: Sequence[WorkerReport]) -> Iterator[Finding]:
    if view.state is SegmentState.RETIRED:
        yield Finding(
            Level.DEGRADED,
            "segment-retired",
            f"retired; waiting for {_stragglers(workers)}",
            "it takes no worker in, and its successor opens when nothing is held through it",
            "a worker gives its row back when its last connection is checked in; restart one that is stuck",
        )
    elif view.state is not SegmentState.OPEN:
        yield Finding(
            Level.DEGRADED,
            f"segment-{view.state.name.lower()}",
            f"the segment is {view.state.name}",
            "it takes no worker in",
            "start its coordinator",
        )
    for lost in facts.lost_names:
        if lost.refusal:
            yield Finding(
                Level.DEGRADED,
                "name-refused",
                lost.refusal,
                "nobody opens it: new workers and a new coordinator cannot join this budget",
                "stop coordinator and workers, `shmpool cleanup`, start again",
            )
            continue
        yield Finding(
            Level.DEGRADED,
            "name-lost",
            f"{lost.name} leads to inode {lost.found}, expected {lost.expected}"
            if lost.found
            else f"{lost.name} is gone, expected inode {lost.expected}",
            "something cleans /dev/shm (systemd's RemoveIPC?); new workers cannot join this budget",
            "stop that cleaning, then restart the coordinator and the workers",
        )


def _stragglers(workers: Sequence[WorkerReport]) -> str:
    """Say what keeps a retired segment: rows of workers, and what nobody has given back yet."""
    living = [w for w in workers if w.state not in (RowState.FREE, RowState.DEAD)]
    parts = []
    if living:
        told = ", ".join(f"{w.row} (pid {w.pid}, {w.active} in use, {w.idle} idle)" for w in living[:_TOLD])
        more = f" and {len(living) - _TOLD} more" if len(living) > _TOLD else ""
        parts.append(f"rows {told}{more}")
    left = sum(w.held for w in workers if w.state is RowState.DEAD) + sum(w.orphans for w in workers)
    if left:
        parts.append(f"{left} slots that the coordinator settles")
    return " and ".join(parts) or "the coordinator to open the successor"


def _orphan_findings(workers: Sequence[WorkerReport], is_live: bool) -> Iterator[Finding]:
    orphans = sum(worker.orphans for worker in workers)
    if orphans:
        yield Finding(
            Level.FINE if is_live else Level.DEGRADED,
            "orphans",
            f"{orphans} orphaned slots still count for their endpoints",
            "their permits come back when their sessions have ended at the server",
            "nothing needs to be done" if is_live else "start the coordinator",
        )


def _invariant_findings(view: PoolView, violations: Sequence[str], is_judged: bool) -> Iterator[Finding]:
    for violation in violations:
        yield Finding(
            Level.DEGRADED,
            "invariant-violated",
            violation,
            "permits may be lost or too many",
            "keep this output for a report, and restart coordinator and workers when convenient",
        )
    if not is_judged and not view.is_clean:
        yield Finding(
            Level.FINE,
            "not-judged",
            "no two equal copies of the slot words",
            "the pool is under load and its invariants were not judged",
            "look again",
        )
    for permit in view.permits:
        if permit.out_of_bounds:
            subject = f"{permit.kind.name.lower()} #{permit.index}"
            yield Finding(
                Level.DEGRADED,
                "audit-out-of-bounds",
                f"{permit.out_of_bounds} audits of {subject} had an impossible result",
                "somebody posted or took permits past the protocol; the coordinator touches nothing then",
                f"see the coordinator's log, find who does that, then: shmpool repair {view.name}",
            )


_MISCONFIGURED: Final = (Verdict.MISCONFIGURED, Verdict.ROLE_CONFLICT, Verdict.FULL)


def _endpoint_findings(endpoint: EndpointReport) -> Iterator[Finding]:
    since = f" for {duration(endpoint.since)}" if endpoint.since is not None else ""
    failing = f" for {duration(endpoint.failing)}" if endpoint.failing is not None else ""
    verdict = endpoint.verdict.name.lower().replace("_", " ")
    subject = f"endpoint {endpoint.name}"
    if endpoint.health is Health.DOWN:
        yield Finding(
            Level.DEGRADED,
            "endpoint-down",
            f"{subject} is DOWN{since} ({verdict})",
            "no connection goes there",
            "see that the server runs and can be reached from this host",
        )
    elif endpoint.health is Health.UNKNOWN and endpoint.verdict not in _MISCONFIGURED:
        yield Finding(
            Level.DEGRADED,
            "endpoint-unknown",
            f"{subject} has health UNKNOWN{since} ({verdict})",
            "no probe told yet; workers try for themselves",
            "wait for the next probe",
        )
    elif endpoint.health is Health.UP and endpoint.verdict not in (
        Verdict.NONE,
        Verdict.OK,
        *_MISCONFIGURED,
    ):
        yield Finding(
            Level.DEGRADED,
            "endpoint-probe-failing",
            f"{subject} is UP but its probes fail{failing} ({verdict})",
            "it goes DOWN after `fall` of them, unless workers use it with success: then it is the coordinator's way",
            "see the coordinator's log and the server's, and try its conninfo from this host",
        )
    if endpoint.is_lag_old and endpoint.lag is not None:
        yield Finding(
            Level.FINE,
            "endpoint-lag-old",
            f"{subject} lags {duration(endpoint.lag)} as far as is known without its primary, which is not seen",
            "max_lag goes by this value",
            "see the primary's endpoint, or add one to the configuration",
        )
    if endpoint.verdict is Verdict.MISCONFIGURED:
        yield Finding(
            Level.DEGRADED,
            "endpoint-misconfigured",
            f"{subject} refuses the coordinator's credentials, database or certificate{failing}",
            "its health cannot be told; it is not taken out for that",
            "see the coordinator's log, correct conninfo or credentials",
        )
    elif endpoint.verdict is Verdict.ROLE_CONFLICT and not endpoint.is_superseded:
        yield Finding(
            Level.DEGRADED,
            "endpoint-role-disputed",
            f"{subject} says it is a primary, and so does another of its cluster on the same timeline",
            "nobody can tell which one counts: the newcomer gets no connection; where neither was first, none does",
            "stop the server that must not accept writes, and until it is a standby again: shmpool drain ITS-NAME",
        )
    elif endpoint.verdict is Verdict.ROLE_CONFLICT:
        yield Finding(
            Level.DEGRADED,
            "endpoint-role-conflict",
            f"{subject} says it is a primary, and so does another of its cluster",
            "the older timeline gets no connection",
            "stop the server that should not accept writes",
        )
    elif endpoint.verdict is Verdict.FULL:
        yield Finding(
            Level.DEGRADED,
            "endpoint-full",
            f"{subject} has too many clients already",
            "it is up, but takes no new connection",
            "raise the server's max_connections, or lower the caps of all hosts together",
        )
    if endpoint.admin is not Admin.READY:
        is_operator_s = endpoint.admin_operator is not Admin.READY
        yield Finding(
            Level.DEGRADED if is_operator_s else Level.FINE,  # a removal ends by itself
            f"endpoint-{endpoint.admin.name.lower()}",
            f"{subject} is set to {endpoint.admin.name} by {endpoint.admin_by}; {endpoint.held} connections are left",
            "it gets no new connection" + (", and is not probed" if endpoint.admin is Admin.MAINT else ""),
            f"when it shall take part again: shmpool ready {endpoint.name}"
            if is_operator_s
            else "nothing needs to be done: its row is free when nothing is left",
        )


def _group_findings(group: GroupReport) -> Iterator[Finding]:
    oldest = f", the oldest for {duration(group.oldest_wait)}" if group.oldest_wait is not None else ""
    elsewhere = group.waiting - group.waiting_for_endpoint
    if elsewhere and group.free == 0:
        yield Finding(
            Level.DEGRADED,
            "group-exhausted",
            f"group {group.name}: {elsewhere} waiting{oldest}, and none of {group.issued} permits is free",
            "requests are slow or time out",
            "see who holds them with `shmpool slots`; shorten holds, or raise the group's connections",
        )
    if group.waiting_for_endpoint:
        yield Finding(
            Level.DEGRADED,
            "group-waits-for-endpoint",
            f"group {group.name}: {group.waiting_for_endpoint} waiting{oldest} for an endpoint",
            "every endpoint that the group may use is full or down",
            "see the endpoints' health and caps",
        )


def _cap_findings(endpoints: Sequence[EndpointReport], groups: Sequence[GroupReport]) -> Iterator[Finding]:
    rows = [(f"endpoint {e.name}", e.issued, e.target) for e in endpoints]
    rows += [(f"group {g.name}", g.issued, g.target) for g in groups]
    for subject, issued, target in rows:
        if issued != target:
            yield Finding(
                Level.FINE,
                "cap-changing",
                f"{subject}: cap {issued}->{target}",
                "the new cap is taken on as connections are given back",
                "nothing needs to be done",
            )


def _worker_findings(worker: WorkerReport, is_live: bool) -> Iterator[Finding]:
    if worker.state is RowState.DEAD:
        yield Finding(
            Level.FINE if is_live else Level.DEGRADED,
            "worker-dead",
            f"worker row {worker.row} (pid {worker.pid}) is dead and holds {worker.held} slots",
            "they wait for the coordinator, which gives them back",
            "nothing needs to be done" if is_live else "start the coordinator",
        )
    elif worker.state is RowState.LOST_LOCK and worker.held:
        yield Finding(
            Level.DEGRADED,
            "worker-lost-lock",
            f"worker row {worker.row}: pid {worker.pid} lives but lost its record lock",
            "something in it closed a descriptor of the lock file; its row is left alone",
            "restart that worker, and find what closes descriptors it does not own",
        )
