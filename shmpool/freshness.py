"""Read your own writes: a connection to a server that shows a commit.

    known         a connection at rest whose server passed the position, as the segment or an earlier answer says: no
                  statement
    asked         else the connection at hand: its server is asked, another one that is known to have passed gets its
                  turn, then it is asked again for a moment
    primary       else, where the group may use it

Guarantees: nothing is served on a guess: what is not known to have passed is asked over the connection itself.
Stale reads.  A position that was passed stays passed while the server lives, and a connection to it does not survive
    its end: what the segment says counts for connections older than the probe that saw it, however old both are.
Threads.  As local_group: a connection that does not serve goes back to rest, where others find it.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

from psycopg2 import OperationalError

from shmpool.clock import monotonic
from shmpool.connection import asked_standing
from shmpool.endpoints import heartbeat_age, read_sighting
from shmpool.lease import Lease, give_back
from shmpool.local_group import LocalGroup
from shmpool.pool_errors import PositionNotReached
from shmpool.position import CommitPosition, Standing, is_void, shows
from shmpool.router import Attempt
from shmpool.routing import is_role_allowed
from shmpool.states import Role
from shmpool.waiting import refuse_in_event_loop

ASK_S: Final = 0.5  # a server that does not say in time where it stands is cut off
POLL_S: Final = 0.005  # between two questions to the same server


def acquire_after(group: LocalGroup, after: CommitPosition, deadline: float, *, is_high: bool = False) -> Lease:
    """Return a connection of a group whose server shows everything up to a position.

    Args:
        is_high: as of LocalGroup.acquire.

    Raises:
        PositionNotReached, PoolTimeout, NoEligibleEndpoint: none did by `deadline` (monotonic clock).
        psycopg2.OperationalError: endpoints were tried, and none took the connection.
    """
    if is_void(after, _known(group).values()):
        return group.pop_idle() or group.acquire(deadline, is_high=is_high)
    lease = _pop_known(group, after)
    if lease is not None:
        return lease
    lease = group.pop_idle() or group.acquire(deadline, is_high=is_high)
    return _caught_up(lease, after, deadline, is_high) or _opened(group, after, deadline, is_high)


def _known(group: LocalGroup) -> dict[int, Standing]:
    """Return where the coordinator saw the endpoints last; all unknown where it did not."""
    unknown = Standing(Role.UNKNOWN, 0, 0, 0)
    sightings = {index: read_sighting(group.attachment.segment, index) for index in group.recipes}
    return {index: unknown if seen is None else seen.standing for index, seen in sightings.items()}


def _pop_known(group: LocalGroup, after: CommitPosition) -> Lease | None:
    """Take out a connection at rest whose server is known to show a position."""
    aside: list[Lease] = []
    try:
        while (lease := group.pop_idle()) is not None:
            if is_known_to_show(lease, after):
                return lease
            aside.append(lease)
    finally:
        while aside:
            group.put_idle(aside.pop())
    return None


def is_known_to_show(lease: Lease, after: CommitPosition) -> bool:
    """Whether the server of a connection surely shows a position, by what was seen of it while the connection lived."""
    endpoint, conn = lease.recipe.endpoint, lease.connection
    if endpoint.via == "pooler":
        return False  # each statement may reach another server
    if conn.seen is not None and shows(conn.seen, after):
        return True
    if endpoint.address == "service":
        return False  # the probe may have seen another server than this one
    seen = read_sighting(lease.group.attachment.segment, endpoint.index)
    return seen is not None and conn.opened_at < seen.asked_at and shows(seen.standing, after)


def _is_asked_to_show(lease: Lease, after: CommitPosition) -> bool:
    standing = asked_standing(lease.connection, ASK_S)
    return standing is not None and shows(standing, after)


def _let_rest(lease: Lease) -> None:
    """Put a connection that does not serve back to rest; close one that is of no use to others either."""
    if lease.connection.closed or lease.connection.is_cut:
        give_back(lease)
    else:
        lease.group.put_idle(lease)


def _caught_up(lease: Lease, after: CommitPosition, deadline: float, is_high: bool) -> Lease | None:
    """Ask the server at hand until it shows the position, or another one does; None: not in time."""
    if _is_asked_to_show(lease, after):
        return lease
    group = lease.group
    other = _from_one_ahead(group, after, deadline, is_high)
    if other is not None:
        _let_rest(lease)
        return other
    until = deadline
    if is_role_allowed(group.settings.target, Role.PRIMARY):
        until = min(deadline, monotonic() + group.settings.after_wait)
    while _may_catch_up(lease, after) and (remaining := until - monotonic()) > 0:
        _sleep(group, min(POLL_S, remaining), lease)
        if _is_asked_to_show(lease, after):
            return lease
    _let_rest(lease)
    return None


def _may_catch_up(lease: Lease, after: CommitPosition) -> bool:
    seen = lease.connection.seen
    if seen is None or lease.connection.closed or lease.connection.is_cut:
        return False
    return seen.role is Role.REPLICA and seen.system_identifier == after.system_identifier


def _from_one_ahead(group: LocalGroup, after: CommitPosition, deadline: float, is_high: bool) -> Lease | None:
    """Open a connection to a replica that was seen to show the position, if there is a permit for it now."""
    ahead = {i for i, seen in _known(group).items() if seen.role is Role.REPLICA and shows(seen, after)}
    lease = None
    if ahead:
        with contextlib.suppress(OperationalError):  # there are other ways
            lease = group.try_open(Attempt(ahead, is_high=is_high), deadline, may_wait=False)
    if lease is None or _is_asked_to_show(lease, after):
        return lease
    _let_rest(lease)
    return None


def _opened(group: LocalGroup, after: CommitPosition, deadline: float, is_high: bool) -> Lease:
    """Return a connection to the primary, or to whatever shows the position first."""
    began = monotonic()
    attempt = Attempt(is_high=is_high)
    tried: set[int] = set()
    may_wait = has_made_room = False
    while True:
        attempt.only = _worth_opening(group, after) - tried
        lease = _pop_known(group, after) or group.try_open(attempt, deadline, may_wait=may_wait)
        if lease is not None:
            if is_known_to_show(lease, after) or _is_asked_to_show(lease, after):
                attempt.failures.clear()  # as in LocalGroup.acquire
                return lease
            tried.add(lease.recipe.endpoint.index)
            _let_rest(lease)
        elif attempt.route is not None and attempt.route.order and not has_made_room:
            has_made_room = True  # the permit that is missing may be held by a connection that does not serve
            if (resting := group.pop_idle()) is not None:
                give_back(resting)
                continue
        if (remaining := deadline - monotonic()) <= 0:
            if attempt.failures or (attempt.route is not None and attempt.route.order):
                raise group.give_up(attempt, monotonic() - began)
            raise _not_reached(group, after)
        _sleep(group, min(POLL_S, remaining))
        may_wait = True  # not in an event loop


def _worth_opening(group: LocalGroup, after: CommitPosition) -> set[int]:
    """Return the endpoints that show the position, or may: the primary, and with a stale coordinator every one."""
    attachment = group.attachment
    if heartbeat_age(attachment.segment) > attachment.settings.stale_after:
        return set(group.recipes)
    known = _known(group)
    return {i for i, seen in known.items() if seen.role in (Role.PRIMARY, Role.UNKNOWN) or shows(seen, after)}


def _sleep(group: LocalGroup, seconds: float, lease: Lease | None = None) -> None:
    """Sleep where that stops nobody else; `lease` is not lost where it would."""
    try:
        refuse_in_event_loop(group.settings.name)
    except BaseException:
        if lease is not None:
            _let_rest(lease)
        raise
    time.sleep(seconds)


def _not_reached(group: LocalGroup, after: CommitPosition) -> PositionNotReached:
    found = {
        group.recipes[index].endpoint.name: f"a {seen.role.name.lower()} at {CommitPosition(*seen[1:])!s}"
        if seen.lsn
        else "was not seen"
        for index, seen in _known(group).items()
    }
    return PositionNotReached(group.settings.name, group.settings.target, str(after), found)
