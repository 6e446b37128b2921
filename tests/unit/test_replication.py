"""Which primary of a cluster counts, and how far a replica is behind it."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.layout import ENDPOINTS
from shmpool.replication import Lag, Server, is_disputed, is_lag_old, is_superseded, lag_of, primary_of
from shmpool.states import Admin, Role, Verdict
from tests.support.pools import healthy, zeros

REPLICA = Server(Role.REPLICA, True, 7, 1, 900)
PRIMARY = Server(Role.PRIMARY, True, 7, 1, 1000)


def lag(
    replica: Server = REPLICA,
    primary: Server | None = PRIMARY,
    *,
    replay_age: float | None = 60.0,
    others: Collection[Server] = (),
    level_for: float | None = None,
    last: Lag = Lag(50, 3.0),  # noqa: B008  # a tuple
) -> Lag:
    """Return the lag, but for the changes of a replica 100 bytes behind."""
    servers = [*others, *([primary] if primary else [])]
    return lag_of(replica, servers, replay_age=replay_age, unreplayed=20, level_for=level_for, last=last)


def test_newer_timeline_supersedes() -> None:
    """Two primaries of one cluster: the one on the newer timeline counts, also while it is not seen."""
    newer = PRIMARY._replace(timeline=2)
    for other in (newer, newer._replace(is_seen=False)):
        assert is_superseded(PRIMARY, [other])
        assert not is_superseded(other, [PRIMARY])


@pytest.mark.parametrize(
    "other",
    [
        PRIMARY._replace(timeline=2, system_identifier=8),
        PRIMARY._replace(timeline=1),
        PRIMARY._replace(timeline=2, role=Role.REPLICA),
    ],
    ids=["of another cluster", "on the same timeline", "a replica"],
)
def test_nobody_else_supersedes(other: Server) -> None:
    """Independent writers, equals and replicas leave a primary as it is."""
    assert not is_superseded(PRIMARY, [other])


def test_what_is_unknown_supersedes_nobody() -> None:
    """Without an identifier or a timeline nothing can be compared."""
    nameless = PRIMARY._replace(system_identifier=0)
    assert not is_superseded(nameless, [nameless._replace(timeline=2)])
    assert not is_superseded(PRIMARY._replace(timeline=0), [PRIMARY._replace(timeline=2)])
    assert not is_superseded(REPLICA, [PRIMARY._replace(timeline=2)])


servers = st.builds(
    Server,
    st.sampled_from(Role),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 2000),
)


@given(st.lists(servers, max_size=5))
def test_some_primary_of_each_cluster_stays(found: list[Server]) -> None:
    """Of the primaries of a cluster at least one is not superseded; independent clusters do not touch each other."""
    for identifier in range(3):
        mine = [s for s in found if s.role is Role.PRIMARY and s.system_identifier == identifier]
        left = [s for s in mine if not is_superseded(s, found)]
        assert bool(left) == bool(mine)
        assert left == [s for s in mine if not is_superseded(s, mine)]
        if identifier:
            assert len({s.timeline for s in left if s.timeline}) <= 1


FIRST = PRIMARY._replace(started=100, is_settled=True)
NEWCOMER = PRIMARY._replace(started=200)


def test_newcomer_on_the_same_timeline_is_out() -> None:
    """The one that was the primary before stays, also while its probes fail; the newcomer is out, seen or not."""
    for first in (FIRST, FIRST._replace(is_seen=False)):
        assert is_disputed(NEWCOMER, [first])
        assert not is_disputed(first, [NEWCOMER])
        assert not is_disputed(first, [NEWCOMER._replace(is_out=True)])


def test_two_newcomers_are_both_out() -> None:
    """Where neither was the primary before the other one, nobody can tell: none is used, whoever is judged first."""
    other = NEWCOMER._replace(started=300)
    assert is_disputed(NEWCOMER, [other])
    assert is_disputed(other, [NEWCOMER._replace(is_out=True)])
    both = [one._replace(is_out=True, is_settled=True) for one in (NEWCOMER, other)]
    assert is_disputed(both[0], [both[1]])
    assert is_disputed(both[1], [both[0]])


def test_who_is_out_stays_out_while_the_other_one_is_down() -> None:
    """What was written at the other one is not followed by writes here; and that one may return, as a newcomer."""
    out = NEWCOMER._replace(is_out=True, is_settled=True)
    assert is_disputed(out, [FIRST._replace(is_down=True)])
    returned = FIRST._replace(started=400, is_settled=False)
    assert is_disputed(out, [returned])
    assert not is_disputed(returned, [out])


def test_successor_of_a_dead_primary_may_serve() -> None:
    """A primary that appears where the other one is down already, as with shared storage, is in; the old one is not."""
    assert not is_disputed(NEWCOMER, [FIRST._replace(is_down=True)])
    assert is_disputed(FIRST._replace(is_settled=False), [NEWCOMER._replace(is_settled=True)])


@pytest.mark.parametrize(
    "other",
    [
        FIRST._replace(role=Role.REPLICA),
        FIRST._replace(system_identifier=8),
        FIRST._replace(timeline=2),
        FIRST._replace(is_ready=False),
        FIRST._replace(started=NEWCOMER.started),
        FIRST._replace(started=0),
    ],
    ids=["replica", "other cluster", "other timeline", "drained", "same server by another name", "start unknown"],
)
def test_what_disputes_nothing(other: Server) -> None:
    """Only another server that is a primary of the same cluster on the same timeline, and wanted, disputes a role."""
    assert not is_disputed(NEWCOMER, [other])
    assert not is_disputed(NEWCOMER._replace(is_out=True), [other])


ranked = st.builds(
    Server,
    st.sampled_from(Role),
    st.just(True),
    st.just(7),
    st.just(1),
    st.just(1000),
    st.integers(0, 3),
    is_down=st.booleans(),
    is_ready=st.booleans(),
    is_out=st.booleans(),
    is_settled=st.booleans(),
)


@given(ranked, ranked)
def test_of_two_rivals_at_most_one_is_admitted(one: Server, other: Server) -> None:
    """Two rivals that are judged one after the other are not both let in, but for two that both were in before."""
    if one.is_out is other.is_out is False and one.is_settled and other.is_settled:
        return
    is_rivalry = one.role is other.role is Role.PRIMARY and one.started and other.started != one.started
    if not (is_rivalry and other.started and one.is_ready and other.is_ready and not one.is_down and not other.is_down):
        return
    one = one._replace(is_out=is_disputed(one, [other]))
    other = other._replace(is_out=is_disputed(other, [one]))
    assert one.is_out or other.is_out


def test_primary_that_counts() -> None:
    """A replica is measured by the primary of its own cluster on the newest timeline whose position is known."""
    old, new = PRIMARY._replace(lsn=5000), PRIMARY._replace(timeline=2)
    assert primary_of(REPLICA, [old, new]) == new
    assert primary_of(REPLICA, [old, new._replace(lsn=0)]) == old
    assert primary_of(REPLICA, [PRIMARY._replace(system_identifier=8), REPLICA]) is None
    assert primary_of(REPLICA._replace(system_identifier=0), [PRIMARY._replace(system_identifier=0)]) is None


def test_replay_that_passed_the_primary_does_not_lag() -> None:
    """With the primary's last known position replayed lag is 0, however old that is and whoever is gone."""
    level = REPLICA._replace(lsn=1000)
    assert lag(level) == Lag(0, 0.0)
    assert lag(level, PRIMARY._replace(is_seen=False)) == Lag(0, 0.0)


def test_replica_behind_lags_since_its_last_transaction() -> None:
    """Behind, lag is the age of the last replayed transaction, and never more than the time since it was level."""
    assert lag() == Lag(100, 60.0)
    assert lag(level_for=2.0) == Lag(100, 2.0)
    assert lag(level_for=90.0) == Lag(100, 60.0)
    assert lag(replay_age=None) == Lag(100, None)


def test_without_its_primary_a_replica_keeps_its_lag() -> None:
    """An unseen primary leaves the time as it was; an endpoint that may be the primary leaves everything."""
    unknown = Server(Role.UNKNOWN, False, 0, 0, 0)
    assert lag(primary=PRIMARY._replace(is_seen=False)) == Lag(100, 3.0)
    assert lag(primary=unknown) == Lag(50, 3.0)
    assert lag(primary=unknown, last=Lag(None, None)) == Lag(None, None)


def test_replicas_alone_tell_what_they_know() -> None:
    """Where no endpoint can be the primary, the last transaction's age counts, and what was received."""
    foreign = PRIMARY._replace(system_identifier=8)
    for others in ([], [foreign, REPLICA]):
        assert lag(primary=None, others=others) == Lag(20, 60.0)
        assert is_lag_old(REPLICA, others)


def test_lag_is_marked_old_without_a_seen_primary() -> None:
    """Status tells a lag of now from one of an earlier moment."""
    assert not is_lag_old(REPLICA, [PRIMARY])
    assert is_lag_old(REPLICA, [PRIMARY._replace(is_seen=False)])
    assert is_lag_old(REPLICA, [])


@pytest.mark.parametrize(
    ("changes", "is_seen"),
    [
        ({}, True),
        ({"verdict": Verdict.TIMEOUT}, False),
        ({"verdict": Verdict.FULL}, False),
        ({"admin_operator": Admin.MAINT}, False),
    ],
)
def test_server_of_a_row(changes: dict[str, object], is_seen: bool) -> None:
    """A row tells of now only if its last probe answered, and probes are made."""
    row = zeros(ENDPOINTS, system_identifier=7, timeline=1, lsn=1000) | {"status": healthy(**changes)}
    is_ready = "admin_operator" not in changes
    assert Server.of(row) == PRIMARY._replace(is_seen=is_seen, is_ready=is_ready)
