"""Read the endpoint table: what routing needs to know of each endpoint now.

Writers.  The coordinator writes every word of an endpoint row; workers only read.
Stale reads.  A route may be one probe behind; the role is checked on the open connection, so no harm is done.
If a process dies.  Without a coordinator the words stay; the heartbeat tells that they are old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shmpool.clock import monotonic
from shmpool.layout import ENDPOINTS, HEADER, SLOT_WORDS
from shmpool.position import Standing
from shmpool.replication import Server, is_disputed, is_superseded
from shmpool.routing import Candidate
from shmpool.segment import Segment
from shmpool.settings import EndpointSettings
from shmpool.slots import EndpointPermits, GroupPermits
from shmpool.states import Health, Verdict
from shmpool.words import ORPHAN, PART_MASK, Control, Status

_STATUS = ENDPOINTS.column("status")
_LAG = ENDPOINTS.column("lag")
_LAG_BYTES = ENDPOINTS.column("lag_bytes")
_PROBED_AT = ENDPOINTS.column("probed_at")
_LSN = ENDPOINTS.column("lsn")
_TIMELINE = ENDPOINTS.column("timeline")
_SYSTEM = ENDPOINTS.column("system_identifier")


def status_at(segment: Segment, index: int) -> int:
    """Return where an endpoint's status word lies."""
    return segment.layout.at(ENDPOINTS, index) + _STATUS


def is_down(segment: Segment, index: int) -> bool:
    """Whether the coordinator says, or said last, that an endpoint does not serve."""
    return Status.of(segment.words[status_at(segment, index)]).health is Health.DOWN


def read_candidate(segment: Segment, settings: EndpointSettings, permits: EndpointPermits) -> Candidate:
    """Return what is known of an endpoint."""
    at = segment.layout.at(ENDPOINTS, settings.index)
    lag = segment.times[at + _LAG]
    issued = Control.of(segment.words[permits.control_at]).issued
    return Candidate(
        settings=settings,
        status=Status.of(segment.words[at + _STATUS]),
        in_use=max(0, issued - permits.semaphore.value),
        lag_s=lag if lag >= 0 else None,
        lag_bytes=segment.words[at + _LAG_BYTES],
    )


def read_candidates(
    segment: Segment, settings: tuple[EndpointSettings, ...], permits: Mapping[int, EndpointPermits]
) -> list[Candidate]:
    """Return what is known of every endpoint."""
    return [read_candidate(segment, e, permits[e.index]) for e in settings]


def epoch_of(segment: Segment, index: int) -> int:
    """Return an endpoint's epoch."""
    return Status.of(segment.words[status_at(segment, index)]).epoch


def is_overtaken(segment: Segment, settings: tuple[EndpointSettings, ...], index: int) -> bool:
    """Whether an endpoint was last seen as a primary that another one supersedes, or disputes, whatever its health."""

    def server(of: int) -> Server:
        at = segment.layout.at(ENDPOINTS, of)
        row = {column.name: segment.words[at + i] for i, column in enumerate(ENDPOINTS.columns)}
        return Server.of(row | {"status": Status.of(row["status"])})

    mine = server(index)._replace(is_out=True)  # of two that disputed, nobody can tell now which one may stay
    others = [server(e.index) for e in settings if e.index != index and e.max_connections]
    return is_superseded(mine, others) or is_disputed(mine, others)


def count_held(segment: Segment, group: GroupPermits, endpoint: EndpointPermits) -> int:
    """Count the connections that a group holds at an endpoint, those of dead workers included.

    One copy of all slot words; right for one moment, and not for the caller's next step: others claim meanwhile.
    """
    start, end = segment.layout.span(SLOT_WORDS)
    pair, mask = group.yes | endpoint.yes, PART_MASK & ~ORPHAN
    return sum(word & mask == pair for word in segment.words[start:end].tolist())


class Sighting(NamedTuple):
    """Where the coordinator saw a server stand, and when it asked (monotonic).

    It holds for the server that a connection leads to if that was opened before, and lives: it would not have survived
    the server's end.
    """

    asked_at: float
    standing: Standing


def read_sighting(segment: Segment, index: int) -> Sighting | None:
    """Return where the last probe saw an endpoint's server; None: it did not, or is just being recorded."""
    at = segment.layout.at(ENDPOINTS, index)
    asked_at: float = segment.times[at + _PROBED_AT]
    status = Status.of(segment.words[at + _STATUS])
    standing = Standing(
        status.role, segment.words[at + _SYSTEM], segment.words[at + _TIMELINE], segment.words[at + _LSN]
    )
    if not asked_at or segment.times[at + _PROBED_AT] != asked_at:
        return None
    if status.verdict is not Verdict.OK or not standing.lsn:
        return None
    return Sighting(asked_at, standing)


def heartbeat_age(segment: Segment) -> float:
    """Return how many seconds ago the coordinator ticked last."""
    return monotonic() - float(segment.times[segment.layout.at(HEADER, 0, "heartbeat")])
