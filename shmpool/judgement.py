"""Judge a pool: from a frozen view to a report.  Pure: no I/O, no clock of its own.

`judge` turns a view and what the kernel says about liveness into numbers, and has findings.py say what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from shmpool.findings import find
from shmpool.invariants import check
from shmpool.replication import Server, is_lag_old, is_superseded
from shmpool.settings import EndpointSettings, GroupSettings
from shmpool.states import Role, ServerKind, Use
from shmpool.status import (
    CoordinatorReport,
    EndpointReport,
    Facts,
    Finding,
    GroupReport,
    Level,
    Report,
    RowState,
    SlotReport,
    WorkerReport,
)
from shmpool.views import PermitRow, PoolView, SlotRow, WorkerRow
from shmpool.words import NONE, YES, Kind, Status


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
    report = Report(
        name=view.name,
        level=Level.FINE,
        findings=(),
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
    findings = sorted(find(view, facts, report), key=lambda f: -f.level)
    return replace(report, level=max((f.level for f in findings), default=Level.FINE), findings=tuple(findings))


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
        refused=total("refused"),
        opens=total("opens"),
        mean_open=total("open_total") / total("opens") if total("opens") else None,
        errors=total("errors"),
        recalls=view.groups[index]["recalls"] if index in view.groups else 0,
    )
