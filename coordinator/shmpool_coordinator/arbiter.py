"""Sharing under pressure: whose connection is wanted back, because somebody waits for its permit.

`choose` decides, pure; `Arbiter` reads the tables, remembers what it asked for and writes the recall words.

Writers.  Recall words and the groups' recall counter: this module, and balance.py where nobody waits.
Stale reads.  A recall counts only while it equals its slot's word, so one that comes late asks for nothing.
If a process dies.  Its recalls become outdated with its slot words; a new coordinator withdraws all recalls first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from shmpool.layout import GROUPS, RECALL_WORDS, SLOT_WORDS, SLOTS, USE_WORDS, WORKERS
from shmpool.rows import Server, parent_of
from shmpool.segment import Segment
from shmpool.settings import PoolSettings
from shmpool.states import ServerKind, Use
from shmpool.words import (
    BOTH_YES,
    E_INDEX_SHIFT,
    FIELDS_MASK,
    G_INDEX_SHIFT,
    ORPHAN,
    UseWord,
)
from shmpool_coordinator.costs import Costs
from shmpool_coordinator.tenure import pause, tenure

PATIENCE_S: Final = 1.0  # a worker that did not react for so long is passed over

LONG_USE_S: Final = 0.1  # who has checked out for so long may go on for much longer, or is about to be killed

_HOLDING: Final = (Use.IDLE, Use.ACTIVE, Use.OPENING, Use.CLOSING)

_SINCE: Final = SLOTS.column("since")
_OPENED_AT: Final = SLOTS.column("opened_at")
_SERVER: Final = WORKERS.column("server")
_SERVER_PID: Final = WORKERS.column("server_pid")
_SERVER_GENERATION: Final = WORKERS.column("server_generation")


@dataclass(frozen=True, slots=True)
class Waiter:
    """A thread that waits for a permit."""

    slot: int
    row: int
    group: int
    for_endpoint: bool  # it has the group's permit; every endpoint was busy
    is_choosy: bool = False  # what its own worker has does not serve it
    server_generation: int = 0


Unit = tuple[int, int]  # worker row and group: whose connections serve the same threads


class Need(NamedTuple):
    """What it depends on which connections are worth a move for a waiter."""

    group: int
    for_endpoint: bool
    has: int  # connections that serve it, or will
    expects: bool  # one of them is not in long use
    generation: int  # what is older is about to end; 0: nothing is


@dataclass(frozen=True, slots=True)
class Held:
    """A connection that a live worker holds."""

    slot: int
    word: int
    row: int
    group: int
    endpoint: int
    is_idle: bool
    idle_since: float  # the last checkout
    opened_at: float
    server_generation: int

    @property
    def unit(self) -> Unit:
        """Whose it is."""
        return self.row, self.group

    def is_in_long_use(self, now: float) -> bool:
        """Whether it is not expected back soon."""
        return not self.is_idle and now - self.idle_since >= LONG_USE_S


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a group's connections may move; seconds (tenure.py).

    Args:
        tenure: how long a busy one stays with its worker.
        pause: how long one has to be unused to count as idle.
    """

    tenure: float
    pause: float

    def is_idle(self, held: Held, now: float) -> bool:
        """Whether a connection is unused, and not only between two requests."""
        return held.is_idle and now - held.idle_since >= self.pause

    def free_at(self, held: Held) -> float:
        """Return when a connection may be recalled, as it is used now."""
        past_tenure = held.opened_at + self.tenure
        return min(past_tenure, held.idle_since + self.pause) if held.is_idle else past_tenure


@dataclass(frozen=True, slots=True)
class Recall:
    """A connection that was asked for."""

    word: int
    group: int
    endpoint: int
    asked_at: float


def choose(
    waiters: Sequence[Waiter],
    held: Sequence[Held],
    outstanding: Mapping[int, Recall],
    *,
    group_values: Mapping[int, int],
    endpoint_values: Mapping[int, int],
    usable: Mapping[int, frozenset[int]],
    least: Mapping[int, int],
    paces: Mapping[int, Pace],
    opening: Mapping[Unit, int] = MappingProxyType({}),
    overlapping: Collection[int] = (),
    now: float,
) -> list[Held]:
    """Return the connections to recall: at most one for each waiter that no free permit or recall serves yet.

    *In which order.*  Idle ones first, longest idle first; then busy ones past their tenure, longest with their worker
    first, and before them those of workers that have others; those in long use last; old server generations before
    new ones in all three.  One that was used a moment ago counts as busy.  A recall of one in long use keeps no waiter
    from another that is expected sooner.

    *What may go.*  A move costs a connect and gains nothing where it only swaps who has to wait.  A waiter's worker
    that has none for its group gets whatever there is.  One that has some gets its next turn from its own threads'
    checkins; for it only such connections move as

    - belong to a worker that has at least two more: afterwards it still has no fewer.  So workers that wait come within
      one connection of each other and then stay, and with as many threads each no thread gets less than half the mean;
    - have rested for a tenure: nobody there misses them.  Hence a worker that needs little cannot starve one with many
      threads: of two connections it keeps the second only while it uses that once a tenure.  (The time of a rest
      counts from the last checkout: a checkin writes none.  After a use longer than a tenure, a move costs little.)
    - belong to workers that are about to end: of a generation older than the waiter's or, if it is of another service,
      than the newest beside theirs;
    - are in short use, while all that the waiter's worker has are in long use, and may not be back in time.

    What one has counts by worker and group, those included that are being opened, not those that were recalled: what a
    worker has in another group is nothing to the waiter, also if it waits for an endpoint's permit, and may be what is
    recalled.  High priority changes nothing here: its worker serves it first, and the reserve comes before any recall.
    No worker is brought below its group's minimum, but in a reload.

    Args:
        outstanding: what was asked for, by slot.
        group_values, endpoint_values: permits that a worker may take.
        usable: by group, the endpoints that it can use.
        least: by group, how many connections each worker keeps.
        paces: by group.
        opening: how many connections are just being opened.
        overlapping: rows of workers that keep none, as there are older or newer ones beside them for a while.
        now: of the monotonic clock.
    """
    kept = Counter(h.unit for h in held if h.slot not in outstanding)
    kept.update(opening)
    in_long_use = {h.slot for h in held if h.is_in_long_use(now)}
    expected = kept - Counter(h.unit for h in held if h.slot in in_long_use and h.slot not in outstanding)
    idle = {h.slot for h in held if paces[h.group].is_idle(h, now)}
    ranked = sorted(
        (h for h in held if h.slot not in outstanding and paces[h.group].free_at(h) <= now),
        key=lambda h: (
            h.slot not in idle,
            h.slot in in_long_use,
            h.server_generation,
            h.slot not in idle and kept[h.unit] < 2,
            h.idle_since if h.slot in idle else h.opened_at,
        ),
    )
    coming: list[Recall] = []
    late: list[Recall] = []
    for slot, recall in outstanding.items():
        if now - recall.asked_at < PATIENCE_S:
            (late if slot in in_long_use else coming).append(recall)
    free_groups, free_endpoints = Counter(group_values), Counter(endpoint_values)
    chosen: list[Held] = []
    in_vain: set[Need] = set()
    newest = max((h.server_generation for h in held if h.row in overlapping), default=0)

    def fits(waiter: Waiter, found: Held | Recall) -> bool:
        if waiter.for_endpoint:
            return found.endpoint in usable.get(waiter.group, frozenset())
        return found.group == waiter.group

    def may_give(h: Held) -> bool:
        return kept[h.unit] > (0 if h.row in overlapping else least.get(h.group, 0))

    def need_of(waiter: Waiter) -> Need:
        unit = waiter.row, waiter.group
        return Need(
            waiter.group,
            waiter.for_endpoint,
            has=0 if waiter.is_choosy else kept[unit],
            expects=expected[unit] > 0,
            generation=waiter.server_generation if waiter.row in overlapping else newest,
        )

    def is_worth_a_move(h: Held, need: Need) -> bool:
        if not need.has or kept[h.unit] >= need.has + 2:
            return True
        if h.is_idle and now - h.idle_since >= paces[h.group].tenure:
            return True
        if h.row in overlapping and h.server_generation < need.generation:
            return True
        return not need.expects and h.slot not in in_long_use

    def has_free(waiter: Waiter) -> bool:
        """Use up a free permit."""
        if not waiter.for_endpoint and free_groups[waiter.group] > 0:
            free_groups[waiter.group] -= 1
            return True
        for endpoint in sorted(usable.get(waiter.group, frozenset())) if waiter.for_endpoint else ():
            if free_endpoints[endpoint] > 0:
                free_endpoints[endpoint] -= 1
                return True
        return False

    def is_served(waiter: Waiter, recalls: list[Recall]) -> bool:
        """Use up a recall that is under way."""
        recall = next((r for r in recalls if fits(waiter, r)), None)
        if recall is not None:
            recalls.remove(recall)
        return recall is not None

    for waiter in waiters:
        if has_free(waiter) or is_served(waiter, coming):
            continue
        best, need = None, need_of(waiter)
        if need not in in_vain:  # what others did not find this one does not either
            best = next((h for h in ranked if fits(waiter, h) and may_give(h) and is_worth_a_move(h, need)), None)
        if best is None:
            in_vain.add(need)
        if (best is None or best.slot in in_long_use) and is_served(waiter, late):
            continue
        if best is not None:
            kept[best.unit] -= 1
            if best.slot not in in_long_use:
                expected[best.unit] -= 1
            ranked.remove(best)
            chosen.append(best)
    return chosen


def queue_lengths(waiters: Iterable[Waiter], counts: Mapping[Unit, int]) -> dict[int, float]:
    """Return, by group, the waiting workers that have none of its connections, for each of these.

    Whoever waits for an endpoint's permit counts in every group: any group's connection may serve it.

    Args:
        counts: how many connections each unit has, those included that are being opened.
    """
    connections: Counter[int] = Counter()
    for (_, group), count in counts.items():
        connections[group] += count
    waiting: Counter[int] = Counter()
    for waiter in waiters:
        if not counts.get((waiter.row, waiter.group)):
            waiting.update(connections.keys() if waiter.for_endpoint else (waiter.group,))
    return {group: waiting[group] / count for group, count in connections.items() if count}


def find_overlapping(servers: Mapping[int, Server], parent: Callable[[int], int | None]) -> set[int]:
    """Return the worker rows of each Gunicorn with workers from before and after a HUP, or of both masters of a USR2.

    Args:
        servers: by row, the Gunicorn that its owner works for.
        parent: tells a process's parent: after USR2 the new master's is the old one.
    """
    parents = {pid: parent(pid) for pid in {server.pid for server in servers.values()}}
    elders = {pid: above if above in parents else pid for pid, above in parents.items()}
    generations = {(elders[server.pid], server.generation) for server in servers.values()}
    counts = Counter(elder for elder, _ in generations)
    return {row for row, server in servers.items() if counts[elders[server.pid]] > 1}


class Available(Protocol):
    """How many permits workers may take (permits.Permits)."""

    def group_available(self, group: int) -> int: ...
    def endpoint_available(self, endpoint: int) -> int: ...


class Arbiter:
    """Sees who waits and asks for connections."""

    def __init__(self, segment: Segment, is_held: Callable[[int], bool]) -> None:
        """Withdraw every recall of an earlier coordinator.

        Args:
            is_held: whether a live process holds a worker row; a dead waiter's use word stays.
        """
        self.segment = segment
        self._is_held = is_held
        self._uses_at, uses_end = segment.layout.span(USE_WORDS)
        self._uses = segment.words[self._uses_at : uses_end]
        self._recalls_at, _ = segment.layout.span(RECALL_WORDS)
        self._slots_at, _ = segment.layout.span(SLOT_WORDS)
        self.recalls: dict[int, Recall] = {}
        self._costs = Costs(segment)
        self.due = math.inf  # when a connection may be recalled that may not be yet; while somebody waits
        for slot in range(segment.layout.slots):
            if segment.words[self._recalls_at + slot]:
                segment.words[self._recalls_at + slot] = 0

    def close(self) -> None:
        """Let go of the words."""
        self._uses.release()

    def slots_in(self, *uses: Use) -> list[int]:
        """Return the slots whose use word says one of some uses, those of dead workers included."""
        codes = self._uses.tobytes()[::8]  # the low byte of each use word
        return [match.start() for match in re.finditer(b"[%s]" % re.escape(bytes(uses)), codes)]

    def idle_at(self, endpoints: Collection[int]) -> dict[int, int]:
        """Return, by slot, the slot words of connections that rest at one of these endpoints."""
        found = {}
        for slot in self.slots_in(Use.IDLE):
            word = self.segment.words[self._slots_at + slot]
            if word & FIELDS_MASK == BOTH_YES and word >> E_INDEX_SHIFT & 0xFF in endpoints:
                found[slot] = word
        return found

    def waiters(self) -> list[Waiter]:
        """Return who waits now, longest first."""
        words, shape = self.segment.words, self.segment.layout
        per_row = shape.slots_per_worker
        found = []
        held: dict[int, bool] = {}
        for slot in self.slots_in(Use.WAITING):
            row = slot // per_row
            if row not in held:
                held[row] = self._is_held(row)
            use = UseWord.of(self._uses[slot])
            if held[row] and use.use is Use.WAITING:
                generation = words[shape.at(WORKERS, row, _SERVER_GENERATION)]
                found.append(Waiter(slot, row, use.group, use.waits_for_endpoint, use.is_choosy, generation))
        times = self.segment.times
        return sorted(found, key=lambda waiter: times[shape.at(SLOTS, waiter.slot) + _SINCE])

    def tick(
        self,
        waiters: Sequence[Waiter],
        settings: PoolSettings,
        usable: Mapping[int, frozenset[int]],
        permits: Available,
        now: float,
    ) -> set[int]:
        """Recall what the waiters need; return the worker rows that have something new to give back.

        Args:
            usable: by group, the endpoints that are eligible for it now.
        """
        self._clear_outdated(keep=bool(waiters))
        self.due = math.inf
        if not waiters:
            return set()
        connections, opening = self.connections(), self._opening()
        self._costs.look(now)
        paces = self._paces(waiters, connections, opening)
        chosen = choose(
            waiters,
            connections,
            self.recalls,
            # Who waits in a group with a reserve may take none of it, or finds none: a recall is needed.
            group_values={g.index: permits.group_available(g.index) - g.reserve for g in settings.groups},
            endpoint_values={e.index: permits.endpoint_available(e.index) for e in settings.endpoints},
            usable=usable,
            least={g.index: g.per_worker_min for g in settings.groups},
            paces=paces,
            opening=opening,
            overlapping=self._overlapping(waiters),
            now=now,
        )
        self.due = min((at for h in connections if (at := paces[h.group].free_at(h)) > now), default=math.inf)
        for held in chosen:
            self.recalls[held.slot] = Recall(held.word, held.group, held.endpoint, now)
            self.segment.words[self._recalls_at + held.slot] = held.word
            self.segment.words[self.segment.layout.at(GROUPS, held.group, "recalls")] += 1
        return {held.row for held in chosen}

    def _opening(self) -> Counter[Unit]:
        """Count the connections that are just being opened."""
        per_row = self.segment.layout.slots_per_worker
        return Counter((slot // per_row, UseWord.of(self._uses[slot]).group) for slot in self.slots_in(Use.OPENING))

    def _paces(
        self, waiters: Sequence[Waiter], connections: Sequence[Held], opening: Mapping[Unit, int]
    ) -> dict[int, Pace]:
        """Return the pace of each group that holds anything."""
        counts = Counter(h.unit for h in connections)
        counts.update(opening)
        queues = queue_lengths(waiters, counts)
        costs = {group: self._costs.of(group) for group in queues}
        return {group: Pace(tenure(costs[group], queue), pause(costs[group])) for group, queue in queues.items()}

    def _overlapping(self, waiters: Sequence[Waiter]) -> set[int]:
        """Return the rows, of those that hold or want anything, that have another generation beside them."""
        words, shape = self.segment.words, self.segment.layout
        rows = {slot // shape.slots_per_worker for slot in self.slots_in(*_HOLDING)}
        servers = {}
        for row in rows | {waiter.row for waiter in waiters}:
            at = shape.at(WORKERS, row)
            if words[at + _SERVER] == ServerKind.GUNICORN:  # with uWSGI a newer worker follows one that has ended
                servers[row] = Server(ServerKind.GUNICORN, words[at + _SERVER_PID], words[at + _SERVER_GENERATION])
        return find_overlapping(servers, parent_of) if len(set(servers.values())) > 1 else set()

    def _clear_outdated(self, keep: bool) -> None:
        """Withdraw recalls whose slot has moved on, and all of them once nobody waits."""
        for slot, recall in list(self.recalls.items()):
            if not keep or self.segment.words[self._slots_at + slot] != recall.word:
                self.segment.words[self._recalls_at + slot] = 0
                del self.recalls[slot]

    def connections(self) -> list[Held]:
        """Return every connection of a live worker that is idle or in use."""
        shape, words, times = self.segment.layout, self.segment.words, self.segment.times
        found = []
        for slot in self.slots_in(Use.IDLE, Use.ACTIVE):
            word = words[self._slots_at + slot]
            if word & FIELDS_MASK != BOTH_YES or word & ORPHAN:
                continue
            use = self._uses[slot] & 0xFF
            if use not in (Use.IDLE, Use.ACTIVE):
                continue
            detail = shape.at(SLOTS, slot)
            row = slot // shape.slots_per_worker
            found.append(
                Held(
                    slot=slot,
                    word=word,
                    row=row,
                    group=word >> G_INDEX_SHIFT & 0xFF,
                    endpoint=word >> E_INDEX_SHIFT & 0xFF,
                    is_idle=use == Use.IDLE,
                    idle_since=times[detail + _SINCE],
                    opened_at=times[detail + _OPENED_AT],
                    server_generation=words[shape.at(WORKERS, row, _SERVER_GENERATION)],
                )
            )
        return found


def waiting_groups(waiters: Iterable[Waiter]) -> tuple[set[int], set[int]]:
    """Return the groups with waiters for a group permit, and those with waiters for an endpoint permit."""
    waiters = list(waiters)
    return (
        {w.group for w in waiters if not w.for_endpoint},
        {w.group for w in waiters if w.for_endpoint},
    )
