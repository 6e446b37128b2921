"""What the coordinator makes of several servers' probes: primaries that compete, replicas that lag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shmpool.replication import Lag
from shmpool.states import Admin, Health, Role, Verdict
from shmpool_coordinator.daemon import Daemon
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from tests.support.desk import close_desk, config_of, open_desk

ENDPOINTS = {"pg1": 3, "pg2": 3}


@pytest.fixture
def daemon(pool_name: str) -> Iterator[Daemon]:
    """A coordinator of two endpoints in this process; its loop does not run, so its own probes tell it nothing."""
    made = Daemon(config_of(pool_name, endpoints=ENDPOINTS))
    yield made
    made._end()


def see(daemon: Daemon, index: int, role: Role, **changes: Any) -> None:
    """Hand in the result of a probe that was answered."""
    values = {"timeline": 1, "system_identifier": 7, "lsn": 1000, "server_version": 170000} | changes
    values.setdefault("started_at", index + 1.0)
    daemon.lookout.advance(index, ProbeResult(verdict=Verdict.OK, role=role, **values))


def fail(daemon: Daemon, index: int, times: int = 1) -> None:
    """Hand in the results of probes that timed out."""
    for _ in range(times):
        daemon.lookout.advance(index, ProbeResult(verdict=Verdict.TIMEOUT))


def verdicts(daemon: Daemon) -> list[Verdict]:
    """Return the verdicts of both endpoints, as workers see them."""
    return [daemon.registry.endpoints.status(index).verdict for index in (0, 1)]


def test_promotion_supersedes_the_other_primary_at_once(daemon: Daemon) -> None:
    """The probe that shows a newer timeline takes the older primary out, with a new epoch for idle connections."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.REPLICA)
    epoch = daemon.registry.endpoints.status(0).epoch
    assert verdicts(daemon) == [Verdict.OK, Verdict.OK]
    see(daemon, 1, Role.PRIMARY, timeline=2)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.OK]
    assert daemon.registry.endpoints.status(0).epoch > epoch
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.OK]
    see(daemon, 0, Role.REPLICA, timeline=2)
    assert verdicts(daemon) == [Verdict.OK, Verdict.OK]


def test_superseded_primary_stays_out_while_the_newer_is_down(daemon: Daemon) -> None:
    """Failing probes of either primary, or its death, bring no older timeline back."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.PRIMARY, timeline=2)
    fail(daemon, 1, times=3)
    fail(daemon, 0)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.TIMEOUT]
    assert 0 not in daemon.registry.endpoints.usable()[0]
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.TIMEOUT]


def test_successor_remembers_which_primary_counts(pool_name: str) -> None:
    """A coordinator that adopts the segment knows the newer timeline of a server that it never saw itself."""
    up = EndpointHealth(health=Health.UP, role=Role.PRIMARY, verdict=Verdict.OK)
    first = open_desk(config_of(pool_name, endpoints=ENDPOINTS))
    first.endpoints.record_probe(1, up, ProbeResult(verdict=Verdict.OK, timeline=2, system_identifier=7))
    close_desk(first, unlink=False)
    second = open_desk(config_of(pool_name, endpoints=ENDPOINTS))
    try:
        second.endpoints.record_probe(0, up, ProbeResult(verdict=Verdict.OK, timeline=1, system_identifier=7))
        assert second.endpoints.status(0).verdict is Verdict.ROLE_CONFLICT
        assert second.endpoints.status(1).verdict is Verdict.OK
    finally:
        close_desk(second)


def test_endpoint_that_is_being_removed_supersedes_nobody(daemon: Daemon, pool_name: str) -> None:
    """Who takes the newer primary out of the configuration wants the other one."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.PRIMARY, timeline=2)
    daemon.registry.configure(config_of(pool_name, endpoints={"pg1": 3}))
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon)[0] is Verdict.OK


def test_first_primary_of_a_timeline_stays(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    """A second primary on the same timeline is out from its first probe, with a word in the log, and stays so."""
    see(daemon, 1, Role.REPLICA)
    for _ in range(2):
        see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.OK, Verdict.ROLE_CONFLICT]
    assert (
        "endpoint pg2: UP, primary, role_conflict (another primary of its cluster is on timeline 1, too" in caplog.text
    )
    for _ in range(2):
        see(daemon, 1, Role.PRIMARY)
        see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.OK, Verdict.ROLE_CONFLICT]
    see(daemon, 0, Role.REPLICA)
    assert verdicts(daemon) == [Verdict.OK, Verdict.OK]


def test_neither_of_two_primaries_that_nobody_knew_is_used(daemon: Daemon) -> None:
    """Where the first look finds two on one timeline both are out, until an administrator takes one of them away."""
    see(daemon, 1, Role.PRIMARY)
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.ROLE_CONFLICT]
    for index in (0, 1, 0, 1):
        see(daemon, index, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.ROLE_CONFLICT, Verdict.ROLE_CONFLICT]
    assert daemon.registry.endpoints.usable()[0] == frozenset()
    daemon.registry.endpoints.set_operator_wish("pg2", Admin.DRAIN)
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon)[0] is Verdict.OK


def test_newcomer_does_not_take_over_while_the_first_is_down(daemon: Daemon) -> None:
    """The first primary restarts: the newcomer stays out meanwhile, and the first serves again."""
    for _ in range(2):
        see(daemon, 0, Role.PRIMARY)
    for _ in range(2):
        see(daemon, 1, Role.PRIMARY)
    fail(daemon, 0, times=3)
    see(daemon, 1, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.TIMEOUT, Verdict.ROLE_CONFLICT]
    for _ in range(3):
        see(daemon, 0, Role.PRIMARY, started_at=9.0)
    assert daemon.registry.endpoints.status(0).health is Health.UP
    assert verdicts(daemon) == [Verdict.OK, Verdict.ROLE_CONFLICT]


def test_one_server_with_two_names_disputes_nothing(daemon: Daemon) -> None:
    """Two ways to the same server are both used, also after it was restarted."""
    for started in (1.0, 2.0):
        for index in (0, 1, 0):
            see(daemon, index, Role.PRIMARY, started_at=started)
        assert verdicts(daemon) == [Verdict.OK, Verdict.OK]


def test_successor_remembers_which_primary_was_first(pool_name: str) -> None:
    """A coordinator that adopts the segment keeps to the primary that served, whichever it probes first."""
    up = EndpointHealth(health=Health.UP, role=Role.PRIMARY, verdict=Verdict.OK)
    answers = [
        ProbeResult(verdict=Verdict.OK, timeline=1, system_identifier=7, started_at=started) for started in (1.0, 2.0)
    ]
    first = open_desk(config_of(pool_name, endpoints=ENDPOINTS))
    for index in (0, 0, 1):
        first.endpoints.record_probe(index, up, answers[index])
    close_desk(first, unlink=False)
    for order in ((0, 1), (1, 0)):
        second = open_desk(config_of(pool_name, endpoints=ENDPOINTS))
        for index in order:
            second.endpoints.record_probe(index, up, answers[index])
        assert [second.endpoints.status(index).verdict for index in (0, 1)] == [Verdict.OK, Verdict.ROLE_CONFLICT]
        close_desk(second, unlink=order == (1, 0))


def test_independent_writers_are_both_eligible(daemon: Daemon) -> None:
    """Primaries of different clusters do not compete, whatever their timelines."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.PRIMARY, timeline=5, system_identifier=8)
    see(daemon, 0, Role.PRIMARY)
    assert verdicts(daemon) == [Verdict.OK, Verdict.OK]
    assert daemon.registry.endpoints.usable()[0] == {0, 1}


def test_lag_is_unknown_until_a_primary_was_seen(daemon: Daemon) -> None:
    """A replica whose primary nobody knows has no lag; with the primary it has one."""
    see(daemon, 1, Role.REPLICA, lag_s=60.0, lsn=900)
    assert daemon.registry.endpoints.lag(1).seconds is None
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.REPLICA, lag_s=60.0, lsn=900)
    assert daemon.registry.endpoints.lag(1) == Lag(100, 60.0)


def test_idle_primary_that_writes_again_makes_no_replica_late(daemon: Daemon) -> None:
    """Once level, a replica lags since then at most, though its last transaction is an hour old."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.REPLICA, lag_s=3600.0)
    assert daemon.registry.endpoints.lag(1) == Lag(0, 0.0)
    see(daemon, 0, Role.PRIMARY, lsn=1100)
    see(daemon, 1, Role.REPLICA, lag_s=3600.0)
    behind, seconds = daemon.registry.endpoints.lag(1)
    assert behind == 100
    assert seconds is not None
    assert seconds < 60


def test_lag_stays_while_the_primary_is_gone(daemon: Daemon) -> None:
    """A dead primary makes no replica late: lag keeps its value, and falls to 0 when all that was known is replayed."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.REPLICA, lag_s=2.0, lsn=900)
    fail(daemon, 0, times=3)
    see(daemon, 1, Role.REPLICA, lag_s=500.0, lsn=950)
    assert daemon.registry.endpoints.lag(1) == Lag(50, 2.0)
    see(daemon, 1, Role.REPLICA, lag_s=900.0)
    assert daemon.registry.endpoints.lag(1) == Lag(0, 0.0)
    see(daemon, 1, Role.PRIMARY, timeline=2)
    assert daemon.registry.endpoints.lag(1) == Lag(0, 0.0)


def test_server_that_does_not_tell_positions_has_no_lag(daemon: Daemon) -> None:
    """Where the full query is refused, a replica's lag is unknown, not 0."""
    see(daemon, 0, Role.PRIMARY)
    see(daemon, 1, Role.REPLICA, lsn=None, system_identifier=None, timeline=None)
    assert daemon.registry.endpoints.lag(1).seconds is None


def test_a_name_of_several_servers_is_nobodys_primary(pool_name: str) -> None:
    """A replica beside such a name is as late as it says itself: no primary is waited for that could tell better."""
    plain = config_of(pool_name, endpoints=ENDPOINTS)
    name = plain.endpoints["pg2"].model_copy(update={"address": "service"})
    daemon = Daemon(plain.model_copy(update={"endpoints": {**plain.endpoints, "pg2": name}}))
    try:
        see(daemon, 1, Role.UNKNOWN, timeline=None, system_identifier=None, lsn=None)
        see(daemon, 0, Role.REPLICA, lag_s=3.0, lag_bytes=5)
        assert daemon.registry.endpoints.lag(0) == Lag(5, 3.0)
        assert verdicts(daemon) == [Verdict.OK, Verdict.OK]
    finally:
        daemon._end()
