"""Open what each worker keeps of a group (`per_worker_min`) ahead of need, one connection at a time.

The workers of a host take turns without talking to each other: whoever finds that nobody opened a connection lately,
with jitter, opens the next one.  So they share about one open in PACE_S, and none while requests have connections
opened anyway.

Guarantees: within the caps, and beside the reserve of a group: a claim like any other, which never waits; none while
somebody waits for the group, as what a worker keeps is not recalled.
Threads.  The background thread's work.  While it connects to a server that hangs, it does nothing else for as long as
`connect_timeout` allows; an endpoint that is DOWN, or that nobody looks after, is left alone.
Fork.  A process that forks is taken for a master and opens nothing from then on, nor in its first second.
If the process dies here.  As in any claim and open (slots.py, opening.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmpool.chance import chance
from shmpool.clock import monotonic
from shmpool.endpoints import heartbeat_age
from shmpool.layout import SLOTS, USE_WORDS
from shmpool.router import Attempt
from shmpool.slots import OPENED_AT
from shmpool.states import Use
from shmpool.words import UseWord

if TYPE_CHECKING:
    from shmpool.local_group import LocalGroup

START_S: Final = 1.0  # a master that uses the pool before it forks has forked by then
PACE_S: Final = 0.25  # between two opens of the whole host
PAUSE_MAX_S: Final = 10.0  # between tries that come to nothing

_USE_AND_GROUP: Final = 0xFFFF  # of a use word


class WarmUp:
    """Made by each group of a process."""

    def __init__(self) -> None:
        self._pause = PACE_S
        self._due = monotonic() + START_S * (1 + chance())
        self._is_told = False

    def look(self, group: LocalGroup) -> float:
        """Open a connection if the worker has fewer than it keeps; return the seconds until it is to look again."""
        if not self._is_wanted(group):
            self._pause = PACE_S
            return PAUSE_MAX_S
        now = monotonic()
        if now >= self._due:
            if now - _last_open(group) >= PACE_S:
                self._pause = PACE_S if self._open(group, now) else min(PAUSE_MAX_S, 2 * self._pause)
            self._due = now + self._pause * (0.5 + chance())
        return self._due - now

    def _is_wanted(self, group: LocalGroup) -> bool:
        least = group.settings.per_worker_min
        if not least or group.is_retired or not group.attachment.may_open_ahead():
            return False
        return group.table.out(group.permits) < least

    def _open(self, group: LocalGroup, now: float) -> bool:
        """Open one that rests, if that does nobody harm; return whether it did."""
        attachment = group.attachment
        if heartbeat_age(attachment.segment) > attachment.settings.stale_after or _is_waited_for(group):
            return False
        attempt = Attempt()
        attempt.has_tried = True  # what is DOWN is for those who need it
        try:
            lease = group.try_open(attempt, now, may_wait=False)
        except Exception as error:  # noqa: BLE001  the application's on_connect, too, must not end the thread
            self._tell(group, error)
            return False
        if lease is None:
            return False
        self._is_told = False
        group.put_idle(lease)
        return True

    def _tell(self, group: LocalGroup, error: Exception) -> None:
        """Log why nothing could be opened, once until something is."""
        if self._is_told:
            return
        self._is_told = True
        import logging  # cold, and an application has it anyway

        logging.getLogger("shmpool").warning(
            "pool %s: group %s: no connection ahead of need: %s: %s",
            group.pool.name,
            group.settings.name,
            type(error).__name__,
            error,
        )


def _last_open(group: LocalGroup) -> float:
    """Return when a process of the host opened a connection last, of whatever group."""
    segment = group.attachment.segment
    start, end = segment.layout.span(SLOTS)
    latest: float = max(segment.times[start + OPENED_AT : end : SLOTS.row_words].tolist())
    return latest


def _is_waited_for(group: LocalGroup) -> bool:
    """Whether a living process has a thread that waits for the group; a dead one's use word stays."""
    if group.queue.waiters:
        return True
    segment, locks = group.attachment.segment, group.attachment.locks
    start, end = segment.layout.span(USE_WORDS)
    waiting = UseWord(Use.WAITING, group.permits.index).word()
    uses = segment.words[start:end].tolist()
    rows = {
        number // segment.layout.slots_per_worker for number, use in enumerate(uses) if use & _USE_AND_GROUP == waiting
    }
    return any(locks.holder(row) is not None for row in rows)
