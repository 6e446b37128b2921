"""A connection's session: brought into the group's state when it is new, put back in order at checkin.

Guarantees: what a checkout gets is as the group's settings say, whatever the holder before did to the session by means
of psycopg2; what cannot be brought back in order is closed instead.
Threads.  A connection has one user at a time.  If the process dies here.  The server ends the session.
If a signal handler raises here.  The caller drops the connection, and thereby gives it back (lease.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Final

import psycopg2
from psycopg2.extensions import (
    STATUS_PREPARED,
    STATUS_READY,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_UNKNOWN,
    cursor,
)

from shmpool.connection import (
    ConnectFailedError,
    Connection,
    Recipe,
    cut_after,
    session_settings,
    transaction_settings,
)
from shmpool.states import Role

POOLER_ANSWER_S: Final = 5.0  # a pooler takes connections also while its server does not answer
_RESETS: Final = {
    "session": "reset all; close all; unlisten *; select pg_advisory_unlock_all()",
    "discard": "discard all",
}


def prepare(conn: Connection, recipe: Recipe) -> None:
    """Bring a new connection into the group's state; what `on_connect` left open is rolled back.

    Behind a pooler this asks the server for the first time, bounded in time.

    Raises:
        ConnectFailedError: the server behind a pooler was lost, or did not answer.
        Exception: whatever `on_connect` raised; the caller closes the connection.
    """
    if recipe.endpoint.via == "pooler":
        with _answering(conn, recipe):
            _apply_settings(conn, recipe)
            _set_transactions(conn, recipe)
    if recipe.autocommit:
        conn.autocommit = True
    if recipe.on_connect is not None:
        recipe.on_connect(conn)
        if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            conn.rollback()
    clear_marks(conn, recipe)


@contextlib.contextmanager
def _answering(conn: Connection, recipe: Recipe) -> Iterator[None]:
    """Bound what is asked of a new connection's server; one that is lost over it did not come about.

    Raises:
        ConnectFailedError: the server was lost, or did not answer.
    """
    told = ""
    try:
        with cut_after(conn, POOLER_ANSWER_S):
            yield
    except psycopg2.Error as error:
        if not conn.closed and not conn.is_cut:
            raise
        told = str(error).strip()
    if conn.is_cut:
        told = f"no answer within {POOLER_ANSWER_S:g} s"
    if told:
        raise ConnectFailedError(f"endpoint {recipe.endpoint.name!r}, behind its pooler: {told}")


def _apply_settings(conn: Connection, recipe: Recipe) -> None:
    """Set in SQL what a pooler refuses at start-up: one round trip, or none."""
    settings = session_settings(recipe.group)
    if recipe.autocommit:
        settings |= transaction_settings(recipe.group)
    if settings:
        conn.autocommit = True
        with conn.own_cursor(conn) as cur:
            calls = ", ".join(["set_config(%s, %s, false)"] * len(settings))
            cur.execute(f"select {calls}", [word for setting in settings.items() for word in setting])
        conn.autocommit = recipe.autocommit


def _set_transactions(conn: Connection, recipe: Recipe) -> None:
    """Have each BEGIN say what the group wants of it, so that it holds at whichever server the transaction runs."""
    group = recipe.group
    if not recipe.autocommit:
        conn.set_session(
            isolation_level=None if group.isolation_level == "default" else group.isolation_level.upper(),
            readonly=group.readonly or None,
        )


def role_of(conn: Connection, recipe: Recipe) -> Role:
    """Return the role of a connection's server, UNKNOWN where the group serves itself from every role.

    It was reported at start-up (`in_hot_standby`, PostgreSQL 14 and newer), else the server is asked.  A pooler reports
    what it heard when it connected first, which may be long ago.

    Raises:
        ConnectFailedError: the server behind a pooler was lost, or did not answer.
    """
    is_direct = recipe.endpoint.via == "direct"
    value = conn.get_parameter_status("in_hot_standby") if is_direct else None
    if value is not None:
        return Role.REPLICA if value == "on" else Role.PRIMARY
    if recipe.group.target in ("any", "prefer-replica"):
        return Role.UNKNOWN
    if is_direct:
        return _asked_role(conn)
    with _answering(conn, recipe):
        return _asked_role(conn)


def _asked_role(conn: Connection) -> Role:
    with conn.own_cursor(conn) as cur:
        cur.execute("select pg_is_in_recovery()")
        row = cur.fetchone()
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        conn.rollback()
    return Role.REPLICA if row and row[0] else Role.PRIMARY


def are_spent(marks: list[weakref.ref[cursor] | None]) -> bool:
    """Whether a checkin has nothing to look after: no session change, and every cursor is closed or gone."""
    for mark in marks:
        if mark is None:
            return False
        cur = mark()
        if cur is not None and not cur.closed:
            return False
    marks.clear()
    return True


def restore(conn: Connection, recipe: Recipe) -> bool:
    """Bring a connection back to what the group promises (the checkin contract); False: close it instead.

    A transaction is rolled back in SQL; psycopg2's own `status` misses a BEGIN in autocommit, so libpq's
    transaction status decides.  Unknown state, COPY, an asynchronous or unread result and two-phase
    transactions are beyond repair.
    """
    if conn.closed or conn.is_cut or conn.status == STATUS_PREPARED or not close_cursors(conn):
        return False
    status = conn.get_transaction_status()
    if status in (TRANSACTION_STATUS_UNKNOWN, TRANSACTION_STATUS_ACTIVE) or conn.isexecuting():
        return False
    try:
        if status != TRANSACTION_STATUS_IDLE or conn.status != STATUS_READY:
            _roll_back(conn)
        if None in conn.marks:
            _put_session_back(conn, recipe)
        elif conn.notices:
            del conn.notices[:]
        if recipe.group.reset != "none":
            _reset(conn, recipe)
    except psycopg2.Error:
        return False
    clear_marks(conn, recipe)
    return conn.get_transaction_status() == TRANSACTION_STATUS_IDLE and not conn.closed


def clear_marks(conn: Connection, recipe: Recipe) -> None:
    """Let the connection count as untouched; where a reset is wanted, every checkin has something to do."""
    conn.marks.clear()
    if recipe.group.reset != "none":
        conn.marks.append(None)


def close_cursors(conn: Connection) -> bool:
    """Close what the holder left open, so that no stale cursor reaches the next one; False: one would not close."""
    for mark in conn.marks:
        cur = mark() if mark is not None else None
        if cur is not None and not cur.closed:
            with contextlib.suppress(psycopg2.Error):  # a server-side cursor that is gone at the server
                cur.close()
            if not cur.closed:
                return False
    return True


def _roll_back(conn: Connection) -> None:
    conn.rollback()
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:  # a raw BEGIN that psycopg2 does not know of
        with conn.own_cursor(conn) as cur:
            cur.execute("rollback")


def _put_session_back(conn: Connection, recipe: Recipe) -> None:
    conn.set_session(isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT", autocommit=False)
    if recipe.autocommit:
        conn.autocommit = True
    if recipe.endpoint.via == "pooler":
        _set_transactions(conn, recipe)
    conn.cursor_factory = recipe.cursor_factory  # type: ignore[assignment]  # None is psycopg2's default
    if conn.encoding != conn.opened_encoding:
        conn.set_client_encoding(conn.opened_encoding)
    conn.notices = []


def _reset(conn: Connection, recipe: Recipe) -> None:
    """Remove what SQL left in the session; psycopg2 needs its ISO dates afterwards."""
    conn.autocommit = True
    with conn.own_cursor(conn) as cur:
        cur.execute(_RESETS[recipe.group.reset])
        if not (conn.get_parameter_status("DateStyle") or "").startswith("ISO"):
            cur.execute("set datestyle to iso")
    conn.autocommit = recipe.autocommit
    if recipe.endpoint.via == "pooler":
        _apply_settings(conn, recipe)  # a reset goes back to how the session started
