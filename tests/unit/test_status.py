"""Judging a pool from a frozen view."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shmpool import tables
from shmpool.judgement import judge, missing
from shmpool.layout import ENDPOINTS, HEADER
from shmpool.states import Admin, Health, Role, SegmentState, Use, Verdict
from shmpool.status import Facts, Level, LostName, RowState, as_json, duration
from shmpool.words import Control, Kind
from tests.support.pools import (
    CONNINFO,
    healthy,
    permit_row,
    slot_row,
    view,
    worker_row,
    zeros,
)

RUNNING = Facts(coordinator_pid=5)


def codes(facts: Facts = RUNNING, **changes: Any) -> dict[str, Level]:
    """Judge a view and return the findings' codes and levels."""
    return {finding.code: finding.level for finding in judge(view(**changes), facts).findings}


def endpoint(**changes: Any) -> dict[str, Any]:
    """Return the view's endpoint table with another status."""
    row = zeros(ENDPOINTS, status=healthy(**changes), since=40.0, probed_at=99.0, latency=0.002, lag=-1.0)
    return {"endpoints": {0: row}}


def two_primaries(*timelines: int) -> dict[str, Any]:
    """Return the view's endpoint table with primaries of one cluster, the first of which is kept out."""
    statuses = (healthy(verdict=Verdict.ROLE_CONFLICT), healthy())
    known = {"since": 40.0, "probed_at": 99.0, "lag": -1.0, "system_identifier": 7}
    rows = zip(statuses, timelines, strict=True)
    return {
        "endpoints": {
            index: zeros(ENDPOINTS, **known, status=status, timeline=timeline, server_start_wall=index + 1)
            for index, (status, timeline) in enumerate(rows)
        }
    }


def busy(*slots: Any, **changes: Any) -> dict[str, Any]:
    """Return a view's parts when all three permits of group and endpoint are held, beside `slots`."""
    held = [slot_row(n, "yy", Use.ACTIVE) for n in range(3)]
    taken = {"value": 0, "certain": 3}
    return {
        "permits": (permit_row(Kind.GROUP, **taken), permit_row(Kind.ENDPOINT, **taken)),
        "workers": (worker_row(*held, *slots, **changes),),
    }


def test_a_pool_at_rest_is_fine() -> None:
    """Nothing wrong: no finding, level FINE, invariants judged."""
    report = judge(view(), RUNNING)
    assert (report.level, report.findings, report.is_judged) == (Level.FINE, (), True)


@pytest.mark.parametrize(
    ("facts", "changes", "code", "level"),
    [
        (Facts(None), {}, "coordinator-not-running", Level.NOT_RUNNING),
        (
            Facts(None),
            {"header": zeros(HEADER)},
            "coordinator-not-running",
            Level.NOT_RUNNING,
        ),
        (RUNNING, {"header": zeros(HEADER, heartbeat=80.0)}, "coordinator-stalled", Level.DEGRADED),
        (RUNNING, {"header": zeros(HEADER)}, "coordinator-stalled", Level.DEGRADED),
        (RUNNING, {"state": SegmentState.RETIRED}, "segment-retired", Level.DEGRADED),
        (Facts(5, (LostName("/dev/shm/x", 3, 0),)), {}, "name-lost", Level.DEGRADED),
        (Facts(5, (LostName("/dev/shm/x", 3, 4),)), {}, "name-lost", Level.DEGRADED),
        (RUNNING, {"is_clean": False}, "not-judged", Level.FINE),
        (
            RUNNING,
            {"permits": (permit_row(Kind.GROUP, value=2),)},
            "invariant-violated",
            Level.DEGRADED,
        ),
        (
            RUNNING,
            {"permits": (permit_row(Kind.GROUP, out_of_bounds=1),)},
            "audit-out-of-bounds",
            Level.DEGRADED,
        ),
        (
            RUNNING,
            {"permits": (permit_row(Kind.GROUP, control=Control(2, 3, 0)),)},
            "cap-changing",
            Level.FINE,
        ),
        (
            RUNNING,
            endpoint(health=Health.DOWN, verdict=Verdict.REFUSED),
            "endpoint-down",
            Level.DEGRADED,
        ),
        (RUNNING, endpoint(health=Health.UNKNOWN), "endpoint-unknown", Level.DEGRADED),
        (RUNNING, {"endpoints": {}}, "endpoint-unknown", Level.DEGRADED),
        (RUNNING, endpoint(verdict=Verdict.TIMEOUT), "endpoint-probe-failing", Level.DEGRADED),
        (
            RUNNING,
            endpoint(verdict=Verdict.MISCONFIGURED),
            "endpoint-misconfigured",
            Level.DEGRADED,
        ),
        (RUNNING, two_primaries(1, 2), "endpoint-role-conflict", Level.DEGRADED),
        (RUNNING, two_primaries(2, 2), "endpoint-role-disputed", Level.DEGRADED),
        (RUNNING, endpoint(verdict=Verdict.FULL), "endpoint-full", Level.DEGRADED),
        (RUNNING, endpoint(admin_operator=Admin.DRAIN), "endpoint-drain", Level.DEGRADED),
        (RUNNING, endpoint(admin_config=Admin.MAINT), "endpoint-maint", Level.FINE),
        (RUNNING, busy(slot_row(3, "", Use.WAITING)), "group-exhausted", Level.DEGRADED),
        (
            RUNNING,
            {"workers": (worker_row(slot_row(3, "", Use.WAITING, waits_for_endpoint=True)),)},
            "group-waits-for-endpoint",
            Level.DEGRADED,
        ),
        (RUNNING, busy(is_held=False), "worker-dead", Level.FINE),
        (Facts(None), busy(is_held=False), "worker-dead", Level.DEGRADED),
        (
            Facts(5, alive_without_lock=frozenset({0})),
            busy(is_held=False),
            "worker-lost-lock",
            Level.DEGRADED,
        ),
    ],
)
def test_each_fault_is_found_alone(facts: Facts, changes: Any, code: str, level: Level) -> None:
    """A fault gives its own finding, with the level that it deserves."""
    found = codes(facts, **changes)
    assert found[code] is level
    beside = set(found) - {code, "coordinator-not-running"}
    assert not beside


def test_the_worst_finding_decides_and_comes_first() -> None:
    """The report's level is that of its worst finding, which is listed first."""
    report = judge(view(**endpoint(health=Health.DOWN, admin_operator=Admin.DRAIN)), Facts(None))
    assert report.level is Level.NOT_RUNNING
    assert [f.level for f in report.findings] == sorted((f.level for f in report.findings), reverse=True)


def test_lost_semaphores_forbid_judging() -> None:
    """With a permit semaphore gone, missing values are not taken for violations."""
    lost = LostName("/dev/shm/sem.x.g0", 3, 0)
    report = judge(view(permits=(), workers=busy()["workers"]), Facts(5, (lost,)))
    assert not report.is_judged
    assert {f.code for f in report.findings} == {"name-lost"}


def test_figures_of_a_busy_pool() -> None:
    """Held, idle, active and waiting are counted from words and notes; counters are added up."""
    slots = (
        slot_row(0, "yy", Use.ACTIVE, counted_group=1, checkouts=5, waits=2, wait_total=1.0, wait_longest=0.8),
        slot_row(1, "yy", Use.IDLE, counted_group=1, checkouts=7, waits=2, wait_total=3.0, wait_longest=2.0),
        slot_row(2, "", Use.WAITING, since=97.0, queued=4),
        slot_row(3, "??o"),
    )
    permits = tuple(permit_row(kind, value=0, certain=2, unknown_orphan=1) for kind in (Kind.GROUP, Kind.ENDPOINT))
    report = judge(view(permits=permits, workers=(worker_row(*slots),)), RUNNING)
    group, worker, pg1 = report.groups[0], report.workers[0], report.endpoints[0]
    assert (group.held, group.idle, group.active, group.waiting, group.unknown) == (2, 1, 1, 5, 1)
    assert (group.checkouts, group.waits, group.mean_wait, group.longest_wait) == (12, 4, 1.0, 2.0)
    assert group.oldest_wait == pytest.approx(3.0)
    assert (pg1.idle, pg1.active, pg1.free, pg1.since) == (1, 1, 0, 60.0)
    assert (worker.state, worker.held, worker.waiting, worker.age) == (RowState.HELD, 2, 1, 90.0)
    assert [s.group for s in worker.slots] == ["read"] * 4
    assert [s.is_orphan for s in worker.slots] == [False] * 3 + [True]


def test_the_dead_do_not_wait() -> None:
    """A waiter whose worker is gone is not counted as waiting."""
    row = worker_row(slot_row(0, "", Use.WAITING), is_held=False)
    report = judge(view(workers=(row,)), RUNNING)
    assert (report.groups[0].waiting, report.workers[0].state) == (0, RowState.FREE)


def test_rows_of_removed_names_are_shown() -> None:
    """An endpoint that left the configuration but still has permits keeps its line."""
    permits = (*view().permits, permit_row(Kind.ENDPOINT, 1, control=Control(0, 3, 0)))
    report = judge(view(permits=permits), RUNNING)
    assert [e.name for e in report.endpoints] == ["pg1", "#1 (removed)"]


def test_lag_is_old_while_the_primary_is_not_seen() -> None:
    """Status says which lag is that of an earlier moment, in its table by a mark."""
    replica = zeros(ENDPOINTS, status=healthy(role=Role.REPLICA), probed_at=99.0, lag=3.0, system_identifier=7)
    for verdict, is_old in ((Verdict.OK, False), (Verdict.TIMEOUT, True)):
        primary = zeros(ENDPOINTS, status=healthy(verdict=verdict), probed_at=99.0, lsn=5, system_identifier=7)
        report = judge(view(endpoints={0: replica, 1: primary}), RUNNING)
        assert [e.is_lag_old for e in report.endpoints] == [is_old, False]
        target = tables.console()
        with target.capture() as captured:
            target.print(tables.whole(report, with_slots=False, with_all=True))
        assert ("3.0 s?" in captured.get()) is is_old
        assert ("endpoint-lag-old" in [finding.code for finding in report.findings]) is is_old


def test_lag_counts_for_replicas_alone() -> None:
    """A primary has no lag; a negative one is unknown."""
    row = endpoint(role=Role.REPLICA)["endpoints"][0]
    for lag, role, expected in (
        (0.5, Role.REPLICA, 0.5),
        (-1.0, Role.REPLICA, None),
        (0.5, Role.PRIMARY, None),
    ):
        rows = {0: row | {"lag": lag, "status": healthy(role=role)}}
        assert judge(view(endpoints=rows), RUNNING).endpoints[0].lag == expected


def test_json_is_plain_stable_and_free_of_secrets() -> None:
    """`as_json` has its schema, survives json and carries no connection string."""
    plain = as_json(judge(view(**busy(slot_row(3, "", Use.WAITING))), RUNNING))
    text = json.dumps(plain)
    assert json.loads(text) == plain
    assert plain["schema"] == 1
    assert (plain["exit_code"], plain["level"], plain["state"]) == (1, "degraded", "open")
    assert set(plain) == {
        "schema",
        "exit_code",
        "name",
        "level",
        "findings",
        "taken_wall",
        "state",
        "config_file",
        "config_generation",
        "is_judged",
        "violations",
        "coordinator",
        "endpoints",
        "groups",
        "workers",
    }
    assert plain["workers"][0]["state"] == "held"
    assert plain["endpoints"][0]["health"] == "up"
    assert CONNINFO not in text


def test_findings_are_sentences() -> None:
    """A finding says what was found, what it means and what to do."""
    (finding,) = missing("web", "pool 'web': no segment").findings
    assert str(finding).count("; ") >= 1
    assert str(finding).startswith("pool 'web': no segment: no worker can attach; ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1.0, "0.0 ms"),
        (0.0004, "0.4 ms"),
        (0.25, "250 ms"),
        (3.14, "3.1 s"),
        (240.0, "4.0 m"),
        (9000.0, "2.5 h"),
        (259200.0, "3.0 d"),
    ],
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    """Durations carry the unit that people read best."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("operator", "configuration", "told"),
    [
        (Admin.DRAIN, Admin.READY, "DRAIN by operator;"),
        (Admin.READY, Admin.DRAIN, "DRAIN by configuration;"),
        (Admin.DRAIN, Admin.DRAIN, "DRAIN by operator and configuration;"),
        (Admin.MAINT, Admin.DRAIN, "MAINT by operator;"),
    ],
)
def test_a_drain_says_who_wants_it(operator: Admin, configuration: Admin, told: str) -> None:
    """The finding names whose wish counts; both are in the report."""
    report = judge(view(**endpoint(admin_operator=operator, admin_config=configuration)), RUNNING)
    (finding,) = report.findings
    assert told in finding.found
    plain = as_json(report)["endpoints"][0]
    assert (plain["admin_operator"], plain["admin_configuration"]) == (
        operator.name.lower(),
        configuration.name.lower(),
    )
