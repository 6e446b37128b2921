"""Open the connection of a claimed token: secrets, connect, preparation, the role of the server; or give it up.

Guarantees: a token leaves here as a lease, or its permits went back, or they are the coordinator's to find out about.
Threads.  A token has one user.  What a failure teaches is shared: the router tries that endpoint last for a while.
If the process dies here.  The slot says OPENING: the coordinator counts the sessions at the server.
If a signal handler raises here.  Nobody knows how far a connect came: its permits are left to the coordinator.
"""

from __future__ import annotations

import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Final

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from shmpool import slots
from shmpool.bounded import BoundedConnection
from shmpool.chance import chance
from shmpool.clock import monotonic, slept
from shmpool.connection import (
    ConnectFailedError,
    Connection,
    Recipe,
    WrongRoleError,
    WrongServerError,
    application_name,
    open_connection,
)
from shmpool.credentials import CredentialsError, may_be_cured, read_secrets
from shmpool.endpoints import status_at
from shmpool.lease import Lease, give_back
from shmpool.router import Attempt
from shmpool.routing import is_role_allowed
from shmpool.session import prepare, role_of
from shmpool.states import Admin, Role, Use
from shmpool.words import Status

if TYPE_CHECKING:
    from shmpool.attachment import Attachment
    from shmpool.local_group import LocalGroup

LIFETIME_JITTER: Final = 0.05
LEAST_CONNECT_S: Final = 2  # libpq takes 1 for 2
REFUSED_PAUSE_S: Final = 0.05  # between rounds in which every eligible endpoint refused
_PID_MASK: Final = 0xFFFFFFFF  # a pooler makes numbers up, negative ones too
_PASSING: Final = (
    "starting up",
    "shutting down",
    "not yet accepting",
    "too many clients",
    "too many connections",
    "connection slots",
    "no more connections allowed",
    "cannot connect to server",
    "login has been failing",
)  # of a server that answers: it will serve soon


def open_lease(group: LocalGroup, token: Lease, attempt: Attempt, deadline: float) -> Lease | None:
    """Open the connection of a claimed token; None: it failed, and the permits went back."""
    attachment, settings = group.attachment, group.settings
    endpoint = token.tether.endpoint
    assert endpoint is not None
    recipe = group.recipes[endpoint.index]
    row, generation, slot = attachment.slot_name(token)
    name = application_name(settings.application_name, group.pool.name, row, generation, slot)
    token.status_at = status_at(attachment.segment, endpoint.index)
    token.status = group.table.words[token.status_at]
    status = Status.of(token.status)
    is_trial = attempt.is_trial(endpoint.index)
    is_late = is_trial and not attachment.trials.begin(endpoint.index, status.epoch)  # another thread just tries it
    if status.admin is not Admin.READY or is_late:  # drained since it was chosen
        _let_go_unopened(group, token, is_over=True)
        return None
    began = monotonic()
    try:
        conn = _connect(group, recipe, name, deadline, is_trial=is_trial)
    except (ConnectFailedError, CredentialsError) as error:
        group.table.words[token.detail_at + slots.ERRORS] += 1
        _let_go_unopened(group, token, is_over=error.is_over)
        _refused(group, endpoint.index, error, attempt, deadline)
        return None
    except BaseException:  # a signal handler raised: nobody knows how far it came
        _let_go_unopened(group, token, is_over=False)
        raise
    _fill_in(group, token, conn, recipe)
    group.table.words[token.detail_at + slots.OPENS] += 1
    group.table.times[token.detail_at + slots.OPEN_TOTAL] += monotonic() - began
    try:
        _bound(group, conn, endpoint.index)
        prepare(conn, recipe)
        role = role_of(conn, recipe)
    except ConnectFailedError as error:  # a pooler took it, and has no server for it
        group.table.words[token.detail_at + slots.ERRORS] += 1
        give_back(token)
        _refused(group, endpoint.index, error, attempt, deadline)
        return None
    except BaseException:
        give_back(token)
        raise
    if is_trial:
        attachment.say_served(endpoint.index, Role.UNKNOWN if recipe.endpoint.address == "service" else role)
    if not is_role_allowed(settings.target, role):
        give_back(token)
        is_service = recipe.endpoint.address == "service"
        wrong = (WrongServerError if is_service else WrongRoleError)(
            f"endpoint {recipe.endpoint.name!r} {'led to' if is_service else 'is'} a {role.name.lower()}, group "
            f"{settings.name!r} wants {settings.target}"
        )
        _refused(group, endpoint.index, wrong, attempt, deadline)
        return None
    if is_trial:
        attachment.trials.succeeded(endpoint.index)
    if settings.target == "primary" and not settings.readonly:
        conn.doubt_role = partial(_tell_refusal, weakref.ref(attachment), endpoint.index)
    group.router.trust(endpoint.index)
    return token


def _connect(group: LocalGroup, recipe: Recipe, name: str, deadline: float, *, is_trial: bool) -> Connection:
    """Read the secrets and connect; once more, a moment later, where they may just be being replaced.

    Args:
        is_trial: little hope: it is not to take much longer than the caller has time.

    Raises:
        ConnectFailedError, CredentialsError: that failed, too, or there was no time for it.
    """
    endpoint, used = recipe.endpoint, None
    if is_trial:
        recipe = recipe._replace(dsn=_bounded_dsn(recipe.dsn, deadline))
    try:
        used = read_secrets(endpoint, group.pool.credentials)
        return open_connection(recipe, name, used)
    except (ConnectFailedError, CredentialsError) as error:
        remaining = deadline - monotonic()
        if remaining <= 0 or not error.is_refused or is_passing(error):
            raise
        time.sleep(min(REFUSED_PAUSE_S, remaining))
        now = read_secrets(endpoint, group.pool.credentials)
        if used is not None and not may_be_cured(str(error), used, now):
            raise
        return open_connection(recipe, name, now)


def _bounded_dsn(dsn: str, deadline: float) -> str:
    """Return a conninfo whose connect takes no longer than it says, nor than there is time (libpq knows seconds)."""
    left = max(LEAST_CONNECT_S, int(deadline - monotonic()))
    own = int(parse_dsn(dsn).get("connect_timeout") or 0)
    return make_dsn(dsn, connect_timeout=min(own, left) if own > 0 else left)


def _bound(group: LocalGroup, conn: Connection, endpoint: int) -> None:
    """Have the time of a connection's queries watched, where the group wants that."""
    seconds = group.settings.query_timeout
    if seconds is not None and isinstance(conn, BoundedConnection):
        conn.watch(seconds, partial(_tell_cut, weakref.ref(group), endpoint))


# What a connection calls does not keep its group: the slot table refers to the connection, and the circle would keep a
# connection open that nobody has.


def _tell_refusal(attachment: weakref.ref[Attachment], endpoint: int) -> None:
    """Let the coordinator look at a primary that refused a write."""
    if (attached := attachment()) is not None:
        attached.say_evidence(endpoint, "a write was refused (25006)")


def _tell_cut(of: weakref.ref[LocalGroup], endpoint: int, told: str) -> None:
    """Log that a query was cut off, and let the coordinator look at the server."""
    import logging  # cold, and an application has it anyway

    group = of()
    if group is None:
        return
    group.attachment.say_evidence(endpoint, told)
    name = group.recipes[endpoint].endpoint.name if endpoint in group.recipes else str(endpoint)
    logging.getLogger("shmpool").warning(
        "pool %s: group %s, endpoint %s: %s", group.pool.name, group.settings.name, name, told
    )


def _fill_in(group: LocalGroup, token: Lease, conn: Connection, recipe: Recipe) -> None:
    """Make a claimed token a lease: from here on a dropped reference leads to close and release."""
    table = group.table
    token.connection = conn
    token.tether.resource = conn
    token.table, token.words, token.times = table, table.words, table.times
    token.page = table.page[token.page_at : token.page_at + 1]
    token.group, token.pool, token.recipe = group, group.pool, recipe
    token.idle, token.waiters = group.idle, group.queue.waiters
    if group.attachment.keeps_nothing:
        token.recall_at = token.word_at  # as if recalled all the time
    token.idle_use = int(Use.IDLE) | group.permits.index << 8
    token.active_use = int(Use.ACTIVE) | group.permits.index << 8
    token.marks = conn.marks
    token.since = monotonic()
    token.slept = slept()
    token.since_at = token.detail_at + slots.SINCE
    token.checkouts_at = token.detail_at + slots.CHECKOUTS
    token.checkouts = table.words[token.checkouts_at]
    jitter = 1 - LIFETIME_JITTER * chance()
    token.expires = conn.opened_at + group.settings.max_lifetime * jitter
    table.words[token.detail_at + slots.ENDPOINT_EPOCH] = Status.of(token.status).epoch
    table.words[token.detail_at + slots.BACKEND_PID] = conn.get_backend_pid() & _PID_MASK


def _let_go_unopened(group: LocalGroup, token: Lease, *, is_over: bool) -> None:
    """Give a token's permits back, or, if a session may yet appear at the server, leave them to the coordinator."""
    if is_over:
        group.table.release(token)
    else:
        group.table.abandon(token)


def _refused(
    group: LocalGroup, endpoint: int, error: psycopg2.OperationalError, attempt: Attempt, deadline: float
) -> None:
    """Note that an endpoint did not serve; pause once a round, and tell the coordinator.

    That a name of several servers led to the wrong one says nothing against it, and is tried once more at once.  Of an
    endpoint that is DOWN nobody is told anything new.
    """
    if attempt.is_trial(endpoint):
        attempt.has_tried = True
        group.attachment.trials.failed(endpoint, error)
        return
    again = endpoint in attempt.failures
    attempt.failures[endpoint] = error
    if not isinstance(error, WrongServerError):
        group.attachment.say_evidence(endpoint, str(error))
    elif not again:
        return
    group.router.avoid(endpoint)
    eligible = set(attempt.route.order) if attempt.route else set()
    if eligible <= set(attempt.failures):
        if _is_hopeless(attempt):
            raise error
        if again or len(eligible) == 1:
            time.sleep(max(0.0, min(REFUSED_PAUSE_S, deadline - monotonic())))


def _is_hopeless(attempt: Attempt) -> bool:
    """Whether every failure is of a kind that does not pass by itself: credentials, database, certificate."""
    return all(
        isinstance(error, CredentialsError)
        or (isinstance(error, ConnectFailedError) and error.is_untrusted)
        or ("FATAL:" in str(error) and not is_passing(error))
        for error in attempt.failures.values()
    )


def is_passing(error: psycopg2.OperationalError) -> bool:
    """Whether a server that answers will serve soon, as it says."""
    return any(passing in str(error) for passing in _PASSING)
