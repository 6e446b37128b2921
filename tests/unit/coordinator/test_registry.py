"""Create, adopt, reconfigure and check a segment."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from shmpool import segment
from shmpool.endpoints import Sighting, read_sighting
from shmpool.errors import SegmentMismatchError
from shmpool.layout import ENDPOINTS, GROUPS, Layout
from shmpool.names import Names
from shmpool.position import Standing
from shmpool.states import ADMIN_MOVES, Admin, Health, Role, SegmentState, Verdict
from shmpool.words import Control
from shmpool_coordinator.adoption import Access, lock_pool
from shmpool_coordinator.endpoints import UnknownEndpointError
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from shmpool_coordinator.registry import Registry
from tests.support.desk import close_desk, config_of, desk, open_desk


def gone(slot: int, word: int) -> bool:
    """Say that every session has ended."""
    return True


def test_created_segment_is_open_and_private(pool_name: str) -> None:
    """A new pool is OPEN, published, and for its user alone."""
    registry = open_desk(config_of(pool_name))
    try:
        assert registry.segment.state is SegmentState.OPEN
        assert registry.segment.read_settings()[1].groups[0].connections == 2
        assert registry.damage() is None
        for path in registry.names.leftovers():
            assert os.stat(path).st_mode & 0o077 == 0
    finally:
        close_desk(registry)
    assert registry.names.leftovers() == []


def test_adoption_keeps_indexes_and_permits(pool_name: str) -> None:
    """A successor finds the same segment, the same rows for each name, and the permits in circulation."""
    first = open_desk(config_of(pool_name, {"a": 1, "b": 2}))
    first.permits.tick(gone)
    inode = first.segment.inode
    close_desk(first, unlink=False)
    second = open_desk(config_of(pool_name, {"b": 2, "a": 1}))
    try:
        assert second.is_adopted
        assert second.segment.inode == inode
        assert second.segment.header("coordinator_adoptions") == 2
        assert second.settings is not None
        assert {g.name: g.index for g in second.settings.groups} == {"a": 0, "b": 1}
        second.permits.tick(gone)
        assert second.permits.value(1) == 2
    finally:
        close_desk(second)


def test_half_made_segment_is_made_anew(pool_name: str) -> None:
    """A segment whose coordinator died while it created it is replaced."""
    names = Names.of(pool_name)
    segment.create(names, Layout(1, 1, 1, 1)).release()
    registry = open_desk(config_of(pool_name))
    assert not registry.is_adopted
    close_desk(registry)


def test_segment_of_another_format_is_left_alone(pool_name: str) -> None:
    """Another format is a clear error, and nothing is removed."""
    names = Names.of(pool_name)
    other = segment.create(names, Layout(1, 1, 1, 1))
    other.set_header("format", 99)
    other.release()
    with pytest.raises(SegmentMismatchError, match="format is 99"):
        open_desk(config_of(pool_name))
    assert names.segment.exists()


def test_damaged_segment_that_nobody_uses_is_made_anew(pool_name: str) -> None:
    """A pool whose semaphores were cleaned away starts over once nobody uses it."""
    first = open_desk(config_of(pool_name))
    close_desk(first, unlink=False)
    first.names.semaphore_path(_token(first.names), "g", 0).unlink()
    second = open_desk(config_of(pool_name))
    assert not second.is_adopted
    close_desk(second)


def _token(names: Names) -> int:
    found = segment.attach(names)
    token = found.token
    found.release()
    return token


@pytest.mark.parametrize("kind", ["segment", "lock", "semaphore"])
def test_a_removed_name_is_noticed(pool_name: str, kind: str) -> None:
    """Each name that a cleaner removes is damage."""
    registry = open_desk(config_of(pool_name))
    names = registry.names
    path = {
        "segment": names.segment,
        "lock": names.lock,
        "semaphore": names.semaphore_path(registry.segment.token, "w", 0),
    }[kind]
    path.rename(f"{path}.away")
    try:
        assert registry.damage() is not None
    finally:
        os.rename(f"{path}.away", path)
    assert registry.damage() is None
    close_desk(registry)


def test_removed_names_are_drained_before_their_rows_are_free(pool_name: str) -> None:
    """A removed group and endpoint keep their rows, at a cap of 0, while a slot speaks of them."""
    config = config_of(pool_name, {"a": 1, "b": 2}, {"pg1": 3, "pg2": 3})
    with desk(config) as pool:
        registry = pool.registry
        token = pool.claim(0)
        smaller = config_of(pool_name, {"b": 2}, {"pg2": 3})
        changes = registry.configure(smaller)
        assert "group a: removed, 1->0 connections" in changes
        registry.permits.tick(gone)
        assert not registry.drop_drained()
        assert registry.endpoints.status(0).admin is Admin.DRAIN
        assert pool.control(0) == Control(0, 1, 0)
        pool.table.release(token)
        registry.permits.tick(gone)
        assert registry.drop_drained()
        assert registry.segment.words[registry.segment.layout.at(GROUPS, 0, "in_use")] == 0
        assert registry.segment.words[registry.segment.layout.at(ENDPOINTS, 0, "status")] == 0
        registry.configure(config_of(pool_name, {"b": 2, "c": 3}, {"pg2": 3}))
        assert registry.settings is not None
        assert {g.name: g.index for g in registry.settings.groups} == {"b": 1, "c": 0}
        registry.permits.tick(gone)
        assert registry.permits.value(0) == 3


def test_rows_that_nobody_knows_are_cleared_at_adoption(pool_name: str) -> None:
    """What a coordinator had begun to add or to drop when it died is cleared by its successor."""
    first = open_desk(config_of(pool_name, {"a": 1, "b": 2}))
    assert first.settings is not None
    first.segment.publish(first.settings._replace(groups=first.settings.groups[:1]))
    close_desk(first, unlink=False)
    second = open_desk(config_of(pool_name, {"a": 1, "c": 3}))
    try:
        assert second.settings is not None
        assert {g.name: g.index for g in second.settings.groups} == {"a": 0, "c": 1}
        second.permits.tick(gone)
        assert second.permits.value(1) == 3
        assert second.damage() is None
    finally:
        close_desk(second)


def test_configuration_that_needs_more_rows_is_refused(pool_name: str) -> None:
    """More groups than the segment has rows: an error, and nothing has changed."""
    registry = open_desk(config_of(pool_name))
    try:
        generation, settings = registry.segment.read_settings()
        many = config_of(pool_name, {"a": 1, "b": 1, "read": 1})
        bigger = many.model_copy(update={"groups": {**many.groups, "d": many.groups["a"]}})
        with pytest.raises(ValueError, match=r"no row is free for 'd'"):
            registry.configure(bigger)
        assert registry.segment.read_settings() == (generation, settings)
    finally:
        close_desk(registry)


def test_position_is_that_of_the_last_probe(pool_name: str) -> None:
    """Workers read where a server stood when the last probe asked; nothing after one that failed or was not told."""
    registry = open_desk(config_of(pool_name))
    try:
        up = EndpointHealth(health=Health.UP, role=Role.REPLICA)
        good = ProbeResult(verdict=Verdict.OK, lsn=9, timeline=2, system_identifier=-1, asked_at=50.0)

        def seen_after(result: ProbeResult) -> Sighting | None:
            registry.endpoints.record_probe(0, replace(up, verdict=result.verdict), result)
            return read_sighting(registry.segment, 0)

        assert read_sighting(registry.segment, 0) is None
        standing = Standing(Role.REPLICA, 2**64 - 1, 2, 9)
        assert seen_after(good) == Sighting(50.0, standing)
        assert seen_after(replace(good, verdict=Verdict.TIMEOUT, lsn=None)) is None
        assert seen_after(good) == Sighting(50.0, standing)
        assert seen_after(replace(good, lsn=None)) is None
        assert seen_after(good) == Sighting(50.0, standing)
        registry.segment.times[registry.segment.layout.at(ENDPOINTS, 0, "probed_at")] = 0.0  # recording
        assert read_sighting(registry.segment, 0) is None
    finally:
        close_desk(registry)


def test_failing_probes_tell_since_when(pool_name: str) -> None:
    """The first failed probe of a row is remembered until one is answered, whatever the failures were."""
    registry = open_desk(config_of(pool_name))
    try:
        at = registry.segment.layout.at(ENDPOINTS, 0, "failing_since")

        def since_after(verdict: Verdict) -> float:
            registry.endpoints.record_probe(
                0, EndpointHealth(health=Health.UP, verdict=verdict), ProbeResult(verdict=verdict)
            )
            return float(registry.segment.times[at])

        assert since_after(Verdict.OK) == 0
        first = since_after(Verdict.TIMEOUT)
        assert first > 0
        assert since_after(Verdict.MISCONFIGURED) == first
        assert since_after(Verdict.FULL) == 0
    finally:
        close_desk(registry)


def test_epoch_grows_with_what_workers_must_know(pool_name: str) -> None:
    """Health, role, address and a conflict of roles change the epoch; any other verdict or a weight does not."""
    registry = open_desk(config_of(pool_name))
    try:
        up = EndpointHealth(health=Health.UP, role=Role.PRIMARY)
        good = ProbeResult(verdict=Verdict.OK, role=Role.PRIMARY, address="10.0.0.1")

        def epoch_after(health: EndpointHealth, result: ProbeResult, verdict: Verdict) -> int:
            registry.endpoints.record_probe(0, replace(health, verdict=verdict), result)
            assert registry.endpoints.status(0).verdict is verdict
            return registry.endpoints.status(0).epoch

        first = registry.endpoints.status(0).epoch
        assert first == 1
        assert epoch_after(up, good, Verdict.OK) == 2
        assert epoch_after(up, good, Verdict.FULL) == 2
        assert epoch_after(up, replace(good, address="10.0.0.2"), Verdict.OK) == 3
        assert epoch_after(up, good, Verdict.ROLE_CONFLICT) == 4
        assert epoch_after(up, good, Verdict.OK) == 5
        assert epoch_after(replace(up, role=Role.REPLICA), good, Verdict.OK) == 6
        assert registry.endpoints.status(0).role is Role.REPLICA
    finally:
        close_desk(registry)


@pytest.mark.parametrize(("before", "after"), [(before, after) for before in Admin for after in Admin])
def test_the_operator_s_moves(pool_name: str, before: Admin, after: Admin) -> None:
    """Every drawn move is made and grows the epoch; saying the same again changes nothing."""
    registry = open_desk(config_of(pool_name))
    try:
        epoch = registry.endpoints.set_operator_wish("pg1", before).epoch
        status = registry.endpoints.set_operator_wish("pg1", after)
        assert (status.admin, status.admin_operator, status.admin_config) == (after, after, Admin.READY)
        assert (status.epoch > epoch) == (after in ADMIN_MOVES[before])
        assert registry.endpoints.drained() == (frozenset() if after is Admin.READY else {0})
    finally:
        close_desk(registry)


def test_the_stricter_wish_counts_and_neither_cancels_the_other(pool_name: str) -> None:
    """Operator and configuration want different things of an endpoint; each can take back its own wish only."""
    both, one = (config_of(pool_name, None, dict.fromkeys(names, 3)) for names in (("pg1", "pg2"), ("pg1",)))
    registry = open_desk(both)
    try:
        registry.endpoints.set_operator_wish("pg2", Admin.MAINT)
        registry.configure(one)
        status = registry.endpoints.status(1)
        assert (status.admin, status.admin_config) == (Admin.MAINT, Admin.DRAIN)
        assert registry.endpoints.set_operator_wish("pg2", Admin.READY).admin is Admin.DRAIN
        epoch = registry.endpoints.status(1).epoch
        status = registry.endpoints.set_operator_wish("pg2", Admin.DRAIN)
        assert status.epoch == epoch  # nothing that workers would notice
        registry.configure(both)
        assert registry.endpoints.status(1).admin_config is Admin.READY
        assert registry.endpoints.status(1).admin is Admin.DRAIN
    finally:
        close_desk(registry)


def test_the_operator_s_wish_is_adopted_and_passed_on(pool_name: str) -> None:
    """Another coordinator finds it in the segment; a new segment begins with it, for endpoints that still exist."""
    config = config_of(pool_name)
    first = open_desk(config)
    first.endpoints.set_operator_wish("pg1", Admin.MAINT)
    close_desk(first, unlink=False)
    second = open_desk(config)
    wishes = second.endpoints.operator_wishes()
    close_desk(second)
    assert wishes == {"pg1": Admin.MAINT}
    names = Names.of(pool_name)
    third = Registry(names, config, lock_pool(names, Access.of(config)), {"gone": Admin.DRAIN, **wishes})
    try:
        assert third.endpoints.status(0).admin_operator is Admin.MAINT
    finally:
        close_desk(third)


def test_an_unknown_endpoint_is_refused_with_the_names_there_are(pool_name: str) -> None:
    """The error names what was asked for and what there is."""
    registry = open_desk(config_of(pool_name, None, {"pg1": 3, "pg2": 3}))
    try:
        with pytest.raises(UnknownEndpointError, match="no endpoint 'pg3'; there are: pg1, pg2"):
            registry.endpoints.set_operator_wish("pg3", Admin.DRAIN)
    finally:
        close_desk(registry)


def test_groups_that_a_drain_leaves_alone(pool_name: str) -> None:
    """A group is left alone when the last endpoint that is usable for it is drained, not before."""
    registry = open_desk(config_of(pool_name, None, {"pg1": 3, "pg2": 3}))
    try:
        registry.endpoints.set_operator_wish("pg1", Admin.DRAIN)
        assert registry.endpoints.groups_left_alone_by("pg1") == []
        registry.endpoints.set_operator_wish("pg2", Admin.DRAIN)
        assert registry.endpoints.groups_left_alone_by("pg2") == ["read"]
        registry.endpoints.set_operator_wish("pg2", Admin.READY)
        assert registry.endpoints.groups_left_alone_by("pg2") == []
    finally:
        close_desk(registry)
