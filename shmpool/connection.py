"""The psycopg2 connection of a slot: open it, ask it, close it.

The connection class notes when session properties change, so that a checkin restores only what was touched.
An application never gets the connection itself but a handle (handle.py), which dies at checkin.

Close is finished when the server's end has gone: the session counts at the server until then.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, NamedTuple, Self

import psycopg2
from psycopg2 import InterfaceError, OperationalError, ProgrammingError
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    connection,
    cursor,
    make_dsn,
    parse_dsn,
)

from shmpool.clock import monotonic
from shmpool.credentials import Secrets
from shmpool.losses import SESSION_PROPERTIES, TellingConnection
from shmpool.position import CommitPosition, Standing, end_of_records
from shmpool.settings import Credentials, EndpointSettings, GroupSettings
from shmpool.states import Role

CLOSE_BOUND_S: Final = 0.5  # a server needs about a millisecond; past this the slot is left to the coordinator
APPLICATION_NAME_BYTES: Final = 63  # what PostgreSQL keeps of it
_NO_CREDENTIALS: Final = Credentials("", (), "")
# A server answered: it refused (libpq puts two spaces behind the severity, which servers translate), or it asked for a
# password and there was none.
_REFUSAL: Final = re.compile(r":  \S|no password supplied")
# libpq itself gave up, before it asked for a session: TLS is not what was wanted of the server.
_UNTRUSTED: Final = re.compile(
    r"certificate verify failed|certificate for .* does not match host name|certificate file .* does not exist"
    r"|server's host name from server certificate|server does not support SSL"
)
_NEXT_ADDRESS: Final = re.compile(r"\n(?=connection to server)")
_MASKED: Final = ("password", "sslpassword")
_PENDING_READS: Final = 4
_PRUNE_AT: Final = 64  # cursors remembered before the dead ones are forgotten
# The insert position also covers a commit that the server acknowledged before it wrote it (synchronous_commit = off).
_STANDING: Final = """
select r.recovery,
       pg_wal_lsn_diff(r.lsn, '0/0')::bigint,
       case when r.recovery
            then greatest((select received_tli from pg_stat_wal_receiver limit 1),
                          (select timeline_id from pg_control_checkpoint()),
                          (select min_recovery_end_timeline from pg_control_recovery()))
            else ('x' || left(pg_walfile_name(r.lsn), 8))::bit(32)::int end,
       (select system_identifier from pg_control_system()),
       current_setting('wal_block_size')::bigint,
       pg_size_bytes(current_setting('wal_segment_size'))
from (select s.recovery, case when s.recovery then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end as lsn
      from (select pg_is_in_recovery() as recovery offset 0) as s offset 0) as r
"""


class Connection(TellingConnection):
    """A pooled connection.  Derive from it to add your own methods (`Pool(connection_factory=...)`)."""

    marks: list[weakref.ref[cursor] | None]  # what a checkin must look after: cursors, and None for a session change
    opened_encoding: str
    opened_at: float  # CLOCK_MONOTONIC
    socket_inode: int  # tells its socket from whatever has the descriptor's number later
    seen: Standing | None = None  # where its server stood when it was asked last; it has not gone back since
    may_choose: ClassVar[bool] = False  # whether the class may have a `cursor` of its own: every application's may

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.may_choose = True

    def __init__(self, dsn: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dsn, *args, **kwargs)
        self.marks = []
        self.opened_at = monotonic()
        self.socket_inode = os.fstat(self.fileno()).st_ino
        self.opened_encoding = self.encoding

    def __repr__(self) -> str:
        return f"<connection object at {id(self):#x}; dsn: '{self.dsn}', closed: {self.closed}>"

    @property
    def dsn(self) -> str:
        """As psycopg2's, which masks the password; here every secret is masked."""
        keywords = parse_dsn(super().dsn or "")
        return str(make_dsn(**keywords | {keyword: "xxx" for keyword in _MASKED if keyword in keywords}))

    def close(self) -> None:
        """Refuse: the slot's permits must go back too.  Close the handle that checkout returned."""
        raise InterfaceError("this connection belongs to a pool; close the handle that checkout() returned")

    def commit_position(self) -> CommitPosition:
        """Return a position that covers everything committed here so far: one round trip.  See `Handle`."""
        if self.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            raise ProgrammingError("commit_position(): found an open transaction, expected a commit before it")
        standing = read_standing(self)
        if standing.role is not Role.PRIMARY:
            raise ProgrammingError("commit_position(): this connection leads to a replica, which commits nothing")
        return CommitPosition(standing.system_identifier, standing.timeline, standing.lsn)

    def let_go(self) -> None:
        """Take note that the pool is about to close it."""

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's; undone at checkin."""
        self.marks.append(None)
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        """As psycopg2's; undone at checkin."""
        self.marks.append(None)
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        """As psycopg2's; undone at checkin."""
        self.marks.append(None)
        super().set_client_encoding(encoding)

    def tpc_begin(self, xid: Any) -> None:
        """As psycopg2's; left prepared, the connection is closed at checkin."""
        self.marks.append(None)  # the server is idle after the prepare: its status would not tell
        super().tpc_begin(xid)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's; the cursor is closed at checkin."""
        if args or kwargs or self.may_choose or self._cursor_factory is not None or self.closed:
            cur = super().cursor(*args, **kwargs)
        else:  # the common case, at half the price
            cur = self.own_cursor(self)
        marks = self.marks
        if len(marks) >= _PRUNE_AT:
            marks[:] = [mark for mark in marks if mark is None or mark() is not None]
        marks.append(weakref.ref(cur))
        return cur


def _noted(name: str) -> property:
    """Return a property that is psycopg2's attribute `name` and notes that it was set."""
    base: Any = getattr(TellingConnection, name)

    def put(self: Connection, value: Any) -> None:
        self.marks.append(None)
        base.__set__(self, value)

    return property(base.__get__, put, doc=f"As psycopg2's `{name}`; undone at checkin.")


for _name in (*SESSION_PROPERTIES, "cursor_factory", "notices"):
    setattr(Connection, _name, _noted(_name))


class Recipe(NamedTuple):
    """How connections of one group to one endpoint are opened; free of secrets."""

    endpoint: EndpointSettings
    group: GroupSettings
    dsn: str
    autocommit: bool
    factory: type[Connection]
    cursor_factory: type[cursor] | None
    on_connect: Callable[[Any], None] | None

    def of_connection(self) -> Self:
        """Return what an open connection depends on: two recipes that agree in it lead to the same connections."""
        return self._replace(endpoint=self.endpoint.of_connection(), group=self.group.of_connection())


def make_recipe(
    endpoint: EndpointSettings,
    group: GroupSettings,
    factory: type[Connection],
    cursor_factory: type[cursor] | None,
    on_connect: Callable[[Any], None] | None,
) -> Recipe:
    """Lay a group's conninfo and settings over an endpoint's.

    Another user of the group has another password than the endpoint's: libpq finds it its own ways.
    """
    merged: dict[str, Any] = parse_dsn(endpoint.conninfo)
    overlay = parse_dsn(group.conninfo) if group.conninfo else {}
    if overlay.get("user", merged.get("user")) != merged.get("user"):
        endpoint = endpoint._replace(credentials=_NO_CREDENTIALS)
    given = " ".join(filter(None, (merged.get("options"), overlay.pop("options", None))))
    merged.update(overlay)
    options = " ".join(filter(None, (given, "" if endpoint.via == "pooler" else _options(group))))
    if options:
        merged["options"] = options
    return Recipe(endpoint, group, make_dsn(**merged), group.autocommit, factory, cursor_factory, on_connect)


def _options(group: GroupSettings) -> str:
    """Return the server settings of a group as start-up options: they cost no round trip."""
    settings = session_settings(group) | transaction_settings(group)
    return " ".join(f"-c {name}={_escaped(value)}" for name, value in settings.items())


def session_settings(group: GroupSettings) -> dict[str, str]:
    """Return the server settings of a group that hold for the whole session."""
    settings = dict(group.settings)
    for name, seconds in (
        ("statement_timeout", group.statement_timeout),
        ("lock_timeout", group.lock_timeout),
        ("idle_in_transaction_session_timeout", group.idle_in_transaction_session_timeout),
    ):
        if seconds is not None:
            settings[name] = str(round(seconds * 1000))
    return settings


def transaction_settings(group: GroupSettings) -> dict[str, str]:
    """Return the server settings of a group that hold for its transactions."""
    settings = {}
    if group.isolation_level != "default":
        settings["default_transaction_isolation"] = group.isolation_level
    if group.readonly:
        settings["default_transaction_read_only"] = "on"
    return settings


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def application_name(prefix: str, pool: str, row: int, generation: int, slot: int) -> str:
    """Return the name under which a slot's session is seen at the server: `PREFIX shmpool:pool:row.generation:slot`."""
    fixed = f"shmpool:{pool}:{row}.{generation}:{slot}"
    room = APPLICATION_NAME_BYTES - len(fixed) - 1
    cut = prefix.encode()[: max(0, room)].decode(errors="ignore").strip()
    return f"{cut} {fixed}" if cut else fixed


class ConnectFailedError(OperationalError):
    """psycopg2 could not connect.

    `is_refused`: a server answered, and does not want it so.  `is_untrusted`: this side does not want the server so.
    `is_over`: surely no server has a session of it.
    """

    def __init__(
        self, message: str, *, is_refused: bool = False, is_untrusted: bool = False, is_over: bool = False
    ) -> None:
        self.is_refused = is_refused
        self.is_untrusted = is_untrusted
        self.is_over = is_over
        super().__init__(message)


class WrongRoleError(OperationalError):
    """The server is in another role than the group needs."""


class WrongServerError(WrongRoleError):
    """Of several servers behind one name it was one in another role; the next connect may reach another."""


def open_connection(recipe: Recipe, name: str, secrets: Secrets) -> Connection:
    """Open a connection under an application name.

    Settings go as start-up options and psycopg2 session flags: no round trip beside libpq's own.

    Raises:
        ConnectFailedError: libpq could not connect.
    """
    try:
        conn = psycopg2.connect(
            recipe.dsn,
            connection_factory=recipe.factory,
            cursor_factory=recipe.cursor_factory,
            application_name=name,
            **secrets,
        )
    except OperationalError as error:
        told = str(error).strip()
    else:
        assert isinstance(conn, Connection)
        conn.endpoint = recipe.endpoint.name
        return conn
    # Not in the handler: the driver's exception has frames with the password, and would come along as the context.
    raise ConnectFailedError(
        f"endpoint {recipe.endpoint.name!r}: {told}",
        is_refused=_REFUSAL.search(told) is not None,
        is_untrusted=_UNTRUSTED.search(told) is not None,
        is_over=all(map(_is_over, _NEXT_ADDRESS.split(told))),
    )


def _is_over(told: str) -> bool:
    """Whether surely no session came of trying one address."""
    return "Connection refused" in told or any(reason.search(told) for reason in (_REFUSAL, _UNTRUSTED))


def is_alive(conn: connection) -> bool:
    """Whether an idle connection looks alive: a zero-timeout poll of its socket, no round trip (0.4 µs).

    Something to read on an idle connection is a notice, or the server's farewell and the end of the stream.
    """
    try:
        fd = conn.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        for _ in range(_PENDING_READS):
            if not poller.poll(0):
                return True
            conn.poll()
    except (OperationalError, InterfaceError, OSError):
        pass
    return False


def answers(conn: Connection, seconds: float) -> bool:
    """Whether an idle connection answers a query within `seconds`: one real round trip."""
    try:
        with cut_after(conn, seconds):
            with conn.own_cursor(conn) as cur:
                cur.execute("select 1")
            if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
                conn.rollback()
    except (OperationalError, InterfaceError):
        return False
    return not conn.closed and not conn.is_cut


def asked_standing(conn: Connection, seconds: float) -> Standing | None:
    """Ask an idle connection where its server stands; None: it did not say so within `seconds`.

    A connection that is of no use any more is closed, or cut.
    """
    try:
        with cut_after(conn, seconds):
            conn.seen = read_standing(conn)
    except psycopg2.Error:
        return None
    return None if conn.closed or conn.is_cut else conn.seen


def read_standing(conn: Connection) -> Standing:
    """Return where a server stands: one round trip, outside a transaction.

    Raises:
        psycopg2.Error: the server was lost, or does not tell.
    """
    try:
        with conn.own_cursor(conn) as cur:
            cur.execute(_STANDING)
            row = cur.fetchone()
    finally:
        if not conn.closed and conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            conn.rollback()
    assert row is not None
    recovery, lsn, timeline, system, page_bytes, segment_bytes = row
    lsn = lsn or 0
    return Standing(
        Role.REPLICA if recovery else Role.PRIMARY,
        system & 0xFFFFFFFFFFFFFFFF,
        timeline or 0,
        lsn if recovery else end_of_records(lsn, page_bytes, segment_bytes),
    )


@contextlib.contextmanager
def cut_after(conn: Connection, seconds: float) -> Iterator[None]:
    """Cut off a server that does not answer in time by shutting the socket down, which also frees libpq."""
    twin = socket.socket(fileno=os.dup(conn.fileno()))

    def cut() -> None:
        conn.is_cut = True
        twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it must not meet a descriptor that was closed, or is another's by now
        twin.close()


def close_connection(conn: Connection, within: float = CLOSE_BOUND_S) -> bool:
    """Close, and wait until the server's end has gone; False: it had not `within` seconds, or nobody can tell.

    Reads and discards from a duplicate of the descriptor until the end of the stream (over TLS a reset).
    """
    conn.let_go()
    if conn.closed or conn.is_cut:
        connection.close(conn)
        return not conn.is_cut  # else psycopg2 saw the end of the stream
    try:
        twin = os.dup(conn.fileno())
    except (InterfaceError, OSError):
        connection.close(conn)
        return True
    try:
        conn.is_cut = True  # if a signal handler raises in here, whoever closes again must not take it for the end
        connection.close(conn)
        return _wait_for_end(twin, within)
    finally:
        os.close(twin)


def _wait_for_end(fd: int, within: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = monotonic() + within
    while poller.poll(max(0.0, deadline - monotonic()) * 1000):
        try:
            if not os.read(fd, 8192):
                return True
        except BlockingIOError:
            continue
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            return True
    return False
