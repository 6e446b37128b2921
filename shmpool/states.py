"""Every state that is stored in the segment, and the moves between states.

Codes count from 0 without gaps, and 0 is the harmless one, because fresh shared memory is zero.

Use of a slot (written by the thread that holds its token; read for status and recall, never by an audit):

    FREE ──▶ WAITING ──▶ OPENING ──▶ ACTIVE ◀──▶ IDLE
      ▲         │           │           │         │
      └─────────┴───────────┴──────▶ CLOSING ◀────┘
                                        │
                                      FREE

Health of an endpoint (written by the coordinator; rise and fall rule it, see the coordinator's `health`):

    UNKNOWN ──▶ UP ◀──▶ DOWN          UNKNOWN ──▶ DOWN

Admin of an endpoint: two wishes side by side, the operator's and the configuration's, of which the stricter one counts
and neither cancels the other (both written by the coordinator).  People may change their mind in any way:

    READY ◀──▶ DRAIN ◀──▶ MAINT       READY ◀──▶ MAINT
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class SegmentState(IntEnum):
    """Whether the segment may be attached."""

    CREATING = 0  # tables are not complete; a coordinator that finds it so starts over
    OPEN = 1  # in use
    RETIRED = 2  # no new rows; workers leave, the successor opens once it is empty


class ServerKind(IntEnum):
    """Which kind of application server a worker belongs to, as its hooks told."""

    NONE = 0  # no hook: a script, a development server, a server that shmpool has no hooks for
    GUNICORN = 1
    UWSGI = 2


class Health(IntEnum):
    """What the probes say of an endpoint."""

    UNKNOWN = 0  # not probed yet, or nobody was able to: workers try for themselves
    UP = 1  # takes connections
    DOWN = 2  # not to be tried while the coordinator lives


class Role(IntEnum):
    """What the endpoint was at the last look."""

    UNKNOWN = 0
    PRIMARY = 1  # accepts writes
    REPLICA = 2  # in recovery


class Admin(IntEnum):
    """What people want of an endpoint, whatever its health; the greater, the stricter."""

    READY = 0  # takes part
    DRAIN = 1  # gets nothing new; connections leave at checkin
    MAINT = 2  # as DRAIN, and is not probed for evidence


class Verdict(IntEnum):
    """What the last probe saw; the reason behind health, for people."""

    NONE = 0  # no probe yet
    OK = 1
    REFUSED = 2  # nobody listens, or the host is unreachable
    TIMEOUT = 3  # no answer in time
    LOST = 4  # the connection broke
    STARTING = 5  # starting up or shutting down (57P03)
    FULL = 6  # too many clients (53300): up, and never down
    MISCONFIGURED = 7  # credentials, database or certificate: degraded, never down
    ROLE_CONFLICT = 8  # not the primary that counts
    ERROR = 9  # anything else that the server said


class Use(IntEnum):
    """What a slot's owner does with it."""

    FREE = 0  # nothing
    WAITING = 1  # its thread waits for a permit of the group
    OPENING = 2  # holds both permits, connecting
    IDLE = 3  # an open connection rests in the worker's pool
    ACTIVE = 4  # the application has the connection
    CLOSING = 5  # the connection is being closed, its permits go back next


USE_MOVES: Final[dict[Use, frozenset[Use]]] = {
    Use.FREE: frozenset({Use.WAITING, Use.OPENING}),
    Use.WAITING: frozenset({Use.FREE, Use.OPENING}),
    Use.OPENING: frozenset({Use.ACTIVE, Use.CLOSING}),
    Use.IDLE: frozenset({Use.ACTIVE, Use.CLOSING}),
    Use.ACTIVE: frozenset({Use.IDLE, Use.CLOSING}),
    Use.CLOSING: frozenset({Use.FREE}),
}

HEALTH_MOVES: Final[dict[Health, frozenset[Health]]] = {
    Health.UNKNOWN: frozenset({Health.UP, Health.DOWN}),
    Health.UP: frozenset({Health.DOWN}),
    Health.DOWN: frozenset({Health.UP}),
}

ADMIN_MOVES: Final[dict[Admin, frozenset[Admin]]] = {
    Admin.READY: frozenset({Admin.DRAIN, Admin.MAINT}),
    Admin.DRAIN: frozenset({Admin.READY, Admin.MAINT}),
    Admin.MAINT: frozenset({Admin.READY, Admin.DRAIN}),
}
