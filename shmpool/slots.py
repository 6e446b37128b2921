"""The slot table of one process: tokens, and the brackets that claim, give up, release and abandon permits.

This is the worker's half of the permit protocol; tools/model/permit.c explores it.  Its one rule (words.py): a
field of a slot word is MAYBE before, and until after, its semaphore is touched.

Guarantees: no lock, and nobody waits for another process's bracket; whatever interrupts a bracket leaves a word
that tells which permits are certain and which are in doubt; a slot number is never lost (tokens are objects).
Assumptions: one aligned 8-byte store or load per word access; a token is used by one thread at a time.

Writers.  A slot word is written by the thread that holds its token, until ORPHAN is set; then by the coordinator,
    until it is FREE again.  Setting ORPHAN is this side's last store.
Stale reads.  `owed` may see a control word one resize behind: a claim then takes a permit of a surplus, which
    the coordinator absorbs later instead.
If a process dies.  The words stay; the coordinator reaps the row, gives back what is certain and audits the rest.
If a signal handler raises, or a thread ends, inside a bracket.  The word becomes an orphan at once, or when the
    token's finalizer was looked at (`tidy`).
Fork.  In a child the private page reads zero: every operation raises DisownedError before its first store, and
    finalizers do nothing.  `attachment` also releases the view and closes the semaphores in a child, so that a copied
    frame in the middle of a bracket fails instead of doing harm.
Keeps INV-1, INV-3, INV-4, INV-5.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from shmpool.clock import monotonic
from shmpool.errors import DisownedError, TableFullError
from shmpool.layout import PERMITS, RECALL_WORDS, SLOT_WORDS, SLOTS, USE_WORDS, WORKERS, Layout
from shmpool.rows import Row
from shmpool.segment import Segment
from shmpool.semaphores import SLICE_S, BusyError, Semaphore, ring, sleep_on
from shmpool.states import Use
from shmpool.words import (
    BOTH_YES,
    FIELDS_MASK,
    MAYBE,
    ORPHAN,
    SEQ_MASK,
    SEQ_ONE,
    YES,
    UseWord,
    endpoint_part,
    group_part,
)

ENDPOINT_PATIENCE_S: Final = 0.2  # how long a waiter keeps its group permit while every endpoint is busy
ASIDE_S: Final = 0.002  # off the bell after a ring was passed on: time for others to hear it
# A ring wakes who has slept on the bell longest.  As naps grow with the wait, that is mostly who has waited longest.
LEAST_NAP_S: Final = 0.005
NAP_OF_WAIT: Final = 0.1
_FRESH: Final = -1  # tokens whose slot counts for no group yet

SINCE: Final = SLOTS.column("since")
BACKEND_PID: Final = SLOTS.column("backend_pid")
OPENED_AT: Final = SLOTS.column("opened_at")
ENDPOINT_EPOCH: Final = SLOTS.column("endpoint_epoch")
CHECKOUTS: Final = SLOTS.column("checkouts")
WAITS: Final = SLOTS.column("waits")
WAIT_TOTAL: Final = SLOTS.column("wait_total")
WAIT_LONGEST: Final = SLOTS.column("wait_longest")
TIMEOUTS: Final = SLOTS.column("timeouts")
OPENS: Final = SLOTS.column("opens")
OPEN_TOTAL: Final = SLOTS.column("open_total")
ERRORS: Final = SLOTS.column("errors")
REFUSED: Final = SLOTS.column("refused")
COUNTED_GROUP: Final = SLOTS.column("counted_group")
QUEUED: Final = SLOTS.column("queued")
_COUNTERS: Final = range(CHECKOUTS, COUNTED_GROUP)


class Outcome(Enum):
    """How one attempt to claim ended, and what the slot word says then."""

    GRANTED = auto()  # (g,e): both permits are held
    GROUP_BUSY = auto()  # FREE: the group has no permit to give
    ENDPOINTS_BUSY = auto()  # (g,-): the group permit is held, no endpoint has one


class EndpointPermits:
    """An endpoint's permit semaphore, as brackets use it."""

    __slots__ = ("acquire", "bells", "control_at", "index", "maybe", "release", "semaphore", "yes")

    def __init__(self, segment: Segment, index: int, semaphore: Semaphore, bells: Sequence[Semaphore]) -> None:
        self.index = index
        self.semaphore = semaphore
        self.acquire = semaphore.acquire
        self.release = semaphore.release
        self.control_at = segment.layout.at(PERMITS, segment.layout.groups + index, "control")
        self.maybe = endpoint_part(index, MAYBE)
        self.yes = endpoint_part(index, YES)
        self.bells = tuple(bells)  # the endpoint bells of every group that can use this endpoint


class GroupPermits:
    """A group's permit semaphore and its two bells, as brackets use them."""

    __slots__ = (
        "acquire",
        "bell",
        "control_at",
        "endpoint_bell",
        "index",
        "maybe",
        "release",
        "semaphore",
        "yes",
    )

    def __init__(
        self,
        segment: Segment,
        index: int,
        semaphore: Semaphore,
        bell: Semaphore,
        endpoint_bell: Semaphore,
    ) -> None:
        self.index = index
        self.semaphore = semaphore
        self.acquire = semaphore.acquire
        self.release = semaphore.release
        self.control_at = segment.layout.at(PERMITS, index, "control")
        self.maybe = group_part(index, MAYBE)
        self.yes = group_part(index, YES)
        self.bell = bell
        self.endpoint_bell = endpoint_bell


class Tether(weakref.ref["Token"]):
    """What a slot's table remembers of the slot's token, and outlives it.

    When the last reference to the token goes, the interpreter calls `deque.append` with this object: no bytecode
    runs, so no signal handler can raise in between, and nothing waits or is released inside a finalizer.
    """

    __slots__ = ("endpoint", "group", "page_at", "resource")

    page_at: int
    group: GroupPermits | None
    endpoint: EndpointPermits | None
    resource: object  # what the permits are held for; the mechanism only keeps it alive


class Token:
    """The right of one thread to use one slot.

    Dropping the last reference gives the slot back, by what its word says, when the table is next tidied.
    """

    __slots__ = (
        "__weakref__",
        "detail_at",
        "generation_at",
        "number",
        "page_at",
        "recall_at",
        "tether",
        "use_at",
        "word_at",
    )

    tether: Tether

    def __init__(self, shape: Layout, number: int, page_at: int) -> None:
        self.number = number
        self.page_at = page_at
        self.word_at = shape.at(SLOT_WORDS, number)
        self.use_at = shape.at(USE_WORDS, number)
        self.recall_at = shape.at(RECALL_WORDS, number)
        self.detail_at = shape.at(SLOTS, number)
        self.generation_at = shape.at(WORKERS, number // shape.slots_per_worker, "generation")


class SlotTable:
    """The slots of the rows that this process owns.

    Threads share it without a lock on any path that claims or releases: tokens lie in deques, whose append and
    pop are atomic.  The lock of `tidy` serves the cold path only, and is re-entrant for signal handlers.
    """

    def __init__(self, segment: Segment, page: memoryview, token_type: type[Token] = Token) -> None:
        self.segment = segment
        self.words = segment.words
        self.times = segment.times
        self.page = page
        self.rows: list[Row] = []
        self.generation_at = 0  # of the first row
        self.away: deque[Token] = deque()
        self.dropped: deque[weakref.ref[Token]] = deque()
        self._tethers: dict[int, Tether] = {}
        self._free: dict[int, deque[Token]] = {_FRESH: deque()}
        self._token_type = token_type
        self._tidying = threading.RLock()

    def _new_token(self, number: int, page_at: int, like: Tether | None = None) -> Token:
        token = self._token_type(self.segment.layout, number, page_at)
        tether = Tether(token, self.dropped.append)
        tether.page_at = page_at
        tether.group = like.group if like else None
        tether.endpoint = like.endpoint if like else None
        tether.resource = like.resource if like else None
        token.tether = tether
        return token

    def add_row(self, row: Row) -> None:
        """Take a row's slots in: FREE ones become tokens, orphans are away until the coordinator freed them."""
        page_at = len(self.rows)
        free = [self._new_token(number, page_at) for number in reversed(row.free)]
        away = [self._new_token(number, page_at) for number in row.away]
        tethers = {token.number: token.tether for token in (*free, *away)}
        self.rows.append(row)
        if not page_at:
            self.generation_at = self.segment.layout.at(WORKERS, row.number, "generation")
        self.page[page_at] = row.generation
        self._tethers.update(tethers)  # at once: from here on no slot is lost
        for token in free:
            self.put_back(token)
        self.away.extend(away)

    def forget(self) -> None:
        """Turn every token into a mere object: nothing is stored or given back through this table any more."""
        for page_at in range(len(self.rows)):
            self.page[page_at] = 0

    def remember(self) -> None:
        """Undo `forget`."""
        for page_at, row in enumerate(self.rows):
            self.page[page_at] = row.generation

    def is_home(self) -> bool:
        """Whether every token rests here: none is with a thread, a connection or a finalizer."""
        return sum(map(len, tuple(self._free.values()))) + len(self.away) == len(self._tethers)

    def out(self, group: GroupPermits) -> int:
        """Return how many slots of this process a group uses now."""
        index = group.index
        return sum(1 for t in tuple(self._tethers.values()) if t.group is not None and t.group.index == index)

    def resources(self) -> list[tuple[int, object]]:
        """Return what permits are held for now, each with the index of its endpoint."""
        tethers = tuple(self._tethers.values())
        held = [(tether.endpoint, tether.resource) for tether in tethers]
        return [(endpoint.index, resource) for endpoint, resource in held if endpoint and resource is not None]

    def counters(self, group: GroupPermits) -> dict[str, float]:
        """Return the sums of the counters of the slots that count for a group."""
        sums: dict[str, float] = {SLOTS.columns[column].name: 0 for column in _COUNTERS}
        for number in tuple(self._tethers):
            at = self.segment.layout.at(SLOTS, number)
            if self.words[at + COUNTED_GROUP] != group.index + 1:
                continue
            for column in _COUNTERS:
                name, kind = SLOTS.columns[column].name, SLOTS.columns[column].kind
                more = (self.times if kind == "time" else self.words)[at + column]
                sums[name] = max(sums[name], more) if column == WAIT_LONGEST else sums[name] + more
        return sums

    def owns(self, token: Token) -> bool:
        """Whether the token's row is still this process's (False in a child, after `forget`, after a reap)."""
        generation: int = self.page[token.page_at]
        return generation != 0 and self.words[token.generation_at] == generation

    def take(self, group: GroupPermits) -> Token:
        """Take a token out, if possible one whose counters belong to the group already.

        Raises:
            TableFullError: none is free; the caller may add a row.
        """
        if self.away:
            self.tidy_away()
        try:
            token = self._free[group.index].pop()
        except (KeyError, IndexError):
            return self._take_uncounted(group)
        token.tether.group = group
        return token

    def _take_uncounted(self, group: GroupPermits) -> Token:
        """Take a token that counts for no group yet, or else for another one."""
        for free in (self._free[_FRESH], *tuple(self._free.values())):
            try:
                token = free.pop()
            except IndexError:
                continue
            token.tether.group = group
            self._count_for(token, group.index)
            return token
        raise TableFullError("no slot of this process is free")

    def put_back(self, token: Token) -> None:
        """Give a token back whose word is FREE."""
        words = self.words
        words[token.use_at] = 0
        tether = token.tether
        tether.group = tether.endpoint = tether.resource = None
        key = words[token.detail_at + COUNTED_GROUP] - 1
        try:
            self._free[key].append(token)
        except KeyError:
            self._free.setdefault(key, deque()).append(token)

    def _count_for(self, token: Token, group: int) -> None:
        """Begin the slot's counters anew for another group."""
        at = token.detail_at
        if self.words[at + COUNTED_GROUP] != group + 1:
            self.words[at + COUNTED_GROUP] = 0
            for column in _COUNTERS:
                self.words[at + column] = 0
            self.words[at + COUNTED_GROUP] = group + 1

    def claim(self, token: Token, group: GroupPermits, endpoints: Sequence[EndpointPermits], leave: int = 0) -> Outcome:
        """Try once to get a permit pair, the endpoints in the given order.  The token's word is FREE.

        An exception (a raising signal handler) abandons the slot and passes on; the caller drops the token.

        Args:
            leave: how many free permits of the group are for others.  At the moment that settles it so many are free:
                a permit is given back at once, within the bracket, if others took theirs meanwhile.

        Raises:
            DisownedError: the row is not this process's any more; nothing was stored.
        """
        words = self.words
        at = token.word_at
        if not self.owns(token):
            raise DisownedError(f"slot {token.number} is not this process's any more")
        control = words[group.control_at]
        if (leave or (control ^ control >> 16) & 0xFFFF) and self._is_owed(group, leave):
            return Outcome.GROUP_BUSY
        seq = (words[at] + SEQ_ONE) & SEQ_MASK
        maybe = seq | group.maybe
        free = (seq + SEQ_ONE) & SEQ_MASK
        token.tether.group = group
        try:
            words[at] = maybe
            try:
                group.acquire(0)
            except BusyError:
                words[at] = free
                return Outcome.GROUP_BUSY
            if leave and group.semaphore.value < leave:  # as `give_up`: the field has been MAYBE all the time
                group.release()
                words[at] = free
                ring(group.bell)
                return Outcome.GROUP_BUSY
            return self._claim_endpoint(token, group, endpoints, free)
        except BaseException:
            word = words[at]
            if word & FIELDS_MASK and not word & ORPHAN:
                words[at] = word | ORPHAN
            raise

    def claim_once(
        self, token: Token, group: GroupPermits, endpoints: Sequence[EndpointPermits], leave: int = 0
    ) -> bool:
        """Try once, without waiting; the token's word is (g,e) or FREE afterwards.  Raises as `claim`."""
        outcome = self.claim(token, group, endpoints, leave)
        if outcome is Outcome.ENDPOINTS_BUSY:
            self.give_up(token)
        return outcome is Outcome.GRANTED

    def claim_endpoint(self, token: Token, endpoints: Sequence[EndpointPermits]) -> Outcome:
        """Try once more for an endpoint permit.  The token's word is (g,-).  Raises as `claim`."""
        words = self.words
        at = token.word_at
        if not self.owns(token):
            raise DisownedError(f"slot {token.number} is not this process's any more")
        group = token.tether.group
        assert group is not None
        seq = (words[at] + SEQ_ONE) & SEQ_MASK
        try:
            return self._claim_endpoint(token, group, endpoints, seq)
        except BaseException:
            word = words[at]
            if word & FIELDS_MASK and not word & ORPHAN:
                words[at] = word | ORPHAN
            raise

    def _claim_endpoint(
        self, token: Token, group: GroupPermits, endpoints: Sequence[EndpointPermits], seq: int
    ) -> Outcome:
        """The inner bracket; `seq` is that of the next store.  The group permit is held."""
        words = self.words
        at = token.word_at
        detail = token.detail_at
        for endpoint in endpoints:
            control = words[endpoint.control_at]
            if (control ^ control >> 16) & 0xFFFF and self._is_owed(endpoint):  # target and issued differ
                continue
            maybe = seq | group.yes | endpoint.maybe
            seq = (seq + SEQ_ONE) & SEQ_MASK
            granted = seq | group.yes | endpoint.yes
            words[at] = maybe
            try:
                endpoint.acquire(0)
            except BusyError:
                continue
            token.tether.endpoint = endpoint
            words[detail + BACKEND_PID] = 0  # before (g,e): a stranger's pid must never stand beside it
            self.times[detail + OPENED_AT] = self.times[detail + SINCE] = monotonic()
            words[token.use_at] = Use.OPENING | group.index << 8
            words[at] = granted
            return Outcome.GRANTED
        words[at] = seq | group.yes
        return Outcome.ENDPOINTS_BUSY

    def _is_owed(self, permits: GroupPermits | EndpointPermits, leave: int = 0) -> bool:
        """Whether what is free is left to others, or to the coordinator, which is shrinking this semaphore."""
        control: int = self.words[permits.control_at]
        kept = leave + max(0, (control >> 16 & 0xFFFF) - (control & 0xFFFF))
        return kept > 0 and permits.semaphore.value <= kept

    def give_up(self, token: Token) -> None:
        """Give the group permit back.  The token's word is (g,-), afterwards FREE; the token stays out.

        Raises as `claim`.
        """
        words = self.words
        at = token.word_at
        if not self.owns(token):
            raise DisownedError(f"slot {token.number} is not this process's any more")
        group = token.tether.group
        assert group is not None
        seq = (words[at] + SEQ_ONE) & SEQ_MASK
        maybe = seq | group.maybe
        free = (seq + SEQ_ONE) & SEQ_MASK
        try:
            words[at] = maybe
            group.release()
            words[at] = free
        except BaseException:
            word = words[at]
            if word & FIELDS_MASK and not word & ORPHAN:
                words[at] = word | ORPHAN
            raise
        ring(group.bell)

    def release(self, token: Token) -> None:
        """Give both permits back, and the token.  Its word is (g,e) and its connection's server end is gone.

        Raises as `claim`.
        """
        words = self.words
        at = token.word_at
        if not self.owns(token):
            raise DisownedError(f"slot {token.number} is not this process's any more")
        group, endpoint = token.tether.group, token.tether.endpoint
        assert group is not None
        assert endpoint is not None
        seq = (words[at] + SEQ_ONE) & SEQ_MASK
        maybe = seq | group.maybe | endpoint.maybe
        free = (seq + SEQ_ONE) & SEQ_MASK
        try:
            words[at] = maybe
            endpoint.release()
            group.release()
            words[at] = free
        except BaseException:
            word = words[at]
            if word & FIELDS_MASK and not word & ORPHAN:
                words[at] = word | ORPHAN
            raise
        for bell in endpoint.bells:
            ring(bell)
        ring(group.bell)
        self.put_back(token)  # last: a process whose tokens are all at home may leave the pool and close the bells

    def abandon(self, token: Token) -> None:
        """Leave what the slot holds to the coordinator.  In a child, or on a lost row: nothing.

        The token is away until its word is FREE again.
        """
        if not self.owns(token):
            return
        word = self.words[token.word_at]
        if word & FIELDS_MASK and not word & ORPHAN:
            self.words[token.word_at] = word | ORPHAN
        self.words[token.use_at] = 0
        tether = token.tether
        tether.group = tether.endpoint = tether.resource = None
        self.away.append(token)

    def tidy_away(self) -> None:
        """Bring back the tokens whose orphaned slots the coordinator has freed."""
        for _ in range(len(self.away)):
            try:
                token = self.away.popleft()
            except IndexError:
                return
            if not self.owns(token):
                continue
            if self.words[token.word_at] & FIELDS_MASK:
                self.away.append(token)
            else:
                self.put_back(token)

    def tidy(self) -> list[Token]:
        """Revive the tokens that were dropped: FREE slots are free again, broken brackets are abandoned.

        The table of tethers is the truth and `dropped` only the hint to look at it, so an exception in here loses
        nothing.

        Returns:
            Tokens that hold both permits and a resource: the caller closes it and releases them.
        """
        to_close: list[Token] = []
        if not self.page[0]:
            return to_close
        if self.dropped:
            with self._tidying:
                hints = self.dropped.copy()
                for number, tether in list(self._tethers.items()):
                    if tether() is None:
                        self._revive(number, tether, to_close)
                for hint in hints:  # only now: an exception in here must leave a reason to look again
                    with contextlib.suppress(ValueError):
                        self.dropped.remove(hint)
        self.tidy_away()
        return to_close

    def _revive(self, number: int, tether: Tether, to_close: list[Token]) -> None:
        token = self._new_token(number, tether.page_at, like=tether)
        if self._tethers[number] is not tether:
            return  # a signal handler that ran in between revived it
        self._tethers[number] = token.tether
        word = self.words[token.word_at]
        if not self.owns(token):
            return
        if word & ORPHAN:
            self.away.append(token)
        elif not word & FIELDS_MASK:
            self.put_back(token)
        elif word & FIELDS_MASK == BOTH_YES and tether.resource is not None:
            to_close.append(token)
        else:
            self.abandon(token)

    def wait(
        self,
        token: Token,
        group: GroupPermits,
        route: Callable[[], Sequence[EndpointPermits]],
        deadline: float,
        is_done: Callable[[], bool] = lambda: False,
        queued: Callable[[], int] = lambda: 0,
        leave: Callable[[], int] = lambda: 0,
        stand_aside: Callable[[float], object] = time.sleep,
        rest: Callable[[Semaphore, float], bool] = sleep_on,
        tell: Callable[[], None] = lambda: None,
        is_choosy: bool = False,
    ) -> bool:
        """Claim, sleeping on the group's bells in slices, until granted, `deadline` or `is_done()`.

        The token's word is FREE, and FREE again if this returns False.  On an exception the slot is abandoned.

        Args:
            route: the endpoints to try now, best first; asked again after each slice.
            deadline: on the monotonic clock.
            is_done: asked before each slice: something better than a permit turned up.
            queued: how many threads wait behind this one, for status.
            leave: as of `claim`, asked before each.  A ring that tells of permits for others is passed on, once.
            stand_aside: sleeps for so many seconds, but not on the bell: others are to hear it.
            rest: sleeps until a bell rings, for so many seconds at most; True: there is reason to claim.
            tell: called once this thread is seen to wait.
            is_choosy: the process's own connections do not serve this thread.
        """
        detail = token.detail_at
        kept = leave()
        outcome = self.claim(token, group, route(), kept)
        if outcome is Outcome.GRANTED:
            return True
        self.times[detail + SINCE] = began = tried_at = monotonic()
        has_group_since = began
        waits_for_endpoint = has_passed_on = is_told = False
        try:
            while outcome is not Outcome.GRANTED:
                remaining = deadline - monotonic()
                if remaining <= 0 or is_done():
                    break
                waits_for_endpoint = outcome is Outcome.ENDPOINTS_BUSY
                self.words[detail + QUEUED] = queued()
                self.words[token.use_at] = UseWord(Use.WAITING, group.index, waits_for_endpoint, is_choosy).word()
                if not is_told:  # after the word: who is told looks for it at once
                    is_told = True
                    tell()
                nap = min(remaining, max(LEAST_NAP_S, (monotonic() - began) * NAP_OF_WAIT))
                has_rung = rest(group.endpoint_bell if waits_for_endpoint else group.bell, nap)
                if not waits_for_endpoint:
                    if not has_rung and monotonic() - tried_at < SLICE_S:
                        continue  # a free permit is for whom its ring wakes
                    tried_at = monotonic()
                    kept = leave()
                    outcome = self.claim(token, group, route(), kept)
                    has_group_since = tried_at
                    is_for_others = has_rung and outcome is Outcome.GROUP_BUSY and 0 < group.semaphore.value <= kept
                    has_passed_on = is_for_others and not has_passed_on  # what comes back nobody wanted
                    if has_passed_on:
                        ring(group.bell)
                        stand_aside(ASIDE_S)
                    continue
                outcome = self.claim_endpoint(token, route())  # also before giving up: a ring may have been taken
                if outcome is Outcome.ENDPOINTS_BUSY and monotonic() - has_group_since > ENDPOINT_PATIENCE_S:
                    self.give_up(token)
                    outcome = Outcome.GROUP_BUSY
            if outcome is Outcome.ENDPOINTS_BUSY:
                self.give_up(token)
        except BaseException:
            self.abandon(token)
            raise
        if group.semaphore.value > kept:
            ring(group.bell)
        endpoint = token.tether.endpoint
        if waits_for_endpoint and endpoint is not None and endpoint.semaphore.value > 0:
            ring(group.endpoint_bell)
        return outcome is Outcome.GRANTED

    def count_wait(self, token: Token, waited: float) -> None:
        """Add a wait, in seconds, to the slot's counters."""
        at = token.detail_at
        self.words[at + WAITS] += 1
        self.times[at + WAIT_TOTAL] += waited
        self.times[at + WAIT_LONGEST] = max(self.times[at + WAIT_LONGEST], waited)
