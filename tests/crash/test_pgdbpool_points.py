"""pgdbpool's classes are interrupted wherever a server's signal handler may raise.

The interpreter runs signal handlers after calls, at the entry of functions and when loops turn: there the `with` of a
lock is never between taking it and letting it go.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import threading
from collections.abc import Callable
from functools import cache
from types import CodeType

import psycopg2
import pytest

from shmpool.pgdbpool import Connection, Handler, private_pool, rota, session
from shmpool.pgdbpool import pool as classes
from tests.support.crashing import CAN_RAISE, InterruptedHereError, points_of, run_until
from tests.support.pgdbpool import Full, Servers, config_of
from tests.support.pgdbpool import servers as servers

FILES = frozenset(str(module.__file__) for module in (classes, private_pool, rota, session))


def interrupt() -> None:
    """Do what the signal handler does."""
    raise InterruptedHereError


@cache
def signal_offsets(code: CodeType) -> set[int]:
    """Return the bytecodes of a function right before which a signal handler may run."""
    reached = set()
    before = ""
    for instruction in dis.get_instructions(code):
        if before.startswith(("CALL", "RESUME")):
            reached.add(instruction.offset)
        before = instruction.opname
        if before.startswith("JUMP_BACKWARD"):
            reached.add(instruction.argval)
    return reached


def one_life() -> None:
    """Take a connection, use it, commit, give it back."""
    with Handler("g") as db:
        db.query("one")
        db.commit()


def on_a_dead_connection() -> None:
    """Do the same where the connection has to be made anew."""
    conn, _ = Connection.get_connection(("g", 0))
    conn.closed = 2
    one_life()


def left_by_an_exception() -> None:
    """Leave the block by an exception."""
    with contextlib.suppress(KeyError), Handler("g") as db:
        db.query("one")
        raise KeyError


def in_vain() -> None:
    """Wait while somebody has the only other connection."""
    with contextlib.suppress(psycopg2.OperationalError), Handler("g"), Handler("g"), Handler("g"):
        pass


@CAN_RAISE
@pytest.mark.parametrize("operation", [one_life, on_a_dead_connection, left_by_an_exception, in_vain])
def test_interrupted_handler_loses_no_connection(servers: Servers, operation: Callable[[], None]) -> None:
    """Wherever an exception comes, every connection can be had afterwards, each by one holder, and nobody waits."""
    servers.kind = Full

    def begin() -> None:
        Connection.init(config_of(connection_count=2, timeout=0))

    begin()
    points = [
        point for point in points_of(operation, FILES) if point.can_raise and point.offset in signal_offsets(point.code)
    ]
    assert len(points) > 40
    for point in points:
        begin()
        with contextlib.suppress(InterruptedHereError):
            run_until(operation, point.event, interrupt, FILES)
        gc.collect()
        try:
            with Handler("g") as first, Handler("g") as second:
                first.query("one")
                second.query("two")
                assert first.conn_ref is not second.conn_ref
        except BaseException as error:
            raise AssertionError(f"after {point}: {error!r}") from error
        assert Connection.get_connection_count(("g", 0)) == 0, point
    assert threading.active_count() == 1
