"""Bringing in line what somebody wrote past the protocol."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from shmpool.words import MAYBE, ORPHAN, SEQ_ONE, Control, Kind, SlotWord, endpoint_part, with_field
from tests.support.desk import Desk, config_of, desk

G, E = 0, 3  # numbers of the one group's and the one endpoint's semaphore


@pytest.fixture
def pool(pool_name: str) -> Iterator[Desk]:
    """A pool with one group of 2 and one endpoint of 3 permits."""
    with desk(config_of(pool_name)) as one:
        yield one


def tick(pool: Desk) -> None:
    """Let the coordinator tick."""
    pool.registry.permits.tick(lambda slot, word: True)


def test_nothing_out_of_bounds_is_nothing_to_repair(pool: Desk) -> None:
    """A pool in use is left as it is, also one with a slot in doubt."""
    token = pool.claim()
    assert pool.registry.repair(apply=True) == []
    pool.set_word(token, with_field(pool.word(token), Kind.GROUP, MAYBE))
    before = (pool.slot_words(), pool.control(G), pool.registry.permits.value(G))
    assert pool.registry.repair(apply=True) == []
    assert (pool.slot_words(), pool.control(G), pool.registry.permits.value(G)) == before


def test_an_invented_permit_is_taken_away(pool: Desk) -> None:
    """A permit too many is said, and with `apply` taken; the fault is forgotten and status is fine again."""
    pool.groups[0].semaphore.release()
    tick(pool)
    assert pool.counter(G, "out_of_bounds") > 0
    (line,) = pool.registry.repair(apply=False)
    assert line == "group read: issued 2, value 3, held 0, in doubt 0: issued +0, value -1"
    assert pool.registry.permits.value(G) == 3
    assert pool.registry.repair(apply=True) == [line]
    assert pool.registry.permits.value(G) == 2
    assert pool.counter(G, "out_of_bounds") == 0
    assert pool.violations() == []


def test_a_stolen_permit_is_posted(pool: Desk) -> None:
    """A permit that nobody holds and no slot speaks of comes back."""
    pool.claim()
    pool.endpoints[0].semaphore.acquire(0)
    tick(pool)
    pool.registry.repair(apply=True)
    assert pool.registry.permits.value(E) == 2
    assert pool.violations() == []


def test_what_workers_hold_too_much_is_taken_later(pool: Desk) -> None:
    """Surplus permits that workers hold are named; asked again after they came back, the rest is taken."""
    pool.groups[0].semaphore.release()
    tokens = [pool.claim(), pool.claim(), pool.claim()]
    (line,) = pool.registry.repair(apply=True)
    assert "1 too many are with workers" in line
    for token in tokens:
        pool.table.release(token)
    assert len(pool.registry.repair(apply=True)) == 1
    assert pool.registry.permits.value(G) == 2
    assert pool.violations() == []


def test_a_slot_in_doubt_keeps_the_repair_back(pool: Desk) -> None:
    """While a word that speaks of the semaphore is uncertain nothing is done, as the difference is not exact."""
    token = pool.claim()
    pool.set_word(token, with_field(pool.word(token), Kind.GROUP, MAYBE))
    for _ in range(3):
        pool.groups[0].semaphore.release()
    (line,) = pool.registry.repair(apply=True)
    assert "left alone until nothing is in doubt" in line
    assert pool.registry.permits.value(G) == 4


def test_a_word_of_an_orphan_that_means_nothing_is_cleared(pool: Desk) -> None:
    """An orphan that speaks of an endpoint that does not exist is cleared; a live worker's word is only named."""
    token = pool.table.take(pool.groups[0])
    foreign = (pool.word(token) + SEQ_ONE) | endpoint_part(2, 2)
    pool.set_word(token, foreign)
    assert "live worker's" in pool.registry.repair(apply=True)[0]
    assert pool.word(token) == foreign
    pool.set_word(token, foreign | ORPHAN)
    assert "clear it" in pool.registry.repair(apply=True)[0]
    assert SlotWord.of(pool.word(token)).is_free
    assert pool.registry.repair(apply=True) == []


@pytest.mark.parametrize("seed", range(30))
def test_scribbled_control_words_and_semaphores_never_exceed_the_cap(pool_name: str, seed: int) -> None:
    """Whatever was written, repairs and ticks end with exactly the cap once all is given back, and never above it."""
    chance = random.Random(seed)
    with desk(config_of(pool_name)) as pool:
        tokens = [pool.claim() for _ in range(chance.randrange(3))]
        for number, semaphore in ((G, pool.groups[0].semaphore), (E, pool.endpoints[0].semaphore)):
            if chance.random() < 0.7:
                pool.set_control(number, Control(chance.randrange(6), chance.randrange(6), 0))
            for _ in range(chance.randrange(3)):
                semaphore.release()
            for _ in range(chance.randrange(3)):
                if semaphore.value:
                    semaphore.acquire(0)
        tick(pool)
        pool.registry.repair(apply=True)
        for token in tokens:
            pool.table.release(token)
        pool.registry.repair(apply=True)
        for _ in range(3):
            tick(pool)
        assert pool.registry.repair(apply=False) == []
        assert (pool.control(G), pool.registry.permits.value(G)) == (Control(2, 2, 0), 2)
        assert (pool.control(E), pool.registry.permits.value(E)) == (Control(3, 3, 0), 3)
        assert pool.violations() == []
