"""Compare the servers of one cluster: which primary counts, and how far a replica is behind it.

Pure: no I/O, no clock.  Servers belong together by their system identifier; those with different ones are
independent, and each has its own primary.

Of several primaries of one cluster the newest timeline counts.  On the same timeline (a copy that was started, a
standby that lost its standby.signal, two standbys promoted at once) nobody can tell which one counts, and writes must
not go to both.  The one that had answered as the primary more than once before the other one did stays, and the
newcomer is out; where neither had, both are.  Who is out stays so while the other one is down as well: what was
written there must not be followed by writes here.  It ends when the other one is in recovery, or is taken out by its
administrators.

Lag is 0 once replay has passed the primary's last known position, however long ago the last transaction was.  Before
that it is the age of the last replayed transaction, and never more than the time since lag was last 0: an idle primary
that writes again makes no replica late.  A primary that did not answer its last probe may have written more than is
known: the time keeps its last value, the bytes count to the last known position, and both are old (`is_lag_old`).
Where no endpoint is or may be the primary, there is only what the replica itself knows; that is old as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Self

from shmpool.states import Admin, Health, Role, Verdict


class Server(NamedTuple):
    """What was last known of an endpoint's server; 0: not known."""

    role: Role
    is_seen: bool  # it answered its last probe, so that role and position are of now
    system_identifier: int
    timeline: int
    lsn: int  # write position of a primary, replay position of a replica
    started: int = 0  # by its own clock: tells two servers from one that has two names
    is_down: bool = False
    is_ready: bool = True  # its administrators want it to take part
    is_out: bool = False  # another primary kept it out until now
    is_settled: bool = False  # it had answered as this very primary before its last probe

    @property
    def identity(self) -> tuple[Role, int, int, int]:
        """What stays the same as long as nobody else takes over the name, and it is neither restarted nor promoted."""
        return self.role, self.system_identifier, self.timeline, self.started

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Return what an endpoint row says, whose `status` is a words.Status."""
        status = row["status"]
        return cls(
            role=status.role,
            is_seen=status.verdict is Verdict.OK and status.admin is not Admin.MAINT,
            system_identifier=row["system_identifier"],
            timeline=row["timeline"],
            lsn=row["lsn"],
            started=row["server_start_wall"],
            is_down=status.health is Health.DOWN,
            is_ready=status.admin is Admin.READY,
            is_out=status.verdict is Verdict.ROLE_CONFLICT,
        )


class Lag(NamedTuple):
    """How far a replica is behind; None: not known."""

    bytes: int | None
    seconds: float | None


def is_superseded(server: Server, others: Iterable[Server]) -> bool:
    """Whether a primary must not be used, because its cluster has one on a newer timeline.

    That one counts also while it is down: what was written there must not be followed by writes here.
    """
    return (
        server.role is Role.PRIMARY
        and server.timeline > 0
        and any(
            other.role is Role.PRIMARY
            and other.system_identifier == server.system_identifier != 0
            and other.timeline > server.timeline
            for other in others
        )
    )


def is_disputed(server: Server, others: Iterable[Server]) -> bool:
    """Whether a primary must not be used, because its cluster has another one on the same timeline."""
    rivals = [other for other in others if other.is_ready and _is_rival(server, other)]
    if server.is_out:
        return bool(rivals)
    return not server.is_settled and any(not (r.is_down or (r.is_out and r.is_settled)) for r in rivals)


def _is_rival(server: Server, other: Server) -> bool:
    """Whether two servers are primaries of one cluster on the same timeline, and not the same server."""
    mine, its = server.identity, other.identity
    return server.role is Role.PRIMARY and all(mine + its) and mine[:3] == its[:3] and mine[3] != its[3]


def primary_of(replica: Server, others: Iterable[Server]) -> Server | None:
    """Return the primary of a replica's cluster whose position is known: on the newest timeline, seen ones first."""
    known = (
        other
        for other in others
        if other.role is Role.PRIMARY and other.lsn > 0 and other.system_identifier == replica.system_identifier != 0
    )
    return max(known, key=lambda other: (other.timeline, other.is_seen, other.lsn), default=None)


def is_lag_old(replica: Server, others: Iterable[Server]) -> bool:
    """Whether a replica's lag is that of an earlier moment, or unknown, because its primary is not seen now."""
    primary = primary_of(replica, others)
    return primary is None or not primary.is_seen


def lag_of(
    replica: Server,
    others: Collection[Server],
    *,
    replay_age: float | None,
    unreplayed: int | None,
    level_for: float | None,
    last: Lag,
) -> Lag:
    """Return how far a replica is behind after it answered a probe.

    Args:
        others: the other endpoints' servers.
        replay_age: seconds since the last replayed transaction, by the replica's clock.
        unreplayed: bytes that it has received and not replayed.
        level_for: seconds since its lag was last known to be 0; None: it never was.
        last: what was known before.
    """
    primary = primary_of(replica, others)
    if primary is None:
        may_be_there = any(other.role is Role.UNKNOWN for other in others)
        return last if may_be_there else Lag(unreplayed, replay_age)
    if not replica.lsn:  # it told no position
        return Lag(unreplayed, replay_age)
    behind = max(0, primary.lsn - replica.lsn)
    if behind == 0:
        return Lag(0, 0.0)
    if not primary.is_seen:
        return Lag(behind, last.seconds)
    ages = [age for age in (replay_age, level_for) if age is not None]
    return Lag(behind, min(ages, default=None))
