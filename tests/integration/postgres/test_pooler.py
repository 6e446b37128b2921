"""`via = "pooler"`: what holds behind a real PgBouncer, in transaction mode where nothing else is said."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import psycopg2
import pytest

from shmpool import Pool, session
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.settings import Credentials, EndpointSettings
from shmpool.states import Health, Role, Verdict
from shmpool_coordinator.health import ProbeResult
from shmpool_coordinator.probe import Probe
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.pgbouncer import Bouncer, running_pgbouncer
from tests.support.postgres import frozen
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, backend, is_ready, one_value, pool_of
from tools.pg_cluster import Cluster, Server

GRACE = '[coordinator]\norphan_grace = "0.5s"'  # of a connection that was cut: nobody can look behind a pooler
TIMEOUTS = """
statement_timeout = "7s"
lock_timeout = "6s"
idle_in_transaction_session_timeout = "90s"
settings = { search_path = "app, public", work_mem = "5MB" }
"""
IN_EFFECT = {
    "statement_timeout": "7s",
    "lock_timeout": "6s",
    "idle_in_transaction_session_timeout": "90s",
    "search_path": "app, public",
    "work_mem": "5MB",
}
STRICT = 'isolation_level = "serializable"\nreadonly = true'
KEYS = 'connections = 3\nendpoints = ["through"]\ntimeout = "3s"\ntarget = '
GROUPS = {
    "any": f'{KEYS}"any"\nautocommit = true',
    "write": f'{KEYS}"primary"',
    "bounded": f'{KEYS}"any"\nautocommit = true{TIMEOUTS}',
    "bounded-tx": f'{KEYS}"any"\nautocommit = false{TIMEOUTS}',
    "reset": f'{KEYS}"any"\nautocommit = true\nreset = "session"{TIMEOUTS}',
    "strict": f'{KEYS}"any"\nautocommit = false\n{STRICT}',
}


def through(bouncer: Bouncer, dbname: str = "postgres") -> str:
    """Return the keys of an endpoint behind a pooler."""
    return endpoint_keys(bouncer.conninfo(dbname)) + '\nvia = "pooler"'


@contextmanager
def coordinating(pool: str, endpoints: dict[str, str], groups: dict[str, str]) -> Iterator[CoordinatorProcess]:
    """Run a coordinator that found every endpoint UP."""
    with running_coordinator(pool_config(pool, endpoints, groups, f"{PROBE}\n{GRACE}"), pool) as process:
        wait_until(lambda: is_ready(pool), within=10, what=lambda: process.log)
        yield process


@pytest.fixture(scope="module")
def bouncer(primary: Server) -> Iterator[Bouncer]:
    """A PgBouncer with one server connection, in transaction mode."""
    with running_pgbouncer({"postgres": primary.port}, servers=1) as bouncer:
        yield bouncer


@pytest.fixture(scope="module")
def coordinator(bouncer: Bouncer) -> Iterator[CoordinatorProcess]:
    """A coordinator of `through`, the server behind the pooler."""
    with coordinating(f"pooler{os.getpid()}", {"through": through(bouncer)}, GROUPS) as coordinator:
        yield coordinator


@pytest.fixture
def pool(coordinator: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process."""
    with pool_of(coordinator.names.pool) as pool:
        yield pool


def test_a_group_without_settings_works(pool: Pool) -> None:
    """Nothing goes along at start-up that PgBouncer refuses, and its made-up process numbers are taken."""
    numbers = set()
    with pool.connection("any") as one, pool.connection("any") as two, pool.connection("any") as three:
        for conn in (one, two, three):
            assert one_value(conn, "SELECT 1") == 1
            numbers.add(backend(conn))
    assert len(numbers) == 3
    with pool.connection("write") as conn:
        assert one_value(conn, "SELECT NOT pg_is_in_recovery()")


@pytest.mark.parametrize("group", ["bounded", "bounded-tx"])
def test_settings_are_in_effect(pool: Pool, group: str) -> None:
    """Each bound and setting of a group is what its connections SHOW, as they are without a pooler (test_open.py)."""
    with pool.connection(group) as conn:
        assert {name: one_value(conn, f"SHOW {name}") for name in IN_EFFECT} == IN_EFFECT


def test_settings_outlive_a_reset(pool: Pool) -> None:
    """RESET ALL at checkin goes back to the group's settings, not to the server's."""
    with pool.connection("reset") as conn:
        one_value(conn, "SELECT set_config('work_mem', '1MB', false)")
    with pool.connection("reset") as conn:
        assert {name: one_value(conn, f"SHOW {name}") for name in IN_EFFECT} == IN_EFFECT


def test_transactions_are_as_the_group_wants_them(pool: Pool) -> None:
    """Isolation level and read-only hold, also after a user of the connection chose others."""
    for _ in range(2):
        with pool.connection("strict") as conn:
            assert one_value(conn, "SHOW transaction_isolation") == "serializable"
            assert one_value(conn, "SHOW transaction_read_only") == "on"
            conn.rollback()
            conn.set_session(readonly=False, isolation_level="READ COMMITTED")


def test_read_only_transactions_reach_nobody_else(pool: Pool) -> None:
    """A group that reads only leaves the pooler's server connection, which others write on, as it was."""
    with pool.connection("strict") as conn:
        server = one_value(conn, "SELECT pg_backend_pid()")
    with pool.connection("any") as conn:
        assert one_value(conn, "SELECT pg_backend_pid()") == server  # the only one that the pooler has
        assert one_value(conn, "SHOW transaction_read_only") == "off"


def test_the_role_is_asked_for(pool_name: str) -> None:
    """The role that a pooler reported when it connected first does not count once the server was promoted."""
    with Cluster(standbys=1) as servers, running_pgbouncer({"postgres": servers.standbys[0].port}) as bouncer:
        groups = {"write": GROUPS["write"], "any": GROUPS["any"]}
        with coordinating(pool_name, {"through": through(bouncer)}, groups), pool_of(pool_name) as pool:
            with pool.connection("any") as conn:
                assert conn.get_parameter_status("in_hot_standby") == "on"
            servers.standbys[0].promote()
            with pool.connection("write") as conn:
                assert conn.get_parameter_status("in_hot_standby") == "on"
                assert one_value(conn, "SELECT NOT pg_is_in_recovery()")


def test_a_pooler_whose_server_does_not_answer(pool_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pooler goes on taking connections: an open ends in its time, the endpoint goes DOWN, and UP afterwards."""
    monkeypatch.setattr(session, "POOLER_ANSWER_S", 0.3)
    with (
        Cluster() as servers,
        running_pgbouncer({"postgres": servers.primary.port}) as bouncer,
        coordinating(pool_name, {"through": through(bouncer)}, {"write": GROUPS["write"]}) as coordinator,
        pool_of(pool_name) as pool,
    ):
        with pool.connection("write") as held:
            one_value(held, "SELECT 1")
            with frozen(servers.primary):
                began = time.monotonic()
                with pytest.raises(psycopg2.OperationalError, match="behind its pooler: no answer within"):
                    pool.checkout("write", timeout=0.5)
                assert time.monotonic() - began < 2.5

        def is_in(health: Health) -> Callable[[], bool]:
            return lambda: observe(Names.of(pool_name)).endpoints[0].health is health

        servers.primary.stop("immediate")
        wait_until(is_in(Health.DOWN), within=15, what=lambda: coordinator.log)
        servers.primary.start()
        wait_until(is_in(Health.UP), within=15, what=lambda: coordinator.log)
        with pool.connection("write") as conn:
            assert one_value(conn, "SELECT 1") == 1


def probed(conninfo: str) -> ProbeResult:
    """Return what a probe through a pooler sees of an endpoint."""
    settings = EndpointSettings(0, "pg1", conninfo, 3, 1, False, "instance", "pooler", Credentials("", (), ""))
    with closing(Probe(settings, pool="web")) as probe:
        return probe.check()


def test_probes_understand_the_pooler(bouncer: Bouncer) -> None:
    """What PgBouncer says itself is told from a failing server, though it gives all of it one SQLSTATE."""
    result = probed(bouncer.conninfo())
    assert (result.verdict, result.role) == (Verdict.OK, Role.PRIMARY)
    for wrong in (bouncer.conninfo("nowhere"), bouncer.conninfo(user="stranger")):
        result = probed(wrong)
        assert result.verdict is Verdict.MISCONFIGURED, result.error
