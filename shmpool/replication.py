"""Compare the servers of one cluster: which primary counts, and how far a replica is behind it.

Pure: no I/O, no clock.  Servers belong together by their system identifier; those with different ones are
independent, and each has its own primary.

Lag is 0 once replay has passed the primary's last known position, however long ago the last transaction was.  Before
that it is the age of the last replayed transaction, and never more than the time since lag was last 0: an idle primary
that writes again makes no replica late.  A primary that did not answer its last probe may have written more than is
known: the time keeps its last value, the bytes count to the last known position, and both are old (`is_lag_old`).
Where no endpoint is or may be the primary, there is only what the replica itself knows; that is old as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Self

from shmpool.states import Admin, Role, Verdict


class Server(NamedTuple):
    """What was last known of an endpoint's server; 0: not known."""

    role: Role
    is_seen: bool  # it answered its last probe, so that role and position are of now
    system_identifier: int
    timeline: int
    lsn: int  # write position of a primary, replay position of a replica

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
