"""What an application sees when the pool cannot serve it, or a connection breaks.

All derive from psycopg2.OperationalError, so code that handles a database that is away handles these as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg2 import Error, InterfaceError, OperationalError


class PoolError(OperationalError):
    """Anything that keeps the pool from serving a request."""


class PoolTimeout(PoolError):  # noqa: N818  a name that users of other pools know
    """No connection became free in time.  The message says the cap, who holds it and who waits."""


class TooManyWaiting(PoolTimeout):
    """As many threads of the process as `max_waiting` allows wait for the group already; this one did not wait."""

    def __init__(self, group: str, most: int) -> None:
        super().__init__(
            f"group {group!r}: {most} threads of this process wait already, and max_waiting allows no more; "
            "`shmpool status` tells who holds the connections"
        )


class PositionNotReached(PoolTimeout):
    """No endpoint that serves the group showed a commit position in time, and the primary is not among them."""

    def __init__(self, group: str, target: str, position: str, found: Mapping[str, str]) -> None:
        told = "; ".join(f"{name}: {standing}" for name, standing in found.items()) or "no endpoint is configured"
        super().__init__(f"group {group!r} (target {target}): no endpoint shows position {position} yet: {told}")


class NoEligibleEndpoint(PoolError):  # noqa: N818  says what is missing
    """No endpoint may serve the group now.  `reasons` tells why, for each."""

    def __init__(self, group: str, target: str, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        told = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items()) or "none is configured"
        super().__init__(f"group {group!r} (target {target}): no eligible endpoint: {told}")


class QueryTimeout(PoolError):  # noqa: N818  beside PoolTimeout
    """The server did not answer in the group's `query_timeout`: the connection was cut.

    Whether the server carried out what it was asked is unknown.  Of a COMMIT that was cut it is the cause:
    TransactionOutcomeUnknown is raised.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"no answer within query_timeout, {seconds:g} s: the connection was cut; "
            "whether the server carried out what it was asked is unknown"
        )


class ConnectionLost(PoolError):  # noqa: N818  says what happened
    """The connection broke during a call; psycopg2's error is the cause, its SQLSTATE `pgcode`.

    Outside a transaction it may be done again, if what was sent may be carried out twice; a transaction that was open
    is rolled back by the server, and may be begun again as a whole.

    `endpoint`: whose.  `was_in_transaction`: one was open.  `was_sent`: a statement was, in it or, in autocommit, by
    itself: then whether that one was carried out is unknown.
    """

    def __init__(
        self, endpoint: str, reason: Exception, *, was_in_transaction: bool = False, was_sent: bool = False
    ) -> None:
        self.endpoint = endpoint
        self.was_in_transaction = was_in_transaction
        self.was_sent = was_sent
        if was_in_transaction:
            known = "in an open transaction, which the server rolls back"
        elif was_sent:
            known = "after a statement was sent; whether the server carried that one out is unknown"
        else:
            known = "before a statement was sent"
        super().__init__(f"endpoint {endpoint!r}: connection lost {known}: {str(reason).strip()}")

    @property
    def pgcode(self) -> str | None:  # type: ignore[override]  # writable in the stubs only
        """The SQLSTATE that the server gave as the reason, if it gave one."""
        return _code_of(self)


class TransactionOutcomeUnknown(PoolError):  # noqa: N818  says what is known
    """The connection broke while a transaction ended: whether it was committed is unknown.  Not to be repeated blindly.

    `endpoint`, `pgcode`: as ConnectionLost's.  The cause is psycopg2's error, or QueryTimeout.
    """

    def __init__(self, endpoint: str, reason: Exception) -> None:
        self.endpoint = endpoint
        super().__init__(
            f"endpoint {endpoint!r}: connection lost while a transaction ended; whether it took effect is unknown: "
            f"{str(reason).strip()}"
        )

    @property
    def pgcode(self) -> str | None:  # type: ignore[override]  # writable in the stubs only
        """The SQLSTATE that the server gave as the reason, if it gave one."""
        return _code_of(self)


def _code_of(error: PoolError) -> str | None:
    cause = error.__cause__
    while isinstance(cause, PoolError):
        cause = cause.__cause__
    return cause.pgcode if isinstance(cause, Error) else None


class UnknownGroup(PoolError):  # noqa: N818
    """The configuration has no group of this name."""

    def __init__(self, group: str, pool: str, known: list[str]) -> None:
        super().__init__(f"pool {pool!r} has no group {group!r}; it has {', '.join(sorted(known)) or 'none'}")


class PoolClosed(PoolError):  # noqa: N818
    """The pool object was closed; make a new one."""


class CoordinatorNotRunning(PoolError):  # noqa: N818
    """There is no segment to attach to.  The message says how to start a coordinator.

    `is_passing`: one is just being started or replaced; a checkout waits for it, as long as it may.
    """

    is_passing = False


class ConfigurationDiffers(PoolError):  # noqa: N818
    """A pool of this name lives with another configuration than the one that `Pool(config=...)` was given."""

    def __init__(self, pool: str, found: str) -> None:
        super().__init__(
            f"pool {pool!r}: another configuration is in use under this name ({found}); give this one a name of its "
            "own, or wait until the other one's coordinator has ended"
        )


class WouldBlockEventLoop(PoolError):  # noqa: N818
    """Waiting for a connection would stop an event loop; nothing was waited for."""

    def __init__(self, group: str, why: str) -> None:
        super().__init__(
            f"group {group!r}: no connection is free, and waiting would block: {why}; check out in a worker thread, "
            "or with timeout=0"
        )


class ConnectionGivenBackError(InterfaceError):
    """A handle was used after its connection had gone back to the pool."""
