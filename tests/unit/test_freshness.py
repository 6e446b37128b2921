"""What is known of a connection's server without asking it."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from shmpool.freshness import is_known_to_show
from shmpool.layout import ENDPOINTS
from shmpool.position import CommitPosition, Standing
from shmpool.states import Role, Verdict
from tests.support.pools import OfflinePool, endpoint_settings, healthy, offline_pool

AFTER = CommitPosition(system_identifier=7, timeline=2, lsn=1000)
PASSED = Standing(Role.REPLICA, 7, 2, 1000)
PROBED_AT = 50.0


def record(pool: OfflinePool, **status: Any) -> None:
    """Store in the coordinator's place that a probe saw the endpoint at AFTER."""
    at = pool.segment.layout.at(ENDPOINTS, 0)
    for column, value in (("lsn", 1000), ("timeline", 2), ("system_identifier", 7)):
        pool.segment.words[at + ENDPOINTS.column(column)] = value
    pool.segment.words[at + ENDPOINTS.column("status")] = healthy(role=Role.REPLICA, **status).word()
    pool.segment.times[at + ENDPOINTS.column("probed_at")] = PROBED_AT


def is_known(pool: OfflinePool, opened_at: float, seen: Standing | None = None, **settings: Any) -> bool:
    """Judge a connection to the endpoint."""
    lease = Mock()
    lease.recipe.endpoint = endpoint_settings()._replace(**settings)
    lease.connection.seen, lease.connection.opened_at = seen, opened_at
    lease.group.attachment.segment = pool.segment
    return is_known_to_show(lease, AFTER)


@pytest.mark.parametrize(("opened_at", "known"), [(PROBED_AT - 1, True), (PROBED_AT, False), (PROBED_AT + 1, False)])
def test_probe_counts_for_connections_that_are_older(opened_at: float, known: bool) -> None:
    """A connection opened after the probe may lead to another server than the one that the probe saw."""
    with offline_pool() as pool:
        assert not is_known(pool, opened_at)
        record(pool)
        assert is_known(pool, opened_at) is known


def test_answer_of_the_server_itself_counts() -> None:
    """What the connection's server said holds for it; a promotion since then is another matter."""
    with offline_pool() as pool:
        assert is_known(pool, PROBED_AT, PASSED)
        assert is_known(pool, PROBED_AT, PASSED, address="service")
        assert not is_known(pool, PROBED_AT, PASSED._replace(lsn=999))
        assert not is_known(pool, PROBED_AT, PASSED._replace(timeline=1))


@pytest.mark.parametrize("settings", [{"address": "service"}, {"via": "pooler"}])
def test_probe_says_nothing_where_it_may_have_seen_another_server(settings: dict[str, Any]) -> None:
    """Behind a service's name or a pooler the connection itself must be asked."""
    with offline_pool() as pool:
        record(pool)
        assert not is_known(pool, PROBED_AT - 1, **settings)


def test_pooler_is_always_asked() -> None:
    """Behind a pooler not even an answer lasts."""
    with offline_pool() as pool:
        assert not is_known(pool, PROBED_AT, PASSED, via="pooler")


def test_failed_probe_says_nothing() -> None:
    """After a probe that failed what an earlier one saw is not taken for news."""
    with offline_pool() as pool:
        record(pool, verdict=Verdict.TIMEOUT)
        assert not is_known(pool, PROBED_AT - 1)
