"""Which failures a function may be run again after; no server."""

from __future__ import annotations

import psycopg2
import pytest
from psycopg2 import errors

from shmpool.pool_errors import ConnectionLost, PoolTimeout, QueryTimeout, TransactionOutcomeUnknown
from shmpool.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, Failure, failure_of, may_run_again, pause_before

SAFE = {Failure.UNSENT, Failure.ROLLED_BACK}


@pytest.mark.parametrize("failure", Failure)
def test_read_only_work_may_be_repeated_after_every_loss(failure: Failure) -> None:
    """What has no effect may be done twice; an error that would come again is not worth it."""
    for has_lasted in (False, True):
        assert may_run_again(failure, is_read_only=True, has_lasted=has_lasted) is (failure is not Failure.OTHER)


@pytest.mark.parametrize("failure", Failure)
def test_other_work_is_repeated_only_when_nothing_is_left_of_it(failure: Failure) -> None:
    """Nothing was sent, or all of it was rolled back, and nothing before was made to last."""
    assert may_run_again(failure, is_read_only=False, has_lasted=False) is (failure in SAFE)
    assert not may_run_again(failure, is_read_only=False, has_lasted=True)


class Coded(errors.OperationalError):
    """An error with a SQLSTATE."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.__setstate__({"pgcode": code})  # type: ignore[no-untyped-call]  # the stubs'


REASON = psycopg2.OperationalError("gone")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectionLost("pg1", REASON), Failure.UNSENT),
        (ConnectionLost("pg1", REASON, was_sent=True), Failure.LOST),
        (ConnectionLost("pg1", REASON, was_in_transaction=True, was_sent=True), Failure.LOST),
        (TransactionOutcomeUnknown("pg1", REASON), Failure.UNKNOWN),
        (Coded("40001"), Failure.ROLLED_BACK),
        (Coded("40P01"), Failure.ROLLED_BACK),
        (Coded("40003"), Failure.OTHER),
        (Coded("57014"), Failure.OTHER),
        (QueryTimeout(1.0), Failure.OTHER),
        (PoolTimeout("busy"), Failure.OTHER),
    ],
)
def test_failures_are_told_apart(error: psycopg2.DatabaseError, failure: Failure) -> None:
    """By class and SQLSTATE, never by text."""
    assert failure_of(error) is failure


def test_pauses_grow_are_jittered_and_bounded() -> None:
    """Each try waits about twice as long as the one before, within half and one and a half times, and never long."""
    assert pause_before(1, 0.5) == FIRST_PAUSE_S
    assert pause_before(2, 0.5) == 2 * FIRST_PAUSE_S
    assert (pause_before(1, 0.0), pause_before(1, 1.0)) == (0.5 * FIRST_PAUSE_S, 1.5 * FIRST_PAUSE_S)
    assert pause_before(60, 1.0) == 1.5 * LONGEST_PAUSE_S
