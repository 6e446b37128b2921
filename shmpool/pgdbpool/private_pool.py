"""The pool of one process, without a coordinator: what `type: 'threaded'` and `'non-threaded'` stand for.

A group's connections are given out in strict rotation, those in use skipped: with five, the sixth holder gets the
first one's again.  Who waits is handed the next connection that comes back, in order of arrival.

Guarantees: a connection has one holder at a time; a wait ends; connecting and statements happen outside the lock.
Threads.  'threaded': one lock for all books of the pool.  'non-threaded': no lock; one thread only, so nobody waits.
If a holder dies, or an exception of a signal handler leaves a connection in nobody's hands: whoever finds none free
    takes it over, and rolls back what is open there.
Fork.  The pool knows that it is in a child by a page that the kernel wipes there; its connections are then cut off from
    the parent's sockets, where no at-fork handler ran when the child first asks for `renewed`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final

from shmpool.clock import monotonic
from shmpool.pgdbpool import session
from shmpool.pgdbpool.configuration import THREADED, GroupSettings, Settings
from shmpool.pgdbpool.errors import DBConnectionError, DBOfflineError, DBTimeoutError, UnconfiguredGroupError
from shmpool.pgdbpool.rota import Endpoint, Rota
from shmpool.segment import private_page

TRIES: Final = 10  # rounds in which no endpoint can be reached, before a handler gives up
SLICE_S: Final = 1.0  # how often a waiting thread looks for connections in nobody's hands

_Holder = Callable[[], object | None]


class Place:
    """One of a group's connections: the connection may change, its number and home do not."""

    __slots__ = ("conn", "endpoint", "holder", "home", "is_at_stake", "is_occupied", "number", "since", "thread")

    def __init__(self, number: int, home: Endpoint) -> None:
        self.number = number
        self.home = home
        self.endpoint: Endpoint | None = None  # where it leads
        self.conn: Any = None
        self.is_occupied = False
        self.is_at_stake = False  # a transaction would be lost with the connection, as far as is known
        self.holder: _Holder | None = None  # returns None once its holder died; None: only a checkin frees it
        self.thread = 0
        self.since = 0.0

    def occupy(self, holder: _Holder | None, thread: int) -> None:
        """Be in somebody's hands; the holder first, so that an interruption leaves no place without one."""
        self.holder, self.thread, self.since = holder, thread, monotonic()
        self.is_occupied = True

    @property
    def is_abandoned(self) -> bool:
        """Whether its holder died without giving it back."""
        return self.is_occupied and self.holder is not None and self.holder() is None


class Waiter:
    """A thread in a group's queue; `place` is what it was handed."""

    __slots__ = ("event", "holder", "place", "thread")

    def __init__(self, holder: _Holder | None) -> None:
        self.holder = holder
        self.thread = threading.get_ident()
        self.event = threading.Event()
        self.place: Place | None = None


class Group:
    """A group's places and who waits for one; the pool's lock guards both."""

    def __init__(self, settings: GroupSettings, rota: Rota) -> None:
        self.settings = settings
        self.places = [Place(number, rota.deal()) for number in range(settings.connection_count)]
        self.waiters: deque[Waiter] = deque()
        self._turn = 0

    def take(self, holder: _Holder | None) -> Place | None:
        """Return the next free place in rotation, or else one in nobody's hands; it is occupied now."""
        order = self.places[self._turn :] + self.places[: self._turn]
        place = next((one for one in order if not one.is_occupied), None)
        place = place or next((one for one in order if one.is_abandoned), None)
        if place is not None:
            self.hand(place, holder, threading.get_ident())
        return place

    def hand(self, place: Place, holder: _Holder | None, thread: int) -> None:
        """Put a place into somebody's hands, and the turn behind it."""
        place.occupy(holder, thread)
        self._turn = (place.number + 1) % len(self.places)

    def put_back(self, place: Place) -> None:
        """Hand a place to who has waited longest, or let it be free."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if waiter.place is None:
                self.hand(place, waiter.holder, waiter.thread)
                waiter.place = place
                waiter.event.set()
                return
        place.is_occupied = False

    def collect_abandoned(self) -> None:
        """Put back what is in nobody's hands."""
        for place in self.places:
            if place.is_abandoned:
                self.put_back(place)

    def forget(self, waiter: Waiter) -> None:
        """Take a thread out of the queue, if it is still in it."""
        with suppress(ValueError):
            self.waiters.remove(waiter)

    def describe(self) -> str:
        """Say who holds the connections and who waits."""
        now = monotonic()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        held = ", ".join(
            f"{place.number} by thread {names.get(place.thread, place.thread)!r} for {now - place.since:.1f} s"
            for place in self.places
            if place.is_occupied
        )
        return f"held: {held or 'none'}; waiting: {len(self.waiters)} threads"


class PrivatePool:
    """See the module; `shmpool.pgdbpool.backend.Backend` says what each method promises."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._page = private_page()
        self._page[0] = 1
        self._is_threaded = settings.type == THREADED
        self._lock: AbstractContextManager[Any] = threading.Lock() if self._is_threaded else nullcontext()
        self._rota = Rota(settings.endpoints)
        self._groups = {name: Group(group, self._rota) for name, group in settings.groups.items()}
        self._is_closed = False
        _pools.add(self)

    @property
    def is_inherited(self) -> bool:
        return not self._page[0]

    def renewed(self) -> PrivatePool:
        self.cut_off()
        return PrivatePool(self.settings)

    def cut_off(self) -> None:
        """Part every inherited connection from its socket (child of a fork)."""
        for group in self._groups.values():
            for place in group.places:
                session.cut_off(place.conn)

    def open(self) -> None:
        places = [(group, place) for group in self._groups.values() for place in group.places]
        opened = [self._open_once(group, place) for group, place in places]
        if places and not any(opened):
            raise DBConnectionError(f"no server can be reached: {self._rota.reasons()}")

    def close(self) -> None:
        self._is_closed = True
        for group in self._groups.values():
            for _ in group.places:
                with self._lock:
                    place = next((one for one in group.places if not one.is_occupied and one.conn is not None), None)
                    if place is not None:
                        place.occupy(None, threading.get_ident())
                if place is not None:
                    self._let_go(group, place)

    def checkout(self, group: str, holder: object | None = None, *, waits: bool = True) -> int | None:
        known = self._group(group)
        until = monotonic() + known.settings.timeout
        reference = None if holder is None else weakref.ref(holder)
        with self._lock:
            place = known.take(reference)
        if place is None:
            if not waits:
                return None
            place = self._wait(known, reference, until)
        try:
            self._make_ready(known, place, until)
        except BaseException:
            self._let_go(known, place)
            raise
        return place.number

    def checkin(self, group: str, number: int, *, commits: bool) -> None:
        known, place = self._place(group, number)
        is_fit = False
        try:
            is_fit = place.conn is not None and session.finish(place.conn, known.settings, commits=commits)
        finally:
            if not is_fit:
                self._drop(place)
            self._let_go(known, place)

    def mark(self, group: str, number: int, *, is_occupied: bool) -> None:
        known, place = self._place(group, number)
        if not is_occupied:
            self._let_go(known, place)
        else:
            with self._lock:
                place.occupy(None, threading.get_ident())

    def look(self, group: str, number: int) -> tuple[Any, bool]:
        _, place = self._place(group, number)
        return place.conn, place.is_occupied

    def occupied(self, group: str) -> int:
        return sum(place.is_occupied for place in self._group(group).places)

    def ready(self, group: str, number: int) -> Any:
        known, place = self._place(group, number)
        is_closed = place.conn is None or session.is_closed(place.conn)
        if is_closed and place.is_at_stake:
            raise DBOfflineError(
                f"group {group!r}: the connection was lost in a transaction; leave the handler, and begin again"
            )
        if is_closed or session.is_dropped(place.conn):
            self._open(known, place, monotonic() + known.settings.timeout, TRIES)
        place.is_at_stake = not known.settings.autocommit or session.is_in_transaction(place.conn)
        return place.conn

    def commit(self, group: str, number: int) -> None:
        _, place = self._place(group, number)
        try:
            place.conn.commit()
        finally:
            place.is_at_stake = False

    def reopen(self, group: str, number: int, *, tries: int = 1) -> None:
        known, place = self._place(group, number)
        self._open(known, place, monotonic() + known.settings.timeout, tries)

    def _group(self, name: str) -> Group:
        try:
            return self._groups[name]
        except KeyError:
            raise UnconfiguredGroupError(name, self._groups) from None

    def _place(self, group: str, number: int) -> tuple[Group, Place]:
        known = self._group(group)
        return known, known.places[number]

    def _wait(self, group: Group, holder: _Holder | None, until: float) -> Place:
        """Return the place that this thread is handed, or that turns out to be in nobody's hands."""
        if not self._is_threaded:
            raise DBTimeoutError(
                f"group {group.settings.name!r}: all {len(group.places)} connections are in use, and with type "
                f"'non-threaded' no other thread can give one back; {group.describe()}"
            )
        waiter = Waiter(holder)
        try:
            with self._lock:
                place = group.take(holder)  # one may have come back since the caller looked
                if place is not None:
                    return place
                group.waiters.append(waiter)
            while waiter.place is None and (remaining := until - monotonic()) > 0:
                waiter.event.wait(min(remaining, SLICE_S))
                with self._lock:
                    group.collect_abandoned()
            with self._lock:
                if waiter.place is not None:
                    return waiter.place
                told = group.describe()
        except BaseException:
            if waiter.place is not None:
                self._let_go(group, waiter.place)
            raise
        finally:
            with self._lock:
                group.forget(waiter)
        raise DBTimeoutError(
            f"group {group.settings.name!r}: none of its {len(group.places)} connections came free within "
            f"{group.settings.timeout:g} s; {told}; raise connection_count or timeout, or find who keeps one"
        )

    def _make_ready(self, group: Group, place: Place, until: float) -> None:
        """Let a place that was just taken have a connection that lives and is in no transaction."""
        place.is_at_stake = not group.settings.autocommit
        if place.conn is not None and session.is_usable(place.conn, group.settings):
            self._go_home(group, place)
        else:
            self._drop(place)
            self._open(group, place, until, TRIES)

    def _go_home(self, group: Group, place: Place) -> None:
        """Give an endpoint that was away its connections back, one at each checkout."""
        if place.endpoint is not place.home and place.home.is_inviting(monotonic()):
            self._try(place.home, group, place)

    def _open(self, group: Group, place: Place, until: float, tries: int) -> None:
        """Give a place a new connection, waiting for an endpoint if it must."""
        for left in reversed(range(tries)):
            if self._open_once(group, place):
                return
            pause = self._rota.pause(monotonic())
            if not left or monotonic() + pause > until:
                break
            time.sleep(pause)
        raise DBOfflineError(f"group {group.settings.name!r}: no server can be reached: {self._rota.reasons()}")

    def _open_once(self, group: Group, place: Place) -> bool:
        candidates = self._rota.candidates(place.home, monotonic())
        return any(self._try(endpoint, group, place) for endpoint in candidates)

    def _try(self, endpoint: Endpoint, group: Group, place: Place) -> bool:
        """Let a place have a new connection to an endpoint; if there is none it keeps what it has."""
        began = monotonic()
        endpoint.begin(began)
        try:
            conn = session.open_session(endpoint.settings, group.settings)
        except session.OpenFailedError as error:
            endpoint.failed(str(error), began, monotonic())
            return False
        endpoint.served()
        self._drop(place)
        place.conn, place.endpoint = conn, endpoint
        return True

    def _drop(self, place: Place) -> None:
        conn, place.conn = place.conn, None
        if conn is not None:
            session.discard(conn)

    def _let_go(self, group: Group, place: Place) -> None:
        place.is_at_stake = False
        if self._is_closed:
            self._drop(place)
        with self._lock:
            group.put_back(place)


_pools: weakref.WeakSet[PrivatePool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Runs in the child, after every fork of Python's own."""
    for pool in list(_pools):
        pool.cut_off()


os.register_at_fork(after_in_child=_after_fork_in_child)
