"""Which errors stand for a lost connection, and what is kept of them; no server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, TRANSACTION_STATUS_INTRANS, TRANSACTION_STATUS_UNKNOWN

from shmpool.losses import TellingConnection, tell
from shmpool.pool_errors import ConnectionLost, PoolError, QueryTimeout, TransactionOutcomeUnknown


class Told(psycopg2.OperationalError):
    """An error as a server tells it."""

    def __init__(self, severity: str | None = None, code: str | None = None) -> None:
        super().__init__("what happened\n")
        self.__setstate__({"pgcode": code})  # type: ignore[no-untyped-call]  # the stubs'
        self.severity = severity

    @property
    def diag(self) -> Any:  # type: ignore[override]  # writable in the stubs only
        """Return what the server added."""
        return SimpleNamespace(severity_nonlocalized=self.severity)


def told(error: psycopg2.OperationalError, *, may_have_ended: bool = False, **state: Any) -> PoolError | None:
    """Return what an error is told as; None: as it is."""
    known = {
        "closed": 0,
        "is_cut": False,
        "endpoint": "pg1",
        "cut_error": lambda: None,
        "get_transaction_status": lambda: TRANSACTION_STATUS_INTRANS,
    }
    conn = SimpleNamespace(**known | state)
    left: psycopg2.OperationalError = error
    try:
        tell(cast(TellingConnection, conn), error, is_open=True, is_sent=True, may_have_ended=may_have_ended)
    except PoolError as lost:
        left = lost
    assert conn.failure() is left, "what left the call is noted"
    return left if isinstance(left, PoolError) and left is not error else None


@pytest.mark.parametrize("code", ["57P01", "57P02", "25P03"])
def test_farewell_of_a_server_is_a_loss(code: str) -> None:
    """What ends the session is a loss, though the driver has not seen the end of the stream; the code is kept."""
    error = Told("FATAL", code)
    lost = told(error, get_transaction_status=lambda: TRANSACTION_STATUS_ACTIVE)
    assert isinstance(lost, ConnectionLost)
    assert lost.pgcode == code
    assert lost.__cause__ is error
    assert str(lost).endswith("rolls back: what happened")


def test_farewell_to_somebody_else_is_none() -> None:
    """The same code in an ordinary error (a foreign server's session was ended) leaves the connection as it is."""
    assert told(Told("ERROR", "57P01")) is None


@pytest.mark.parametrize("state", [{"closed": 2}, {"get_transaction_status": lambda: TRANSACTION_STATUS_UNKNOWN}])
def test_broken_connection_is_a_loss(state: dict[str, Any]) -> None:
    """By the driver's account or by libpq's; without a word of the server there is no code."""
    lost = told(Told(), **state)
    assert isinstance(lost, ConnectionLost)
    assert lost.pgcode is None


def test_cut_connection() -> None:
    """A cut query says so, and is why a cut commit is of unknown outcome; the driver's error stays in the chain."""
    error, timeout = Told(code="08006"), QueryTimeout(0.5)
    assert told(error, is_cut=True, cut_error=lambda: timeout) is timeout
    assert timeout.__cause__ is error
    unknown = told(error, is_cut=True, cut_error=lambda: timeout, may_have_ended=True)
    assert isinstance(unknown, TransactionOutcomeUnknown)
    assert unknown.__cause__ is timeout
    assert timeout.__cause__ is error
    assert unknown.pgcode == "08006"


def test_what_was_told_is_not_told_again() -> None:
    """An error of an inner call passes an outer one as it is."""
    assert told(ConnectionLost("pg1", Told()), closed=2) is None
