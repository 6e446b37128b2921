"""One health check of one endpoint, bounded in time; the coordinator's only use of psycopg2.

Guarantees.
- `Probe.check` returns a result for whatever the server or the network does; it never raises for
  them.
- A check ends within `timeout_s` for each connect (a second one follows an authentication failure)
  and `timeout_s` for the query.  The exceptions are reading the secrets (credentials.py has the
  bound) and the resolution of a host name, which libpq does blocking: pass `hostaddr`, resolved off
  the event loop.
- At most one server session per probe; after any failure there is none.
- A name of several servers is connected to anew at each check, and nothing that holds for one of them is told.
Assumptions.
- One thread at a time uses a probe, and no probe is used across fork.
"""

from __future__ import annotations

import ctypes
import re
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg2
from psycopg2 import extensions

from shmpool.credentials import Lookup, Secrets, may_be_cured, read_secrets
from shmpool.settings import EndpointSettings
from shmpool.states import Role, Verdict
from shmpool_coordinator.health import ProbeResult

LSN_ZERO: Final = "'0/0'::pg_lsn"

# CASE keeps each function to the side of replication where it is allowed.  Functions and views used
# here are open to every role; pg_stat_wal_receiver shows only NULL beside the pid to a role without
# pg_monitor; the control file says of a standby's timeline what it is at least.  What a replica has not received or
# replayed yet is NULL, which `greatest` would turn into 0.
FULL_QUERY: Final = f"""
SELECT r.recovery,
       current_setting('transaction_read_only')::bool,
       pg_wal_lsn_diff(r.lsn, {LSN_ZERO})::bigint,
       CASE WHEN r.recovery AND pg_last_wal_receive_lsn() IS NOT NULL
            THEN greatest(0, pg_wal_lsn_diff(pg_last_wal_receive_lsn(), r.lsn))::bigint END,
       CASE WHEN r.recovery AND pg_last_xact_replay_timestamp() IS NOT NULL
            THEN greatest(0, extract(epoch FROM
                 clock_timestamp() - pg_last_xact_replay_timestamp()))::float8 END,
       CASE WHEN r.recovery
            THEN greatest((SELECT received_tli FROM pg_stat_wal_receiver LIMIT 1),
                          (SELECT timeline_id FROM pg_control_checkpoint()),
                          (SELECT min_recovery_end_timeline FROM pg_control_recovery()))
            ELSE ('x' || left(pg_walfile_name(r.lsn), 8))::bit(32)::int END,
       (SELECT system_identifier FROM pg_control_system()),
       extract(epoch FROM pg_postmaster_start_time())::float8,
       current_setting('max_connections')::int,
       host(inet_server_addr())
FROM (SELECT s.recovery,
             CASE WHEN s.recovery THEN pg_last_wal_replay_lsn()
                  ELSE pg_current_wal_lsn() END AS lsn
      FROM (SELECT pg_is_in_recovery() AS recovery OFFSET 0) AS s OFFSET 0) AS r
"""

# What every role may ask on every server that speaks the protocol; used where FULL_QUERY is
# refused.
PLAIN_QUERY: Final = """
SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool,
       NULL, NULL, NULL, NULL, NULL, NULL, current_setting('max_connections')::int, NULL
"""

# insufficient_privilege, feature_not_supported, undefined_function, undefined_table,
# undefined_column
REFUSALS_OF_THE_QUERY: Final = frozenset({"42501", "0A000", "42883", "42P01", "42703"})

INVALID_AUTHORIZATION: Final = "28"

# SQLSTATE, or its class where the whole class means the same.
VERDICT_OF_SQLSTATE: Final[Mapping[str, Verdict]] = {
    "57P03": Verdict.STARTING,  # cannot_connect_now
    "53300": Verdict.FULL,  # too_many_connections
    INVALID_AUTHORIZATION: Verdict.MISCONFIGURED,  # or password, or role
    "3D": Verdict.MISCONFIGURED,  # no such database
    "42501": Verdict.MISCONFIGURED,  # insufficient_privilege
    "57P04": Verdict.MISCONFIGURED,  # database_dropped
    "57014": Verdict.TIMEOUT,  # query_canceled, by a statement_timeout of the role
    "57P01": Verdict.LOST,  # admin_shutdown
    "57P02": Verdict.LOST,  # crash_shutdown
    "57P05": Verdict.LOST,  # idle_session_timeout
}
CONNECTION_EXCEPTION: Final = "08"  # the text tells more: poolers say 08P01 of nearly everything

# A failed connect has no SQLSTATE in psycopg2.  libpq writes it into a verbose message, where it
# does not depend on the server's language: "FATAL:  28P01: ...", and a last line with the place in
# the server's source.
SQLSTATE_IN_TEXT: Final = re.compile(r":  ([0-9A-Z]{5}): ")
SOURCE_IN_TEXT: Final = re.compile(r"\n\S+:  \w+, [\w.]+:\d+$")
PQERRORS_DEFAULT: Final = 1
PQERRORS_VERBOSE: Final = 2

# What text tells where there is no SQLSTATE.  It may hold one line for each address that was tried,
# so the first pattern found wins: what a live server said goes before what the network did.
VERDICT_OF_TEXT: Final[tuple[tuple[Verdict, re.Pattern[str]], ...]] = tuple(
    (verdict, re.compile("|".join(patterns), re.IGNORECASE))
    for verdict, patterns in (
        (
            Verdict.STARTING,
            (
                r"the database system is (starting up|shutting down|in recovery mode)",
                r"the database system is not (yet )?accepting connections",
            ),
        ),
        (
            Verdict.FULL,
            (
                r"too many clients",
                r"too many connections for (role|database)",
                r"connection slots are reserved",
                r"no more connections allowed",
            ),
        ),
        (
            Verdict.MISCONFIGURED,
            (
                r"authentication failed",
                r"authentication method",
                r"no password supplied",
                r"\bpassword_(file|command|env)\b",
                r"no pg_hba\.conf entry",
                r"pg_hba\.conf rejects",
                r"(role|user|database) \".*\" does not exist",
                r"no such (user|database)",
                r"is not permitted to log in",
                r"is not currently accepting connections",
                r"permission denied for database",
                r"unrecognized configuration parameter",
                r"unsupported startup parameter",
                r"invalid value for parameter",
                r"permission denied to set parameter",
                r"certificate",
                r"private key file",
                r"server does not support SSL",
                r"channel binding",
                r"definition of service",
                r"invalid dsn",
                r"invalid \w+ value",
            ),
        ),
        (
            Verdict.TIMEOUT,
            (r"timeout expired", r"timed out"),
        ),
        (
            Verdict.LOST,
            (
                r"server closed the connection",
                r"connection reset",
                r"broken pipe",
                r"EOF detected",
                r"unexpected eof",
                r"SSL connection has been closed",
                r"SSL SYSCALL error",
                r"terminating connection",
                r"connection already closed",
                r"connection not open",
            ),
        ),
        (
            Verdict.REFUSED,
            (
                r"connection refused",
                r"no route to host",
                r"(network|host) is (unreachable|down)",
                r"no such file or directory",
            ),
        ),
    )
)


def parse_conninfo(conninfo: str) -> dict[str, str]:
    """Split a libpq connection string into its keywords.

    Raises:
        ValueError: libpq cannot parse it.  The message is libpq's and may quote a part of the
            string.
    """
    try:
        return dict(extensions.parse_dsn(conninfo)) if conninfo.strip() else {}
    except psycopg2.Error as error:
        raise ValueError(str(error).strip().removeprefix("invalid dsn: ")) from None


def make_conninfo(keywords: Mapping[str, str]) -> str:
    """Join keywords into a libpq connection string, quoted as libpq wants it."""
    return str(extensions.make_dsn(**keywords)) if keywords else ""


def connect_kwargs(settings: EndpointSettings, overlay: str) -> dict[str, str]:
    """Return the libpq keywords for an endpoint, with those of `overlay` laid over its own."""
    return parse_conninfo(settings.conninfo) | parse_conninfo(overlay)


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of a failed connect or query, None if the server said none."""
    if isinstance(error, psycopg2.Error) and error.pgcode is not None:
        return error.pgcode
    told = SQLSTATE_IN_TEXT.search(str(error))
    return told[1] if told else None


def verdict_of(error: BaseException, sqlstate: str | None = None) -> Verdict:
    """Tell what a failed connect or query says of the endpoint: by SQLSTATE, else by text."""
    if sqlstate is not None:
        for code in (sqlstate, sqlstate[:2]):
            if code in VERDICT_OF_SQLSTATE:
                return VERDICT_OF_SQLSTATE[code]
    if isinstance(error, TimeoutError):
        return Verdict.TIMEOUT
    text = str(error)
    for verdict, pattern in VERDICT_OF_TEXT:
        if pattern.search(text):
            return verdict
    return Verdict.LOST if (sqlstate or "")[:2] == CONNECTION_EXCEPTION else Verdict.ERROR


def _load_verbosity() -> Callable[[int, int], int] | None:
    """Return PQsetErrorVerbosity of the libpq that psycopg2 uses; None where it cannot be reached."""
    try:
        function = ctypes.CDLL(psycopg2._psycopg.__file__).PQsetErrorVerbosity
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int
    return function


_PQsetErrorVerbosity: Final = _load_verbosity()


def _set_verbosity(connection: extensions.connection, verbosity: int) -> None:
    """Choose how much libpq writes into this connection's messages; verdicts go by text where it cannot be chosen."""
    if _PQsetErrorVerbosity is not None and connection.pgconn_ptr:
        _PQsetErrorVerbosity(connection.pgconn_ptr, verbosity)


class Probe:
    """One endpoint's kept connection and the check over it."""

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        pool: str,
        overlay: str = "",
        timeout_s: float = 1.0,
        lookup: Lookup | None = None,
    ) -> None:
        """Prepare; nothing is opened before the first `check`.

        Args:
            settings: the endpoint.
            pool: the pool's name, for `application_name`.
            overlay: conninfo laid over the endpoint's.
            timeout_s: bound of the connect, and again of the query.
            lookup: asked for secrets instead of what the endpoint's settings name.
        """
        self._settings = settings
        # Another user of the overlay has another password: libpq finds it its own ways.
        self._has_own_user = "user" in parse_conninfo(overlay)
        self._keywords = connect_kwargs(settings, overlay)
        self._keywords["application_name"] = f"shmpool:{pool}:coordinator"
        self._name = settings.name
        self._timeout_s = timeout_s
        self._lookup = lookup
        self._hostaddr = ""
        self._connection: extensions.connection | None = None
        self._query = FULL_QUERY

    def __repr__(self) -> str:
        state = "connected" if self._connection is not None else "closed"
        return f"<Probe {self._name} {state}>"

    @property
    def backend_pid(self) -> int | None:
        """The server process of the kept connection."""
        return None if self._connection is None else self._connection.get_backend_pid()

    def check(self, hostaddr: str = "") -> ProbeResult:
        """Look at the endpoint once, opening a connection where none is kept.

        Args:
            hostaddr: the resolved address of the host; another one than before opens anew.

        Returns:
            What was seen; never raises for a server's or a network's fault.
        """
        if hostaddr != self._hostaddr:
            self.close()
            self._hostaddr = hostaddr
        try:
            connection = self._connection or self._open()
            result = self._ask(connection)
        except (psycopg2.Error, TimeoutError, OSError) as error:
            self.close()
            text = SOURCE_IN_TEXT.sub("", str(error).rstrip())
            text = " ".join(text.split()) or type(error).__name__
            return ProbeResult(verdict=verdict_of(error, sqlstate_of(error)), error=text)
        if self._settings.address == "service":
            self.close()  # whether the name takes connections only a new one tells
            return result.of_any_server()
        return result

    def close(self) -> None:
        """Close the kept connection; does nothing when there is none."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> extensions.connection:
        """Connect; once more, with the secrets read anew, where they may just have been replaced."""
        used = self._secrets()
        try:
            return self._connect(used)
        except psycopg2.OperationalError as error:
            sqlstate = sqlstate_of(error)
            if verdict_of(error, sqlstate) is not Verdict.MISCONFIGURED:
                raise
            now = self._secrets()
            if (sqlstate or "")[:2] != INVALID_AUTHORIZATION and not may_be_cured(str(error), used, now):
                raise
            self.close()
            return self._connect(now)

    def _secrets(self) -> Secrets:
        return Secrets({}) if self._has_own_user else read_secrets(self._settings, self._lookup)

    def _connect(self, secrets: Secrets) -> extensions.connection:
        deadline = time.monotonic() + self._timeout_s
        # libpq's connect_timeout has no part in this: it counts whole seconds, and not at all when
        # asynchronous.
        keywords: dict[str, Any] = dict(self._keywords)
        if self._hostaddr:
            keywords["hostaddr"] = self._hostaddr
        self._query = FULL_QUERY
        self._connection = psycopg2.connect(async_=True, **(keywords | dict(secrets)))
        _set_verbosity(self._connection, PQERRORS_VERBOSE)
        self._wait(self._connection, deadline, "connect")
        _set_verbosity(self._connection, PQERRORS_DEFAULT)
        return self._connection

    def _ask(self, connection: extensions.connection) -> ProbeResult:
        asked_at = time.monotonic()
        deadline = asked_at + self._timeout_s
        try:
            row, latency_s = self._run(connection, deadline)
        except psycopg2.Error as error:
            if error.pgcode not in REFUSALS_OF_THE_QUERY or self._query == PLAIN_QUERY:
                raise
            self._query = PLAIN_QUERY
            row, latency_s = self._run(connection, deadline)
        recovery, read_only, lsn, lag_bytes, lag_s, timeline, system, started, cap, address = row
        return ProbeResult(
            verdict=Verdict.OK,
            role=Role.REPLICA if recovery else Role.PRIMARY,
            read_only=read_only,
            latency_s=latency_s,
            lsn=lsn,
            lag_bytes=lag_bytes,
            lag_s=lag_s,
            timeline=timeline,
            system_identifier=system,
            started_at=started,
            server_version=connection.server_version,
            max_connections=cap,
            address=" ".join(filter(None, (self._hostaddr, address))) or None,
            asked_at=asked_at,
        )

    def _run(self, connection: extensions.connection, deadline: float) -> tuple[tuple[Any, ...], float]:
        begin = time.monotonic()
        cursor = connection.cursor()  # not closed: that raises in the middle of a query and would hide why
        cursor.execute(self._query)
        self._wait(connection, deadline, "query")
        row = cursor.fetchone()
        if row is None:
            raise psycopg2.OperationalError("the health query returned no row")
        return row, time.monotonic() - begin

    def _wait(self, connection: extensions.connection, deadline: float, what: str) -> None:
        """Poll until libpq is done; its descriptor may change while it tries further addresses."""
        while (state := connection.poll()) != extensions.POLL_OK:
            left_s = deadline - time.monotonic()
            poller = select.poll()
            events = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            poller.register(connection.fileno(), events)
            if left_s <= 0 or not poller.poll(left_s * 1000):
                raise TimeoutError(f"{what} timed out after {self._timeout_s:g} s")
