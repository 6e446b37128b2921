"""What a worker reads of the endpoint table and the slot words."""

from __future__ import annotations

from shmpool.endpoints import count_held, is_overtaken
from shmpool.states import Health, Role, Verdict
from shmpool.words import ORPHAN
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from tests.support.desk import config_of, desk


def test_connections_of_a_group_at_an_endpoint(pool_name: str) -> None:
    """Counted are the pairs held for certain, by anybody, of this group at this endpoint."""
    with desk(config_of(pool_name, {"a": 2, "b": 2}, {"pg1": 2, "pg2": 3})) as made:
        segment = made.registry.segment

        def counts() -> list[list[int]]:
            return [[count_held(segment, made.groups[g], made.endpoints[e]) for e in (0, 1)] for g in (0, 1)]

        assert counts() == [[0, 0], [0, 0]]
        tokens = [made.claim(0), made.claim(0), made.claim(1)]
        assert counts() == [[2, 0], [0, 1]]
        made.set_word(tokens[0], made.word(tokens[0]) | ORPHAN)
        assert counts() == [[2, 0], [0, 1]]
        made.table.release(tokens[1])
        assert counts() == [[1, 0], [0, 1]]


def test_older_primary_is_overtaken_whatever_its_health(pool_name: str) -> None:
    """What was last seen as a primary on an older timeline is, DOWN or not; no longer once a worker saw a standby."""
    with desk(config_of(pool_name, {"a": 2}, {"pg1": 2, "pg2": 2})) as made:
        registry = made.registry
        assert registry.settings is not None
        endpoints = registry.settings.endpoints
        primary = EndpointHealth(health=Health.UP, role=Role.PRIMARY, verdict=Verdict.OK)
        for index, timeline in ((0, 1), (1, 2)):
            seen = ProbeResult(verdict=Verdict.OK, role=Role.PRIMARY, timeline=timeline, system_identifier=7, lsn=1)
            registry.endpoints.record_probe(index, primary, seen)

        def overtaken() -> list[bool]:
            return [is_overtaken(registry.segment, endpoints, index) for index in (0, 1)]

        assert overtaken() == [True, False]
        registry.endpoints.judge(0, EndpointHealth(health=Health.DOWN, role=Role.PRIMARY, verdict=Verdict.TIMEOUT))
        assert registry.endpoints.status(0).verdict is Verdict.TIMEOUT
        assert overtaken() == [True, False]
        registry.endpoints.record_serving(
            0, EndpointHealth(health=Health.UP, role=Role.REPLICA, verdict=Verdict.TIMEOUT)
        )
        assert overtaken() == [False, False]
        registry.endpoints.record_serving(
            0, EndpointHealth(health=Health.UP, role=Role.PRIMARY, verdict=Verdict.TIMEOUT)
        )
        assert registry.endpoints.status(0).verdict is Verdict.TIMEOUT, (
            "its timeline is not known: it supersedes nobody"
        )
        assert overtaken() == [False, False]
