"""Tokens, and the brackets that claim, give up, release and abandon permits."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator

import pytest

from shmpool import semaphores, slots
from shmpool.clock import monotonic
from shmpool.errors import DisownedError, TableFullError
from shmpool.layout import WORKERS
from shmpool.rows import Row
from shmpool.segment import private_page
from shmpool.slots import BACKEND_PID, CHECKOUTS, Outcome, SlotTable, Token
from shmpool.states import Use
from shmpool.words import MAYBE, NONE, ORPHAN, YES, Control, Kind, SlotWord, UseWord, with_field
from tests.support.crashing import CountingClock, Host, host, now
from tests.support.waiting import wait_until


@pytest.fixture
def pool(pool_name: str) -> Iterator[Host]:
    """Groups read (4) and write (1), endpoints pg1 and pg2 (one permit each)."""
    with host(pool_name) as made:
        yield made


@pytest.fixture
def table(pool: Host) -> SlotTable:
    """A worker of four slots."""
    return pool.add_worker()


def fields(pool: Host, token: Token) -> tuple[int, int, bool]:
    """Return what a token's word says: group field, endpoint field, ORPHAN."""
    word = pool.word(token)
    return word.group_field, word.endpoint_field, word.orphan


def use_of(pool: Host, token: Token) -> UseWord:
    """Return a token's use word."""
    return UseWord.of(pool.segment.words[token.use_at])


def owe(pool: Host, number: int, target: int) -> None:
    """Lower a target without letting the coordinator act on it."""
    control = pool.permits.control(number)
    pool.segment.words[pool.permits._at(number)] = control._replace(target=target).word()


def test_claim_and_release(pool: Host, table: SlotTable) -> None:
    """A claim takes one permit of each semaphore and says so; a release puts both back."""
    token = table.take(pool.groups["read"])
    pool.segment.words[token.detail_at + BACKEND_PID] = 99
    assert table.claim(token, pool.groups["read"], pool.route()) is Outcome.GRANTED
    assert fields(pool, token) == (YES, YES, False)
    assert use_of(pool, token) == UseWord(Use.OPENING, 0)
    assert pool.segment.words[token.detail_at + BACKEND_PID] == 0
    assert pool.values() == [3, 1, None, 0, 1, None]
    table.release(token)
    assert pool.word(token).is_free
    assert table.is_home()
    assert pool.is_settled()


def test_endpoints_are_tried_in_order(pool: Host, table: SlotTable) -> None:
    """The first endpoint with a permit serves, in the order given."""
    first, second = pool.hold(table, "read", "pg2", "pg1"), pool.hold(table, "read", "pg2", "pg1")
    assert [pool.word(token).endpoint for token in (first, second)] == [1, 0]


def test_busy_group_leaves_a_free_word(pool: Host, table: SlotTable) -> None:
    """Where the group has no permit, the word is FREE again and nothing was taken."""
    held = pool.hold(table, "write")
    token = table.take(pool.groups["write"])
    assert table.claim(token, pool.groups["write"], pool.route()) is Outcome.GROUP_BUSY
    assert fields(pool, token) == (NONE, NONE, False)
    assert pool.values() == [4, 0, None, 0, 1, None]
    assert held


def test_busy_endpoints_leave_the_group_permit(pool: Host, table: SlotTable) -> None:
    """Where no endpoint has a permit, the group's stays; giving it up rings; claim_once gives it up itself."""
    held = [pool.hold(table, "read"), pool.hold(table, "read")]
    token = table.take(pool.groups["read"])
    assert table.claim(token, pool.groups["read"], pool.route()) is Outcome.ENDPOINTS_BUSY
    assert fields(pool, token) == (YES, NONE, False)
    assert table.claim_endpoint(token, pool.route()) is Outcome.ENDPOINTS_BUSY
    table.give_up(token)
    assert fields(pool, token) == (NONE, NONE, False)
    assert pool.groups["read"].bell.value == 1
    assert not table.claim_once(token, pool.groups["read"], pool.route())
    assert fields(pool, token) == (NONE, NONE, False)
    assert pool.values()[0] == 2
    table.release(held.pop())
    assert table.claim_once(token, pool.groups["read"], pool.route())


def test_fields_are_maybe_around_each_semaphore(pool: Host, table: SlotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a semaphore is touched, its field in the word is MAYBE, and the store before and after it is its own."""
    seen: list[tuple[str, tuple[int, int, bool]]] = []
    token = table.take(pool.groups["read"])
    group, endpoint = pool.groups["read"], pool.endpoints["pg1"]
    for name, permits in (("g", group), ("e", endpoint)):
        for verb in ("acquire", "release"):
            real = getattr(permits, verb)

            def touch(*arguments: float, real=real, what=f"{verb} {name}") -> None:  # type: ignore[no-untyped-def]
                seen.append((what, fields(pool, token)))
                real(*arguments)

            monkeypatch.setattr(permits, verb, touch)
    table.claim(token, group, [endpoint])
    table.release(token)
    assert seen == [
        ("acquire g", (MAYBE, NONE, False)),
        ("acquire e", (YES, MAYBE, False)),
        ("release e", (MAYBE, MAYBE, False)),
        ("release g", (MAYBE, MAYBE, False)),
    ]


def test_sequence_counts_every_store_and_never_falls(pool: Host, table: SlotTable) -> None:
    """seq grows by one at each store, for each endpoint tried too; ORPHAN alone does not count; nobody resets it."""
    held = pool.hold(table, "read", "pg1")
    token = table.take(pool.groups["read"])
    start = pool.word(token).seq
    table.claim(token, pool.groups["read"], pool.route("pg1", "pg2"))
    assert pool.word(token).seq == start + 4  # (g?,-) (g,e1?) (g,e2?) (g,e2)
    table.release(token)
    assert pool.word(token).seq == start + 6  # (g?,e?) FREE
    again = table.take(pool.groups["read"])
    assert again is token
    table.claim(token, pool.groups["read"], pool.route("pg2"))
    table.abandon(token)
    assert pool.word(token).seq == start + 9
    pool.tick()
    assert pool.word(token).seq > start + 9
    assert held


def test_next_owner_continues_the_sequence(pool: Host, table: SlotTable) -> None:
    """Whoever takes a row over goes on from the sequence it finds."""
    token = pool.hold(table, "read")
    table.release(token)
    seq = pool.word(token).seq
    row = table.rows[0]
    table.forget()
    generation_at = pool.segment.layout.at(WORKERS, row.number, "generation")
    pool.segment.words[generation_at] += 1
    heir = SlotTable(pool.segment, private_page())
    heir.add_row(Row(row.number, row.generation + 1, (token.number,), ()))
    assert pool.word(pool.hold(heir, "read")).seq == seq + 3


@pytest.mark.parametrize(("number", "name"), [(0, "read"), (3, "pg1")])
def test_surplus_is_left_to_the_coordinator(pool: Host, table: SlotTable, number: int, name: str) -> None:
    """While issued is above target, what is free up to the surplus is not claimed; more than it is."""
    value = pool.values()[number]
    assert value is not None
    token = table.take(pool.groups["read"])
    owe(pool, number, 0)
    before = pool.word(token).seq
    outcome = table.claim(token, pool.groups["read"], pool.route("pg1"))
    assert outcome is (Outcome.GROUP_BUSY if number == 0 else Outcome.ENDPOINTS_BUSY)
    assert pool.values()[number] == value
    if number == 0:
        assert pool.word(token).seq == before, "an owed group is not even tried"
        owe(pool, number, value - 1)
        assert table.claim(token, pool.groups["read"], pool.route("pg1")) is Outcome.GRANTED
    assert name


def test_raised_target_owes_nothing(pool: Host, table: SlotTable) -> None:
    """While a target is above what circulates, everything that is free may be claimed."""
    owe(pool, 0, 9)
    assert pool.hold(table, "read")


def test_permits_that_are_left_to_others_are_not_claimed(pool: Host, table: SlotTable) -> None:
    """A claim that leaves two permits takes the third last and no more, and no semaphore is touched in vain."""
    read = pool.groups["read"]
    held = []
    for _ in range(2):
        held.append(table.take(read))
        assert table.claim(held[-1], read, [], leave=2) is Outcome.ENDPOINTS_BUSY
    token = table.take(read)
    before = pool.slot_words()
    assert table.claim(token, read, [], leave=2) is Outcome.GROUP_BUSY
    assert pool.slot_words() == before
    assert table.claim(token, read, []) is Outcome.ENDPOINTS_BUSY


def test_permit_that_was_left_to_others_is_given_back(pool: Host, table: SlotTable) -> None:
    """Of two that take the last two permits at once, who finds that it took one left to others gives it back."""
    read = pool.groups["read"]
    others = [pool.hold_group(table, "read")]
    overtaken = copy.copy(read)

    def acquire(timeout: float) -> None:
        others.append(pool.hold_group(table, "read"))
        read.acquire(timeout)

    overtaken.acquire = acquire
    token = table.take(read)
    assert table.claim(token, overtaken, pool.route(), leave=2) is Outcome.GROUP_BUSY
    assert fields(pool, token) == (NONE, NONE, False)
    assert (read.semaphore.value, read.bell.value) == (2, 1)


@pytest.mark.parametrize("rings", [1, 2])
def test_ring_for_others_is_passed_on(
    pool: Host, table: SlotTable, monkeypatch: pytest.MonkeyPatch, rings: int
) -> None:
    """A ring that tells of permits for others is rung again while its taker stands aside; what comes back stops."""
    read = pool.groups["read"]
    asides = []
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)

    def stand_aside(seconds: float) -> None:
        asides.append(read.bell.value)
        if rings == 1:
            read.bell.acquire(0)  # somebody else hears it

    pool.begin_anew()
    pool.ring("read")
    token = table.take(read)
    slices = iter([False] * 3 + [True])
    assert not table.wait(
        token,
        read,
        pool.route,
        monotonic() + 30,
        is_done=lambda: next(slices),
        leave=lambda: 4,
        stand_aside=stand_aside,
    )
    assert asides == [1]
    assert read.bell.value == 0
    assert fields(pool, token) == (NONE, NONE, False)


def test_wait_times_out_with_a_free_word(pool: Host, table: SlotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that ends without a permit leaves nothing held, also when it held the group's on the way."""
    monkeypatch.setattr(slots, "monotonic", CountingClock())
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    held = [pool.hold(table, "read"), pool.hold(table, "read")]
    token = table.take(pool.groups["read"])
    for slices in range(1, 9):
        deadline = now() + slices
        assert not table.wait(token, pool.groups["read"], pool.route, deadline)
        assert fields(pool, token) == (NONE, NONE, False)
        assert pool.values()[0] == 2
    assert held


def test_zero_timeout_tries_once(pool: Host, table: SlotTable) -> None:
    """A deadline that has passed still means one try."""
    token = table.take(pool.groups["read"])
    assert table.wait(token, pool.groups["read"], pool.route, deadline=0.0)
    assert fields(pool, token) == (YES, YES, False)


def test_waiter_is_woken_by_a_release(pool: Host, table: SlotTable) -> None:
    """A thread that waits for a group permit gets the one that is given back, and is shown as waiting meanwhile."""
    held = pool.hold(table, "write")
    token = table.take(pool.groups["write"])
    granted: list[bool] = []

    def wait() -> None:
        granted.append(table.wait(token, pool.groups["write"], pool.route, monotonic() + 30, queued=lambda: 3))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: use_of(pool, token) == UseWord(Use.WAITING, 1))
    assert pool.segment.words[token.detail_at + slots.QUEUED] == 3
    table.release(held)
    thread.join(30)
    assert granted == [True]
    table.release(token)


def test_who_is_told_of_a_waiter_sees_it(pool: Host, table: SlotTable) -> None:
    """Somebody waits for all to see before it is told, once: who is told looks at once, and not again for a while."""
    held = pool.hold(table, "write")
    token = table.take(pool.groups["write"])
    seen: list[Use] = []

    def tell() -> None:
        seen.append(use_of(pool, token).use)
        table.release(held)

    assert table.wait(token, pool.groups["write"], pool.route, monotonic() + 30, tell=tell)
    assert seen == [Use.WAITING]
    table.release(token)


def test_naps_grow_with_the_wait(pool: Host, table: SlotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring wakes who has slept longest, so who waits longer sleeps longer; and looks without a ring once a slice."""
    clock, naps, looks = [100.0], list[float](), list[float]()

    def sleep(bell: semaphores.Semaphore, seconds: float) -> bool:
        naps.append(seconds)
        clock[0] += min(seconds, semaphores.SLICE_S)
        return False

    def route() -> list[slots.EndpointPermits]:
        looks.append(clock[0])
        return pool.route()

    monkeypatch.setattr(slots, "monotonic", lambda: clock[0])
    other = pool.add_worker()
    held = pool.hold(other, "write")
    token = table.take(pool.groups["write"])
    assert not table.wait(token, pool.groups["write"], route, deadline=101.0, rest=sleep)
    assert naps[0] == slots.LEAST_NAP_S
    growing = naps[: naps.index(max(naps)) + 1]
    assert growing == sorted(growing)
    assert growing[-1] >= semaphores.SLICE_S
    pauses = [after - before for before, after in itertools.pairwise(looks)]
    assert semaphores.SLICE_S <= min(pauses) <= max(pauses) < 2 * semaphores.SLICE_S
    table.put_back(token)
    other.release(held)


def test_waiter_for_an_endpoint_says_so(pool: Host, table: SlotTable) -> None:
    """A thread that holds the group permit waits on the endpoint bell, and is shown so."""
    held = [pool.hold(table, "read"), pool.hold(table, "read")]
    token = table.take(pool.groups["read"])
    granted: list[bool] = []
    thread = threading.Thread(
        target=lambda: granted.append(table.wait(token, pool.groups["read"], pool.route, monotonic() + 30))
    )
    thread.start()
    wait_until(lambda: use_of(pool, token) == UseWord(Use.WAITING, 0, waits_for_endpoint=True))
    table.release(held.pop())
    thread.join(30)
    assert granted == [True]
    assert held


def test_waiter_rings_on(pool: Host, table: SlotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was granted while more is free wakes the next sleeper, on the bell it slept on."""
    monkeypatch.setattr(semaphores, "SLICE_S", 0.0)
    held = [pool.hold(table, "read"), pool.hold(table, "read")]
    token = table.take(pool.groups["read"])
    looks = iter(range(9))

    def route() -> list[slots.EndpointPermits]:
        if next(looks) == 1:
            while held:
                table.release(held.pop())
            pool.begin_anew()
        return pool.route()

    assert table.wait(token, pool.groups["read"], route, monotonic() + 30)
    assert pool.groups["read"].bell.value == 1
    assert use_of(pool, token).use is Use.OPENING


def test_wait_stops_for_something_better(pool: Host, table: SlotTable) -> None:
    """A waiter looks at is_done before each slice."""
    held = pool.hold(table, "write")
    token = table.take(pool.groups["write"])
    assert not table.wait(token, pool.groups["write"], pool.route, monotonic() + 30, is_done=lambda: True)
    assert pool.word(token).is_free
    assert held


def test_exception_in_a_wait_abandons(pool: Host, table: SlotTable) -> None:
    """What a failing route leaves is the coordinator's, and comes back."""
    held = [pool.hold(table, "read"), pool.hold(table, "read")]
    token = table.take(pool.groups["read"])
    looks = iter([pool.route()])
    with pytest.raises(StopIteration):
        table.wait(token, pool.groups["read"], lambda: next(looks), monotonic() + 30)
    assert fields(pool, token) == (YES, NONE, True)
    del held, token
    pool.settle(table)


def test_release_rings_every_bell_once(pool: Host, table: SlotTable) -> None:
    """A release rings the group's bell and the endpoint bells of all groups that may use the endpoint, once."""
    tokens = [pool.hold(table, "read"), pool.hold(table, "read")]
    pool.begin_anew()
    for token in tokens:
        table.release(token)
    assert pool.bells() == [1, 1, 0, 1]


def test_rows_that_were_taken_away_are_not_written(pool: Host, table: SlotTable) -> None:
    """After a reap every operation stops before its first store."""
    held, half, free = pool.hold(table, "read"), pool.hold_group(table, "read"), table.take(pool.groups["read"])
    pool.segment.words[held.generation_at] += 1
    before = pool.shared()
    for attempt in (
        lambda: table.release(held),
        lambda: table.give_up(half),
        lambda: table.claim_endpoint(half, pool.route()),
        lambda: table.claim(free, pool.groups["read"], pool.route()),
    ):
        with pytest.raises(DisownedError):
            attempt()
    table.abandon(held)
    dropped = pool.shared()
    assert table.tidy() == []
    assert dropped == before == pool.shared()


def test_dropped_token_of_a_lost_row_is_left_alone(pool: Host, table: SlotTable) -> None:
    """After a reap a token that is dropped changes nothing, however often the table is tidied."""
    token = pool.hold(table, "read")
    pool.segment.words[token.generation_at] += 1
    before = pool.shared()
    del token
    assert table.tidy() == table.tidy() == []
    assert pool.shared() == before


@pytest.mark.parametrize(
    ("group_field", "endpoint_field", "is_orphan"),
    [
        (NONE, NONE, False),
        (MAYBE, NONE, False),
        (YES, NONE, False),
        (YES, MAYBE, False),
        (YES, YES, False),
        (MAYBE, MAYBE, False),
        (MAYBE, NONE, True),
        (YES, YES, True),
    ],
)
def test_dropped_in_any_state(
    pool: Host, table: SlotTable, group_field: int, endpoint_field: int, is_orphan: bool
) -> None:
    """A token that is dropped in any state of its word comes back, and so do its permits."""
    token = pool.hold(table, "read")
    if group_field == MAYBE:
        pool.groups["read"].semaphore.release()
    if endpoint_field != YES:
        pool.endpoints["pg1"].semaphore.release()
    if group_field == NONE:
        pool.groups["read"].semaphore.release()
    word = with_field(pool.segment.words[token.word_at], Kind.ENDPOINT, endpoint_field)
    word = with_field(word, Kind.GROUP, group_field)
    pool.segment.words[token.word_at] = word | (ORPHAN if is_orphan else 0)
    del token
    assert not table.is_home()
    assert table.tidy() == []
    assert table.is_home()
    pool.settle(table)
    pool.claim_everything(table)


def test_dropped_with_a_connection_is_handed_out_to_be_closed(pool: Host, table: SlotTable) -> None:
    """A dropped token that holds both permits and a resource is the caller's to close; the resource is still there."""
    token = pool.hold(table, "read")
    resource = token.tether.resource = object()
    number = token.number
    del token
    (again,) = table.tidy()
    assert (again.number, again.tether.resource) == (number, resource)
    assert table.tidy() == []
    table.release(again)
    del again
    pool.settle(table)


def test_away_until_free(pool: Host, table: SlotTable) -> None:
    """An abandoned slot cannot be taken before the coordinator has freed it."""
    for token in [table.take(pool.groups["read"]) for _ in range(4)]:
        table.claim(token, pool.groups["read"], [])
        table.abandon(token)
    del token
    with pytest.raises(TableFullError):
        table.take(pool.groups["read"])
    pool.tick()
    assert table.take(pool.groups["read"])


def test_abandon_is_the_last_store(pool: Host, table: SlotTable) -> None:
    """Abandoning again changes nothing, also when the coordinator is half through."""
    token = pool.hold(table, "read")
    table.abandon(token)
    pool.permits.tick(lambda slot, word: False)
    before = pool.slot_words()
    table.abandon(token)
    assert pool.slot_words() == before
    assert SlotWord.of(before[token.number]).orphan


def test_counters_belong_to_a_group(pool: Host, table: SlotTable) -> None:
    """Counters are summed per group; a slot that another group takes begins anew."""
    tokens = [table.take(pool.groups["read"]) for _ in range(4)]
    for token in tokens:
        pool.segment.words[token.detail_at + CHECKOUTS] = 2
        table.count_wait(token, 0.5)
    assert table.counters(pool.groups["read"])["checkouts"] == 8
    assert table.counters(pool.groups["read"])["wait_total"] == 2.0
    assert table.counters(pool.groups["read"])["wait_longest"] == 0.5
    assert table.out(pool.groups["read"]) == 4
    for token in tokens:
        table.put_back(token)
    table.take(pool.groups["write"])
    assert table.counters(pool.groups["read"])["checkouts"] == 6
    assert table.counters(pool.groups["write"])["checkouts"] == 0


def test_forget_and_remember(pool: Host, table: SlotTable) -> None:
    """A table that forgot owns nothing, and owns it again when it remembers."""
    token = table.take(pool.groups["read"])
    table.forget()
    assert not table.owns(token)
    table.remember()
    assert table.owns(token)
    assert Control.of(pool.segment.words[pool.groups["read"].control_at]) == Control(4, 4, 0)
