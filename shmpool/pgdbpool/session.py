"""One psycopg2 connection: open it, look after it, run statements on it, end its transaction.

`psycopg2.connect` is looked up at each call and given pgdbpool's keywords only, so that a stand-in may take its place.
Of a stand-in nothing is asked but `cursor` and `commit`, and of its cursor `execute`, `callproc` and `fetchone`; of
psycopg2's own connections the rest is used as well: no look at them costs a round trip.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, Final

import psycopg2
import psycopg2.extras
from psycopg2.errors import InFailedSqlTransaction
from psycopg2.extensions import (
    ISOLATION_LEVEL_AUTOCOMMIT,
    STATUS_READY,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_UNKNOWN,
    connection,
    cursor,
)

from shmpool.connection import is_alive
from shmpool.handle import Handle
from shmpool.pgdbpool.configuration import EndpointSettings, GroupSettings
from shmpool.pgdbpool.errors import DBOfflineError, DBQueryError
from shmpool.pgdbpool.kept_cursor import KeptCursor

_SETTINGS: Final = "SET statement_timeout = {}; SET temp_buffers = '{}MB'"
_PREPARE: Final = '"SQLPrepare"."PrepareQueries"'
_TELLING: Final = (connection, Handle)  # those that know whether they are in a transaction
_EXECUTE: Final = '"SQLPrepare"."ExecuteQuery"'


class OpenFailedError(Exception):
    """An endpoint gave no connection; the message is the driver's."""


def open_session(endpoint: EndpointSettings, group: GroupSettings) -> Any:
    """Return a new connection with the endpoint's settings, in the group's state.

    Raises:
        OpenFailedError: it could not be made, or not be brought into that state.
    """
    extra: dict[str, Any] = {} if endpoint.port is None else {"port": endpoint.port}
    try:
        conn = psycopg2.connect(
            dbname=endpoint.name,
            user=endpoint.user,
            host=endpoint.host,
            password=endpoint.password,
            sslmode=endpoint.ssl,
            connect_timeout=endpoint.connect_timeout,
            **extra,
        )
    except psycopg2.Error as error:
        raise OpenFailedError(str(error).strip()) from error
    try:
        _set_up(conn, endpoint, group)
    except psycopg2.Error as error:
        discard(conn)
        raise OpenFailedError(str(error).strip()) from error
    except BaseException:
        discard(conn)
        raise
    return conn


def _set_up(conn: Any, endpoint: EndpointSettings, group: GroupSettings) -> None:
    """Set the timeout and buffers in one round trip, outside any transaction, and prepare the group's queries."""
    if isinstance(conn, connection):
        conn.autocommit = True
        with cursor(conn) as cur:
            cur.execute(_SETTINGS.format(endpoint.query_timeout, endpoint.session_tmp_buffer))
    elif group.autocommit:
        conn.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
    if group.sqlprepare:
        prepare_queries(conn)
    if isinstance(conn, connection):
        conn.autocommit = group.autocommit


def prepare_queries(conn: Any) -> None:
    """Have pg_extensions prepare its queries in this session."""
    _cursor(conn).callproc(_PREPARE)


def _cursor(conn: Any) -> Any:
    factory = KeptCursor if isinstance(conn, Handle) else psycopg2.extras.DictCursor
    return conn.cursor(cursor_factory=factory)


def is_closed(conn: Any) -> bool:
    """Whether this side knows that the connection has ended."""
    closed = getattr(conn, "closed", 0)
    return isinstance(closed, int) and closed != 0


def is_usable(conn: Any, group: GroupSettings) -> bool:
    """Whether the connection can serve a new holder, without a round trip; what is still open is rolled back first."""
    if is_closed(conn):
        return False
    if not isinstance(conn, connection):
        return True
    if not is_in_transaction(conn) and conn.status == STATUS_READY:
        return is_alive(conn)
    return finish(conn, group, commits=False)


def is_in_transaction(conn: Any) -> bool:
    """Whether the server is in a transaction; a stand-in does not tell."""
    return isinstance(conn, _TELLING) and conn.get_transaction_status() != TRANSACTION_STATUS_IDLE


def is_dropped(conn: Any) -> bool:
    """Whether the server hung up on an idle connection: a look at the socket, no round trip."""
    return isinstance(conn, connection) and not is_in_transaction(conn) and not is_alive(conn)


def execute(conn: Any, sql: Any, params: Any) -> Any:
    """Run a statement and return its cursor, whose rows are lists and dictionaries at once.

    Raises:
        DBQueryError: it failed; the driver's exception is its cause.
    """
    try:
        cur = _cursor(conn)
        cur.execute(sql, params)
    except psycopg2.Error as error:
        raise DBQueryError(repr(error)) from error
    return cur


def execute_prepared(conn: Any, params: Any) -> Any:
    """Run one of the queries that were prepared with the connection, and return its result.

    Raises:
        DBQueryError: it failed; the driver's exception is its cause.
    """
    try:
        cur = _cursor(conn)
        cur.callproc(_EXECUTE, params)
        return cur.fetchone()[0]
    except psycopg2.Error as error:
        raise DBQueryError(repr(error)) from error


def check(conn: Any) -> None:
    """Ask the server for a sign of life: a round trip.

    Raises:
        DBOfflineError: it gave none.
    """
    was_idle = isinstance(conn, _TELLING) and not is_in_transaction(conn)
    try:
        cur = _cursor(conn)
        cur.execute("SELECT 1")
        cur.fetchone()
        if was_idle:
            conn.rollback()
    except InFailedSqlTransaction:
        pass  # it answered: this transaction awaits its end
    except psycopg2.Error as error:
        raise DBOfflineError(f"the connection does not answer: {str(error).strip()}") from error


def finish(conn: Any, group: GroupSettings, *, commits: bool) -> bool:
    """End an open transaction; return whether the connection may serve the next holder.

    Raises:
        DBQueryError: it was to be committed, and was not.
    """
    if is_closed(conn):
        return False
    end = _end_transaction if isinstance(conn, connection) else _end_of_stand_in
    try:
        return end(conn, group, commits)
    except psycopg2.Error as error:
        if commits:
            raise DBQueryError(f"the transaction was not committed: {error!r}") from error
        return False


def _end_of_stand_in(conn: Any, group: GroupSettings, commits: bool) -> bool:
    if not commits and not hasattr(conn, "rollback"):
        return False
    conn.commit() if commits else conn.rollback()
    return True


def _end_transaction(conn: connection, group: GroupSettings, commits: bool) -> bool:
    status = conn.get_transaction_status()
    if status in (TRANSACTION_STATUS_ACTIVE, TRANSACTION_STATUS_UNKNOWN):
        raise psycopg2.OperationalError("the connection was left in the middle of a statement")
    if status != TRANSACTION_STATUS_IDLE or conn.status != STATUS_READY:
        conn.commit() if commits else conn.rollback()
        if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:  # a raw BEGIN, which psycopg2 does not know of
            with cursor(conn) as cur:
                cur.execute("COMMIT" if commits else "ROLLBACK")
    if conn.autocommit != group.autocommit:
        conn.autocommit = group.autocommit
    return True


def discard(conn: Any) -> None:
    """Close a connection of this process."""
    close = getattr(conn, "close", None)
    if close is not None:
        with contextlib.suppress(psycopg2.Error):
            close()


def cut_off(conn: Any) -> None:
    """Part a child's copy of a connection from its parent's socket: nothing is sent, and later use of it fails."""
    if isinstance(conn, connection) and not conn.closed:
        near, far = socket.socketpair()
        far.close()
        with contextlib.suppress(psycopg2.Error, OSError):  # another thread of the parent was just closing it
            os.dup2(near.fileno(), conn.fileno(), inheritable=False)
        near.close()
