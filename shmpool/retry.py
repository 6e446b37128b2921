"""Running a function on a connection, and again where that is safe (`Pool.run`).

    what went wrong                                      read-only group    other group, nothing was made to last
    the connection was lost before a statement was sent  again              again
    serialization failure, deadlock                      again              again: the whole transaction was rolled back
    lost later                                           again              not
    lost while the transaction ended                     again              not: it may have been committed
    anything else                                        not                not

With autocommit each statement is made to last by itself, so those groups run a function once unless they are read-only;
so does a function that commits by itself, or turns autocommit on, before it fails.  An idle connection that had died is
replaced before the function begins, in any group.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from psycopg2 import DatabaseError
from psycopg2.errorcodes import DEADLOCK_DETECTED, SERIALIZATION_FAILURE
from psycopg2.extensions import STATUS_READY, TRANSACTION_STATUS_IDLE

from shmpool.chance import chance
from shmpool.clock import monotonic
from shmpool.connection import Connection, is_alive
from shmpool.lease import give_back
from shmpool.pool_errors import ConnectionLost, TransactionOutcomeUnknown
from shmpool.settings import GroupSettings

if TYPE_CHECKING:
    from shmpool.handle import Handle
    from shmpool.pool import Pool
    from shmpool.position import CommitPosition

FIRST_PAUSE_S: Final = 0.01  # doubled with each try
LONGEST_PAUSE_S: Final = 0.5

Result = TypeVar("Result")


class Failure(Enum):
    """How a try ended."""

    UNSENT = 0  # lost before a statement was sent
    ROLLED_BACK = 1  # by the server, the whole transaction: serialization failure, deadlock
    LOST = 2  # lost after a statement was sent
    UNKNOWN = 3  # lost while the transaction ended
    OTHER = 4  # not the connection's doing, or for good


def may_run_again(failure: Failure, *, is_read_only: bool, has_lasted: bool) -> bool:
    """Whether running the function again is safe.

    Args:
        is_read_only: what it does at the server has no effect.
        has_lasted: something that it did may have been made to last before the failure.
    """
    if is_read_only:
        return failure is not Failure.OTHER
    return failure in (Failure.UNSENT, Failure.ROLLED_BACK) and not has_lasted


def failure_of(error: DatabaseError) -> Failure:
    """Return what an error of the connection means."""
    if isinstance(error, ConnectionLost):
        return Failure.LOST if error.was_sent else Failure.UNSENT
    if isinstance(error, TransactionOutcomeUnknown):
        return Failure.UNKNOWN
    return Failure.ROLLED_BACK if error.pgcode in (SERIALIZATION_FAILURE, DEADLOCK_DETECTED) else Failure.OTHER


def pause_before(number: int, now: float) -> float:
    """Return the seconds to wait before try `number` (from 1), jittered by `now`, a number from 0 to 1."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) * (0.5 + now))


class Attempt(NamedTuple):
    """One try: what it began with."""

    connection: Connection
    group: GroupSettings
    commits: int

    def may_follow(self, error: DatabaseError) -> bool:
        """Whether another try is safe after an error; asked before the connection is given back."""
        conn = self.connection
        if conn.failure is None or conn.failure() is not error:
            return False  # of another connection, or the function's own
        return may_run_again(failure_of(error), is_read_only=self._is_read_only(), has_lasted=self._has_lasted())

    def _is_read_only(self) -> bool:
        if self.group.target == "replica":
            return True
        return self.group.readonly and self.connection.readonly is not False

    def _has_lasted(self) -> bool:
        conn = self.connection
        is_ended_by_sql = conn.status != STATUS_READY and conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
        return self.group.autocommit or conn.commits != self.commits or is_ended_by_sql


def run(
    pool: Pool,
    group: str,
    function: Callable[[Any], Result],
    *,
    retries: int,
    timeout: float | None,
    after: CommitPosition | None,
) -> Result:
    """Do what `Pool.run` promises."""
    began, remaining = monotonic(), timeout
    for number in itertools.count(1):
        handle = _checkout(pool, group, remaining, after)
        lease = handle._lease
        assert lease is not None
        attempt = Attempt(lease.connection, lease.recipe.group, lease.connection.commits)
        deadline = began + (attempt.group.timeout if timeout is None else timeout)
        del lease
        try:
            result = function(handle)
            if handle._lease is not None and not attempt.group.autocommit:
                attempt.connection.commit()
            return result
        except DatabaseError as error:
            pause = pause_before(number, chance())
            if number > retries or monotonic() + pause >= deadline or not attempt.may_follow(error):
                raise
        finally:
            pool.checkin(handle)
        time.sleep(pause)
        remaining = max(0.0, deadline - monotonic())
    raise AssertionError("unreachable")


def _checkout(pool: Pool, group: str, timeout: float | None, after: CommitPosition | None) -> Handle:
    """Check out a connection that looks alive: one look at its socket."""
    while True:
        handle = pool.checkout(group, timeout) if after is None else pool.checkout_after(group, after, timeout)
        lease = handle._lease
        if lease is None or is_alive(lease.connection):
            return handle
        handle._lease = None
        give_back(lease)
