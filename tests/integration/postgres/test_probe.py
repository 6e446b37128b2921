"""The health check against real servers, and against sockets that behave badly."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg2
import pytest

from shmpool.settings import Credentials, EndpointSettings
from shmpool.states import Role, Verdict
from shmpool_coordinator.probe import Probe, connect_kwargs, verdict_of
from tests.support.waiting import wait_until
from tools.pg_cluster import Cluster, Server

PLAIN_ROLE = "probe_test_plain"


def endpoint(conninfo: str) -> EndpointSettings:
    return EndpointSettings(
        index=0,
        name="pg1",
        conninfo=conninfo,
        max_connections=5,
        weight=1,
        backup=False,
        address="instance",
        via="direct",
        credentials=Credentials(password_file="", password_command=(), password_env=""),
    )


@contextmanager
def probing(conninfo: str, overlay: str = "", timeout_s: float = 5.0) -> Iterator[Probe]:
    with closing(Probe(endpoint(conninfo), pool="web", overlay=overlay, timeout_s=timeout_s)) as probe:
        yield probe


@pytest.fixture
def plain_role(cluster: Cluster) -> Iterator[str]:
    """A role without any privilege, known on both servers."""
    cluster.primary.execute(f"CREATE ROLE {PLAIN_ROLE} LOGIN")
    query = f"SELECT 1 FROM pg_roles WHERE rolname = '{PLAIN_ROLE}'"
    wait_until(lambda: cluster.standbys[0].execute(query), within=10)
    yield PLAIN_ROLE
    cluster.primary.execute(f"DROP ROLE {PLAIN_ROLE}")


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that the test may stop, freeze and kill."""
    with Cluster(settings={"max_connections": "6", "superuser_reserved_connections": "0"}) as own:
        yield own.primary


@contextmanager
def listening(backlog: int = 8) -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=backlog)) as server:
        yield server


def test_primary(cluster: Cluster) -> None:
    """A primary is told with all that the coordinator wants to know of it."""
    with probing(cluster.primary.conninfo()) as probe:
        result = probe.check()
        assert (result.verdict, result.role, result.read_only) == (Verdict.OK, Role.PRIMARY, False)
        ((system, cap),) = cluster.primary.execute(
            "SELECT system_identifier, current_setting('max_connections')::int FROM pg_control_system()"
        )
        assert (result.system_identifier, result.max_connections) == (system, cap)
        assert result.timeline == 1
        assert result.address == "127.0.0.1"
        assert result.lsn is not None
        assert result.lsn > 0
        assert result.lag_bytes is None
        assert result.lag_s is None
        assert result.latency_s is not None
        assert 0 < result.latency_s < 5
        assert result.error == ""


def test_standby(cluster: Cluster) -> None:
    """A standby is a replica of the same system, with its replay position and lag."""
    with (
        probing(cluster.primary.conninfo()) as primary,
        probing(cluster.standbys[0].conninfo()) as standby,
    ):
        target = primary.check()
        assert target.lsn is not None
        wait_until(lambda: (standby.check().lsn or 0) >= (target.lsn or 0), within=10)
        wait_until(lambda: standby.check().timeline == target.timeline, within=10)
        result = standby.check()
        assert (result.verdict, result.role, result.read_only) == (Verdict.OK, Role.REPLICA, True)
        assert result.system_identifier == target.system_identifier
        assert result.lag_bytes is not None
        assert result.lag_s is None or result.lag_s >= 0


def test_unprivileged_role(cluster: Cluster, plain_role: str) -> None:
    """A role without privileges sees role, position, system and timeline as well."""
    for server, role in ((cluster.primary, Role.PRIMARY), (cluster.standbys[0], Role.REPLICA)):
        with probing(server.conninfo(), overlay=f"user={plain_role}") as probe:
            result = probe.check()
            assert (result.verdict, result.role) == (Verdict.OK, role)
            assert result.lsn is not None
            assert result.system_identifier is not None
            assert result.timeline == 1


def test_role_that_may_not_ask(own_server: Server) -> None:
    """Where a function is forbidden, role and health are told all the same, also next time."""
    own_server.execute(f"CREATE ROLE {PLAIN_ROLE} LOGIN")
    own_server.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    with probing(own_server.conninfo(user=PLAIN_ROLE)) as probe:
        for _ in range(2):
            result = probe.check()
            assert (result.verdict, result.role) == (Verdict.OK, Role.PRIMARY)
            assert result.system_identifier is None


def test_connection_is_kept_and_named(cluster: Cluster) -> None:
    """Checks share one session, which bears the pool's name; close ends it."""
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shmpool:web:coordinator'"
    with probing(cluster.primary.conninfo()) as probe:
        probe.check()
        pid = probe.backend_pid
        for _ in range(3):
            assert probe.check().verdict == Verdict.OK
        assert probe.backend_pid == pid
        assert cluster.primary.execute(count) == [(1,)]
    wait_until(lambda: cluster.primary.execute(count) == [(0,)])


def test_another_address_opens_anew(cluster: Cluster) -> None:
    """A host that resolves to another address is connected to there."""
    with probing(cluster.primary.conninfo(host="db.invalid")) as probe:
        assert probe.check("127.0.0.1").verdict == Verdict.OK
        pid = probe.backend_pid
        assert probe.check("127.0.0.1").verdict == Verdict.OK
        assert probe.backend_pid == pid
        assert probe.check("127.0.0.99").verdict == Verdict.REFUSED
        assert probe.backend_pid is None


def test_read_only_primary(cluster: Cluster) -> None:
    """A primary whose transactions start read-only is told as such."""
    overlay = "options='-c default_transaction_read_only=on'"
    with probing(cluster.primary.conninfo(), overlay=overlay) as probe:
        result = probe.check()
        assert (result.role, result.read_only) == (Role.PRIMARY, True)


@pytest.mark.parametrize(
    "overlay",
    [
        {"user": "nobody_here"},
        {"dbname": "nothing_here"},
        {"sslmode": "require"},
        {"options": "-c no_such_setting=1"},
        {"options": "-c work_mem=much"},
    ],
)
def test_misconfigured(cluster: Cluster, overlay: dict[str, str]) -> None:
    """What the configuration got wrong is told as that, not as a server that is gone."""
    with probing(cluster.primary.conninfo(**overlay)) as probe:
        result = probe.check()
        assert result.verdict == Verdict.MISCONFIGURED, result.error
        assert result.error


def test_terminated_session(cluster: Cluster) -> None:
    """A session that an operator ended is a lost connection once; the next check opens anew."""
    with probing(cluster.primary.conninfo()) as probe:
        probe.check()
        cluster.primary.execute(f"SELECT pg_terminate_backend({probe.backend_pid}, 5000)")
        assert probe.check().verdict == Verdict.LOST
        assert probe.check().verdict == Verdict.OK


def test_full_server(own_server: Server) -> None:
    """A server without a free slot is full."""
    held: list[psycopg2.extensions.connection] = []
    try:
        with contextlib.suppress(psycopg2.OperationalError):
            while len(held) < 20:
                held.append(psycopg2.connect(own_server.conninfo()))
        with probing(own_server.conninfo()) as probe:
            result = probe.check()
            assert result.verdict == Verdict.FULL, result.error
    finally:
        for connection in held:
            connection.close()


def test_stopped_and_started_server(own_server: Server) -> None:
    """A stop is a lost connection, then a refused one; a start is found by the same probe."""
    with probing(own_server.conninfo()) as probe:
        before = probe.check()
        own_server.stop()
        assert probe.check().verdict == Verdict.LOST
        assert probe.check().verdict == Verdict.REFUSED
        own_server.start()
        result = probe.check()
        assert result.verdict == Verdict.OK
        assert result.started_at != before.started_at
        assert result.system_identifier == before.system_identifier


def test_frozen_server(own_server: Server) -> None:
    """A server that does not answer costs its bound and no more, on an open and on a new connection."""
    with probing(own_server.conninfo(), timeout_s=0.3) as probe:
        wait_until(lambda: probe.check().verdict == Verdict.OK)
        own_server.pause()
        try:
            for _ in range(2):
                begin = time.monotonic()
                assert probe.check().verdict == Verdict.TIMEOUT
                assert 0.3 <= time.monotonic() - begin < 2
                assert probe.backend_pid is None
        finally:
            own_server.resume()
        wait_until(lambda: probe.check().verdict == Verdict.OK)


def test_promotion_on_the_kept_connection() -> None:
    """A promotion shows on the next check, with the new timeline, and without a reconnect."""
    with Cluster(standbys=1) as own, probing(own.standbys[0].conninfo()) as probe:
        assert probe.check().role == Role.REPLICA
        pid = probe.backend_pid
        own.standbys[0].promote()
        wait_until(lambda: probe.check().role == Role.PRIMARY, within=10)
        result = probe.check()
        assert (result.timeline, result.read_only, probe.backend_pid) == (2, False, pid)


def test_refused() -> None:
    """A port where nobody listens, and a socket that is not there, are refused."""
    with listening() as server:
        port = server.getsockname()[1]
    for conninfo in (f"host=127.0.0.1 port={port}", "host=/nothing/here"):
        with probing(conninfo) as probe:
            assert probe.check().verdict == Verdict.REFUSED


def test_silent_peer() -> None:
    """A peer that accepts and says nothing is a timeout, without waiting for libpq's seconds."""
    with listening() as server:
        port = server.getsockname()[1]
        with probing(f"host=127.0.0.1 port={port} user=u connect_timeout=30", timeout_s=0.2) as probe:
            begin = time.monotonic()
            assert probe.check().verdict == Verdict.TIMEOUT
            assert time.monotonic() - begin < 2


def test_descriptors_above_1024() -> None:
    """A coordinator with many descriptors can still probe: select() would fail here."""
    read_end, write_end = os.pipe()
    copies = [os.dup(read_end) for _ in range(1100)]
    try:
        with listening() as server:
            port = server.getsockname()[1]
            with probing(f"host=127.0.0.1 port={port} user=u", timeout_s=0.1) as probe:
                assert probe.check().verdict == Verdict.TIMEOUT
    finally:
        for descriptor in (read_end, write_end, *copies):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("FATAL:  the database system is starting up", Verdict.STARTING),
        ("FATAL:  the database system is shutting down", Verdict.STARTING),
        ("FATAL:  the database system is in recovery mode", Verdict.STARTING),
        ("FATAL:  the database system is not yet accepting connections", Verdict.STARTING),
        ("FATAL:  sorry, too many clients already", Verdict.FULL),
        ("FATAL:  remaining connection slots are reserved for roles with SUPERUSER", Verdict.FULL),
        ('FATAL:  too many connections for role "app"', Verdict.FULL),
        ("FATAL:  no more connections allowed (max_client_conn)", Verdict.FULL),
        ('FATAL:  password authentication failed for user "app"', Verdict.MISCONFIGURED),
        ('FATAL:  no pg_hba.conf entry for host "::1", user "app"', Verdict.MISCONFIGURED),
        ("fe_sendauth: no password supplied", Verdict.MISCONFIGURED),
        ('database "x" does not exist', Verdict.MISCONFIGURED),
        ("SSL error: certificate verify failed", Verdict.MISCONFIGURED),
        ('root certificate file "/x" does not exist', Verdict.MISCONFIGURED),
        ('server certificate for "a" does not match host name "b"', Verdict.MISCONFIGURED),
        ("could not receive data from server: Connection timed out", Verdict.TIMEOUT),
        ("server closed the connection unexpectedly", Verdict.LOST),
        ("SSL SYSCALL error: EOF detected", Verdict.LOST),
        ("could not receive data from server: Connection reset by peer", Verdict.LOST),
        ("connection failed: No route to host", Verdict.REFUSED),
        ('could not translate host name "x" to address', Verdict.ERROR),
        (
            "Connection refused\nconnection failed: FATAL:  the database system is starting up",
            Verdict.STARTING,
        ),
    ],
)
def test_texts(text: str, verdict: Verdict) -> None:
    """A failed connect is understood by its text; what a server said goes before the network."""
    assert verdict_of(psycopg2.OperationalError(text)) == verdict


@pytest.mark.parametrize(
    ("sqlstate", "verdict"),
    [
        ("57P03", Verdict.STARTING),
        ("53300", Verdict.FULL),
        ("28P01", Verdict.MISCONFIGURED),
        ("28000", Verdict.MISCONFIGURED),
        ("3D000", Verdict.MISCONFIGURED),
        ("57P01", Verdict.LOST),
        ("57P02", Verdict.LOST),
        ("08006", Verdict.LOST),
        ("57014", Verdict.TIMEOUT),
        ("53200", Verdict.ERROR),
        ("XX000", Verdict.ERROR),
    ],
)
def test_sqlstates(sqlstate: str, verdict: Verdict) -> None:
    """An SQLSTATE decides where there is one, in whatever language the server speaks."""
    assert verdict_of(psycopg2.OperationalError("FATAL:  désolé"), sqlstate) == verdict


def test_overlay_goes_over_the_endpoint() -> None:
    """The probe's keywords win over the endpoint's, all others stay."""
    settings = endpoint("host=h port=1 user=app dbname=app")
    assert connect_kwargs(settings, "user=monitor dbname=postgres") == {
        "host": "h",
        "port": "1",
        "user": "monitor",
        "dbname": "postgres",
    }
    assert connect_kwargs(settings, "")["user"] == "app"
