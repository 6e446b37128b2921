"""Whose turn it is among the endpoints."""

from __future__ import annotations

import logging

import pytest

from shmpool.pgdbpool.configuration import parse
from shmpool.pgdbpool.rota import Endpoint, Rota
from tests.support.pgdbpool import config_of, entry


def rota_of(count: int) -> Rota:
    """Return a rota of endpoints that are skipped for a second after a failure."""
    return Rota(parse(config_of(*(entry(f"h{n}") for n in range(count)))).endpoints)


def hosts(endpoints: list[Endpoint]) -> list[str | None]:
    """Return their host names."""
    return [one.settings.host for one in endpoints]


def test_homes_are_dealt_in_turn() -> None:
    """Connections are dealt to the endpoints one after the other, in the configuration's order."""
    rota = rota_of(3)
    assert hosts([rota.deal() for _ in range(7)]) == ["h0", "h1", "h2", "h0", "h1", "h2", "h0"]


def test_home_is_tried_first() -> None:
    """A connection goes to its home, and from there to the others in order."""
    rota = rota_of(3)
    assert hosts(rota.candidates(rota.endpoints[1], 0.0)) == ["h1", "h2", "h0"]


def test_failed_endpoint_is_skipped_and_tried_last() -> None:
    """For its retry sleep a failed endpoint is not tried at all, afterwards only if no other serves."""
    rota = rota_of(2)
    home = rota.endpoints[0]
    home.failed("gone", 100.0, 100.0)
    assert hosts(rota.candidates(home, 100.9)) == ["h1"]
    assert hosts(rota.candidates(home, 101.0)) == ["h1", "h0"]
    home.served()
    assert hosts(rota.candidates(home, 101.0)) == ["h0", "h1"]


def test_one_attempt_at_a_time() -> None:
    """While somebody tries an endpoint that failed last, nobody else does; one that is well takes everybody."""
    (endpoint,) = rota_of(1).endpoints
    endpoint.begin(100.0)
    assert endpoint.is_due(100.0)
    endpoint.failed("gone", 100.0, 100.0)
    assert endpoint.is_due(101.0)
    endpoint.begin(101.0)
    assert not endpoint.is_due(101.0)


def test_slow_failures_are_seldom_risked() -> None:
    """Who has a connection elsewhere seldom tries an endpoint whose attempts take long."""
    (endpoint,) = rota_of(1).endpoints
    endpoint.failed("timeout", 100.0, 110.0)
    assert endpoint.is_due(111.0)
    assert not endpoint.is_inviting(209.0)
    assert endpoint.is_inviting(210.0)


def test_pause() -> None:
    """The pause lasts until the first endpoint may be tried again."""
    rota = rota_of(2)
    assert rota.pause(100.0) == 0.0
    rota.endpoints[0].failed("gone", 100.0, 100.0)
    assert rota.pause(100.0) == 0.0
    rota.endpoints[1].failed("gone", 100.0, 100.5)
    assert rota.pause(100.5) == pytest.approx(0.5)


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The log says when an endpoint fails and when it serves again, once each."""
    caplog.set_level(logging.WARNING, logger="shmpool.pgdbpool")
    (endpoint,) = rota_of(1).endpoints
    for _ in range(3):
        endpoint.failed("connection refused", 100.0, 100.0)
    for _ in range(3):
        endpoint.served()
    assert [record.getMessage() for record in caplog.records] == [
        "endpoint 'app' at h0: connection refused",
        "endpoint 'app' at h0: serves again",
    ]
