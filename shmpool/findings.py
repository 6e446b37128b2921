"""What is wrong with a pool, in words: what was found, what it means, what to do.  Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from shmpool.settings import PoolSettings
from shmpool.states import Admin, Health, SegmentState, Verdict
from shmpool.status import (
    CoordinatorReport,
    EndpointReport,
    Facts,
    Finding,
    GroupReport,
    Level,
    Report,
    RowState,
    WorkerReport,
    duration,
)
from shmpool.views import PoolView


def find(view: PoolView, facts: Facts, report: Report) -> Iterator[Finding]:
    """Say what is worth a look in a report on this view, which has no findings yet."""
    coordinator, workers = report.coordinator, report.workers
    assert coordinator is not None  # known of whatever has a view
    is_live = _is_live(view, coordinator)
    yield from _coordinator_findings(view, coordinator)
    yield from _segment_findings(view, facts, workers)
    yield from _invariant_findings(view, report.violations, report.is_judged)
    for endpoint in report.endpoints:
        yield from _endpoint_findings(endpoint)
    for group in report.groups:
        yield from _group_findings(group)
    yield from _cap_findings(report.endpoints, report.groups)
    for worker in workers:
        yield from _worker_findings(worker, is_live)
    yield from _orphan_findings(workers, is_live)


def _is_live(view: PoolView, coordinator: CoordinatorReport) -> bool:
    age = coordinator.heartbeat_age
    return coordinator.pid is not None and age is not None and age <= view.settings.stale_after


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
            "no connection goes there, but that workers try it now and then where nothing else is eligible",
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
