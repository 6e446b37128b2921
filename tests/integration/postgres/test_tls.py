"""Servers over TLS: certificates that fit and that do not, a query that is cut, and how soon each is known.

TLS is that of a relay before the server, whose certificates are made here.  What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from shmpool import QueryTimeout
from shmpool.states import Health, Verdict
from tests.support.coordinator import running_coordinator
from tests.support.endpoints import (
    ANY,
    FALL,
    INTER_S,
    JITTER,
    PROBE,
    REFUSED_DOWN_S,
    SILENT_DOWN_S,
    SLACK_S,
    TIMEOUT_S,
    UP_S,
    after_probes,
    coordinating,
    endpoint,
    findings,
    is_in,
    seconds_until,
    watched_config,
)
from tests.support.relay import Relay
from tests.support.tls import Certificate, require_openssl
from tests.support.workers import is_whole, one_value, pool_of
from tools.pg_cluster import Server

HOST = "db.test"
QUERY_TIMEOUT_S = 0.3
CLOSE_S = 0.2  # beside it, until the thread is free


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    """Certificates: one that fits HOST, one of another host, one of another authority."""
    require_openssl()
    directory = tmp_path_factory.mktemp("certificates")
    return {
        "right": Certificate(directory, "right", HOST),
        "other host": Certificate(directory, "other-host", "elsewhere.test"),
        "other authority": Certificate(directory, "other-authority", HOST),
    }


@pytest.fixture
def relay(primary: Server, certificates: dict[str, Certificate]) -> Iterator[Relay]:
    """A relay that has the certificate that fits."""
    with Relay(primary.port, context=certificates["right"].context()) as relay:
        yield relay


def over_tls(port: int, authority: Path) -> str:
    """Return a conninfo that believes one authority only, and asks for the server's name."""
    return (
        f"host={HOST} hostaddr=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2 "
        f"sslmode=verify-full sslrootcert={authority} gssencmode=disable"
    )


def test_right_certificate(pool_name: str, relay: Relay, certificates: dict[str, Certificate]) -> None:
    """A server whose certificate fits is UP, and serves over TLS; frozen behind it, it is DOWN in the usual time."""
    place = over_tls(relay.port, certificates["right"].file)
    with coordinating(pool_name, {"pg1": place}, ANY) as coordinator, pool_of(pool_name) as pool:
        with pool.connection("any") as conn:
            assert conn.info.ssl_in_use
            assert one_value(conn, "SELECT 1") == 1
        with relay.black_hole():
            took = seconds_until(is_in(pool_name, "pg1", Health.DOWN), SILENT_DOWN_S, coordinator)
        seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S, coordinator)
        with relay.resets():
            lost = seconds_until(is_in(pool_name, "pg1", Health.DOWN), REFUSED_DOWN_S, coordinator)
        seconds_until(is_in(pool_name, "pg1", Health.UP), UP_S, coordinator)
    print(f"\nover TLS: black hole DOWN after {took:.3f} s, resets after {lost:.3f} s")


@pytest.mark.parametrize("which", ["other host", "other authority"])
def test_wrong_certificate(pool_name: str, primary: Server, certificates: dict[str, Certificate], which: str) -> None:
    """A certificate that does not fit: misconfigured with the first probe, never DOWN; workers are told what it is."""
    wrong = certificates[which]
    authority = wrong if which == "other host" else certificates["right"]
    with Relay(primary.port, context=wrong.context()) as relay:
        place = over_tls(relay.port, authority.file)
        with (
            running_coordinator(watched_config(pool_name, {"pg1": place}, ANY, PROBE), pool_name) as coordinator,
            pool_of(pool_name) as pool,
        ):
            took = seconds_until(
                lambda: endpoint(pool_name, "pg1").verdict is Verdict.MISCONFIGURED,
                JITTER * INTER_S + TIMEOUT_S,
                coordinator,
            )
            after_probes(coordinator, FALL + 1)
            assert endpoint(pool_name, "pg1").health is not Health.DOWN
            assert "endpoint-misconfigured" in findings(pool_name)
            assert "certificate" in coordinator.log
            began = time.monotonic()
            with pytest.raises(psycopg2.OperationalError, match="certificate"):
                pool.checkout("any", timeout=10)
            told_s = time.monotonic() - began
            assert told_s < SLACK_S, "it does not pass by itself"
            assert is_whole(pool_name), "no permit waits for a session that never was"
    print(f"\n{which}: misconfigured after {took:.3f} s, a worker knew after {told_s:.3f} s")


def test_certificate_that_no_longer_fits(pool_name: str, primary: Server, certificates: dict[str, Certificate]) -> None:
    """A server that comes back with another certificate is not DOWN for it, and well again with the right one."""
    place_of = certificates["right"].file
    with Relay(primary.port, context=certificates["right"].context()) as relay:
        port = relay.port
        with coordinating(pool_name, {"pg1": over_tls(port, place_of)}, ANY) as coordinator:
            relay.context = certificates["other authority"].context()
            relay.cut()
            seconds_until(
                lambda: endpoint(pool_name, "pg1").verdict is Verdict.MISCONFIGURED,
                JITTER * INTER_S + TIMEOUT_S,
                coordinator,
            )
            after_probes(coordinator, FALL + 1)
            assert endpoint(pool_name, "pg1").health is Health.UP
            relay.context = certificates["right"].context()
            seconds_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.OK, UP_S, coordinator)


def test_query_timeout_over_tls(pool_name: str, relay: Relay, certificates: dict[str, Certificate]) -> None:
    """A query over TLS that a black hole swallows is cut, and its thread free, within query_timeout + 0.2 s."""
    group = {"any": f'{ANY["any"]}\nquery_timeout = "{QUERY_TIMEOUT_S}s"'}
    place = over_tls(relay.port, certificates["right"].file)
    with coordinating(pool_name, {"pg1": place}, group), pool_of(pool_name) as pool:
        conn = pool.checkout("any")
        assert conn.info.ssl_in_use
        with relay.black_hole():
            began = time.monotonic()
            with pytest.raises(QueryTimeout):
                one_value(conn, "SELECT 1")
            took = time.monotonic() - began
            pool.checkin(conn)
        assert QUERY_TIMEOUT_S <= took < QUERY_TIMEOUT_S + CLOSE_S
    print(f"\nquery over TLS into a black hole: free after {took:.3f} s (query_timeout {QUERY_TIMEOUT_S:g} s)")
