"""Settle, audit, grow and shrink over a real segment and real semaphores."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from shmpool.slots import Outcome
from shmpool.words import MAYBE, ORPHAN, YES, Control, Kind, SlotWord, with_field
from tests.support.desk import Desk, config_of, desk

G, E = 0, 3  # numbers of the group's and the endpoint's semaphore: three groups fit


def stays(slot: int, word: int) -> bool:
    """Say that every orphan's server session still lives."""
    return False


def gone(slot: int, word: int) -> bool:
    """Say that every orphan's server session has ended."""
    return True


@pytest.fixture
def pool(pool_name: str) -> Iterator[Desk]:
    """A pool with two group permits and three endpoint permits."""
    with desk(config_of(pool_name)) as made:
        yield made


def test_first_grow_fills_new_semaphores(pool: Desk) -> None:
    """A new semaphore starts at 0 and holds its whole cap after the first tick."""
    assert pool.control(G) == Control(2, 2, 0)
    assert pool.registry.permits.value(G) == 2
    assert pool.control(E) == Control(3, 3, 0)
    assert pool.violations() == []


def test_orphan_gives_group_permit_back_before_the_endpoint_permit(pool: Desk) -> None:
    """An abandoned slot's group permit comes back at once, the endpoint's only after its session is gone."""
    permits = pool.registry.permits
    token = pool.claim()
    pool.table.abandon(token)
    permits.tick(stays)
    assert (permits.value(G), permits.value(E)) == (2, 2)
    assert SlotWord.of(pool.word(token))[1:] == (0, 0, 0, YES, True)
    assert pool.violations() == []
    permits.tick(gone)
    assert permits.value(E) == 3
    assert SlotWord.of(pool.word(token)).is_free
    assert not pool.word(token) & ORPHAN
    assert pool.violations() == []


@pytest.mark.parametrize("kind", [Kind.GROUP, Kind.ENDPOINT])
@pytest.mark.parametrize("was_given", [True, False])
def test_audit_counts_what_an_orphan_may_hold(pool: Desk, kind: Kind, was_given: bool) -> None:
    """A MAYBE field of an orphan ends as NONE, and its permit exists once, whether it was given back or not."""
    permits, number = pool.registry.permits, G if kind is Kind.GROUP else E
    token = pool.claim()
    if was_given:
        (pool.groups[0] if kind is Kind.GROUP else pool.endpoints[0]).semaphore.release()
    pool.set_word(token, with_field(pool.word(token), kind, MAYBE) | ORPHAN)
    permits.tick(gone)
    permits.tick(gone)
    assert pool.slot_words()[token.number] & ~(-1 << 21) == 0
    assert (permits.value(G), permits.value(E)) == (2, 3)
    assert pool.counter(number, "lost_found") == (0 if was_given else 1)
    assert pool.violations() == []


def test_audit_of_both_fields_in_one_tick(pool: Desk) -> None:
    """A slot that died in the middle of its release is cleared in one tick, by one copy."""
    permits = pool.registry.permits
    token = pool.claim()
    word = with_field(with_field(pool.word(token), Kind.ENDPOINT, MAYBE), Kind.GROUP, MAYBE)
    pool.endpoints[0].semaphore.release()
    pool.set_word(token, word | ORPHAN)
    permits.tick(gone)
    assert SlotWord.of(pool.word(token)).is_free
    assert (permits.value(G), permits.value(E)) == (2, 3)


def test_audit_leaves_what_a_live_bracket_may_hold(pool: Desk) -> None:
    """With one live unknown slot and one lost permit, an orphan's fate stays open until the live one is certain."""
    permits = pool.registry.permits
    live, orphan = pool.claim(), pool.claim()
    certain = pool.word(live)
    pool.set_word(live, with_field(certain, Kind.GROUP, MAYBE))
    pool.set_word(orphan, with_field(pool.word(orphan), Kind.GROUP, MAYBE) | ORPHAN)
    pool.groups[0].semaphore.release()
    permits.tick(gone)
    assert SlotWord.of(pool.word(orphan)).group_field == MAYBE
    assert permits.value(G) == 1
    pool.set_word(live, with_field(pool.word(live), Kind.GROUP, YES))
    permits.tick(gone)
    assert SlotWord.of(pool.word(orphan)).is_free
    assert permits.value(G) == 1
    assert pool.violations() == []


def test_never_touches_a_live_word(pool: Desk) -> None:
    """A word without ORPHAN is never written, however long it stays unknown."""
    token = pool.claim()
    pool.set_word(token, with_field(pool.word(token), Kind.GROUP, MAYBE))
    before = pool.slot_words()
    for _ in range(3):
        pool.registry.permits.tick(gone)
    assert pool.slot_words() == before


def test_lowered_cap_is_absorbed_as_permits_come_back(pool: Desk) -> None:
    """A cap that is lowered under load shrinks with each release, and no claim gets the surplus."""
    permits = pool.registry.permits
    first, second = pool.claim(), pool.claim()
    permits.set_target(G, 1)
    permits.tick(stays)
    assert pool.control(G) == Control(1, 2, 0)
    assert pool.violations() == []
    pool.table.release(first)
    again = pool.table.take(pool.groups[0])
    assert pool.table.claim(again, pool.groups[0], list(pool.endpoints.values())) is Outcome.GROUP_BUSY
    permits.tick(stays)
    assert (pool.control(G), permits.value(G)) == (Control(1, 1, 0), 0)
    pool.table.release(second)
    permits.tick(stays)
    assert (pool.control(G), permits.value(G)) == (Control(1, 1, 0), 1)
    assert pool.violations() == []
    pool.table.put_back(again)


def test_orphan_of_a_surplus_is_absorbed(pool: Desk) -> None:
    """What an orphan certainly held is not posted but taken off the surplus."""
    permits = pool.registry.permits
    token, _kept = pool.claim(), pool.claim()
    permits.set_target(G, 1)
    pool.table.abandon(token)
    permits.tick(gone)
    assert (pool.control(G), permits.value(G)) == (Control(1, 1, 0), 0)
    assert pool.violations() == []


def test_lost_permit_of_a_surplus_is_absorbed(pool: Desk) -> None:
    """A lost permit that counting finds is taken off the surplus as well."""
    permits = pool.registry.permits
    token, _kept = pool.claim(), pool.claim()
    permits.set_target(G, 1)
    pool.set_word(token, with_field(pool.word(token), Kind.GROUP, MAYBE) | ORPHAN)
    permits.tick(gone)
    assert (pool.control(G), permits.value(G)) == (Control(1, 1, 0), 0)
    assert pool.counter(G, "lost_found") == 0


def test_raised_cap_grows(pool: Desk) -> None:
    """A raised cap is there after one tick."""
    pool.registry.permits.set_target(G, 5)
    pool.registry.permits.tick(stays)
    assert (pool.control(G), pool.registry.permits.value(G)) == (Control(5, 5, 0), 5)
    assert pool.violations() == []


@pytest.mark.parametrize("posted", [0, 1, 3])
def test_coordinator_killed_while_growing(pool: Desk, posted: int) -> None:
    """A grow that stopped anywhere is finished by counting, and nothing is posted twice."""
    permits = pool.registry.permits
    permits.set_target(G, 5)
    pool.set_control(G, Control(5, 5, 3))
    for _ in range(posted):
        pool.groups[0].semaphore.release()
    permits.tick(stays)
    assert (pool.control(G), permits.value(G)) == (Control(5, 5, 0), 5)
    assert pool.violations() == []


@pytest.mark.parametrize("taken", [True, False])
def test_coordinator_killed_while_shrinking(pool: Desk, taken: bool) -> None:
    """A shrink that stopped around its acquire is finished by counting."""
    permits = pool.registry.permits
    permits.set_target(G, 1)
    pool.set_control(G, Control(1, 2, 1))
    if taken:
        pool.groups[0].semaphore.acquire(0)
    permits.tick(stays)
    permits.tick(stays)
    assert (pool.control(G), permits.value(G)) == (Control(1, 1, 0), 1)
    assert pool.violations() == []


def test_coordinator_killed_between_post_and_mark(pool: Desk) -> None:
    """A permit that was posted before the slot was marked is counted, not posted again."""
    permits = pool.registry.permits
    token = pool.claim()
    pool.set_word(token, with_field(pool.word(token), Kind.GROUP, MAYBE) | ORPHAN)
    pool.groups[0].semaphore.release()
    permits.tick(gone)
    assert permits.value(G) == 2
    assert SlotWord.of(pool.word(token)).is_free


def test_invented_permit_is_reported_and_nothing_is_touched(pool: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """An impossible count is logged once, counted, and nothing is changed."""
    pool.groups[0].semaphore.release()
    with caplog.at_level(logging.CRITICAL):
        for _ in range(3):
            pool.registry.permits.tick(gone)
    assert len([r for r in caplog.records if "out of bounds" in r.message]) == 1
    assert pool.counter(G, "out_of_bounds") == 3
    assert pool.registry.permits.value(G) == 3
    pool.groups[0].semaphore.acquire(0)
    pool.registry.permits.tick(gone)
    assert pool.violations() == []


def test_quiet_tick_does_no_audit_but_sees_a_changed_value(pool: Desk) -> None:
    """A tick over unchanged words skips the counting; a value that does not fit brings it back."""
    permits = pool.registry.permits
    permits.tick(stays)
    audits = pool.counter(G, "audits")
    permits.tick(stays)
    assert pool.counter(G, "audits") == audits
    pool.groups[0].semaphore.acquire(0)
    permits.tick(stays)
    assert pool.counter(G, "out_of_bounds") == 1
    pool.groups[0].semaphore.release()


def test_giving_back_rings(pool: Desk) -> None:
    """A permit that the coordinator gives back rings the group's bell and those of the endpoint's users."""
    for bell in (pool.groups[0].bell, pool.groups[0].endpoint_bell):
        while bell.value:
            bell.acquire(0)
    pool.table.abandon(pool.claim())
    pool.registry.permits.tick(gone)
    assert (pool.groups[0].bell.value, pool.groups[0].endpoint_bell.value) == (1, 1)


def test_waiters_are_rung_whatever_the_bell_says(pool: Desk) -> None:
    """While a permit is free and somebody waits, each tick rings on, also over a ring that woke nobody."""
    before = pool.groups[0].bell.value
    pool.registry.permits.ring_waiting({0}, set())
    pool.registry.permits.ring_waiting({0}, set())
    assert pool.groups[0].bell.value == before + 2
