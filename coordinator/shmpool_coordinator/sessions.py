"""Whether the server session of an orphan has ended; if not, end it.

An endpoint permit comes back only after its session is gone *at the server*.  One helper thread per endpoint looks
at pg_stat_activity, so that nothing here blocks the event loop; it starts with the first question and closes its
connection when there are none.

Guarantees: a permit is never declared free because nobody could look, before `orphan_grace` has passed.  Only a session
with the backend pid *and* the name of the orphan's slot is terminated.
Assumptions: the event loop asks again on each tick while it wants to know (`is_gone`), and a look has one user.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from shmpool.clock import monotonic
from shmpool.credentials import Lookup
from shmpool.layout import SLOTS
from shmpool.segment import Segment
from shmpool.settings import EndpointSettings
from shmpool.words import E_INDEX_SHIFT
from shmpool_coordinator.config import Probe as ProbeOptions
from shmpool_coordinator.probe import Probe, parse_conninfo

LOOK_AGAIN_S: Final = 0.005  # a server process ends within milliseconds of its client, or of being told to
LOOK_EVERY_S: Final = 0.1  # what is still there after several looks takes its time
FORGET_S: Final = 2.0  # a question that was not repeated for so long has no asker any more
DEFAULT_CONNECT_S: Final = 5.0

STARTING_SHOWN: Final = 180000  # PostgreSQL 18 shows a server process before it knows its client's name
STARTED_LOCAL_S: Final = 0.25  # a forked server process is in the table by then
STARTED_REMOTE_S: Final = 1.25  # the same, and a lost packet of the handshake was sent again

# Every session of this pool that may come from this host.  client_addr is hidden from roles without pg_read_all_stats
# (NULL), and always NULL over a Unix socket: such a session counts as this host's.  And every server process that was
# forked before the one that asks, and has not told its name yet.
SESSIONS_QUERY: Final = """
SELECT pid, application_name, client_addr IS NULL OR inet_client_addr() IS NULL
       OR client_addr = inet_client_addr(), coalesce(state = 'starting', false)
FROM pg_stat_activity
WHERE application_name ~ %s OR (state = 'starting' AND backend_start <=
      (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()))
"""
RIGHTS_QUERY: Final = """
SELECT pg_has_role('pg_read_all_stats', 'usage'), inet_client_addr() IS NOT DISTINCT FROM inet_server_addr()
"""
TERMINATE_QUERY: Final = "SELECT pg_terminate_backend(%s)"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Question:
    """One orphan's session, as both threads see it; every field is stored whole."""

    slot: int
    row: int
    place: int  # number of the slot in its row
    backend_pid: int
    asked_first: float
    asked_last: float
    seen_absent: float | None = None  # first look that did not find it, with no pid known
    seen_started: float | None = None  # the same, and every connection made before it has told its name
    is_gone: bool = False
    was_terminated: bool = False


class SessionLook(Probe):
    """A connection to one endpoint for looking at sessions and ending them."""

    opened_at = 0.0  # just before the server was asked for it; CLOCK_MONOTONIC
    started_s: float | None = None  # when a server process is in sight for certain; None: no such bound

    def open(self) -> None:
        """Connect, unless that was done.  Raises as `rows`."""
        if self._connection is not None:
            return
        self.started_s = None
        self.opened_at = monotonic()
        if self._open().server_version >= STARTING_SHOWN:
            [(may_see, is_local)] = self.rows(RIGHTS_QUERY)
            if may_see:
                self.started_s = STARTED_LOCAL_S if is_local else STARTED_REMOTE_S

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one query, bounded in time.  Raises whatever the server or the network does."""
        connection = self._connection or self._open()
        deadline = time.monotonic() + self._timeout_s
        cursor = connection.cursor()
        cursor.execute(query, parameters)
        self._wait(connection, deadline, "query")
        return list(cursor.fetchall())


class EndpointSessions:
    """The questions about one endpoint's sessions and the thread that answers them."""

    def __init__(
        self, pool: str, settings: EndpointSettings, look: SessionLook, grace_s: float, wake: Callable[[], None]
    ) -> None:
        self.settings = settings
        self._pool = pool
        self._look = look
        self._grace_s = grace_s
        self._wake = wake
        self._questions: dict[tuple[int, int], _Question] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()  # a question that no look has seen yet
        self._connect_s = float(parse_conninfo(settings.conninfo).get("connect_timeout") or DEFAULT_CONNECT_S)

    def ask(self, key: tuple[int, int], row: int, place: int, backend_pid: int) -> bool:
        """Return whether the session is known to be gone; asks for it if nobody did."""
        now = monotonic()
        with self._lock:
            question = self._questions.get(key)
            if question is None:
                question = _Question(key[0], row, place, backend_pid, now, now)
                self._questions[key] = question
                self._news.set()
            question.asked_last = now
            if self._thread is None and not question.is_gone:
                name = f"sessions-{self.settings.name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            return question.is_gone

    def _pending(self) -> list[_Question] | None:
        """Forget what nobody asks any more and return the open questions; None: the thread is over.

        It stays, with its connection, until the last answer is forgotten: deaths come in groups.
        """
        now = monotonic()
        with self._lock:
            self._news.clear()
            self._questions = {k: q for k, q in self._questions.items() if now - q.asked_last < FORGET_S}
            if not self._questions:
                self._look.close()  # under the lock: the next thread has the same look
                self._thread = None
                return None
            return [q for q in self._questions.values() if not q.is_gone]

    def _run(self) -> None:
        pause = LOOK_AGAIN_S
        while (pending := self._pending()) is not None:
            if pending:
                self._answer(pending)
                if any(q.is_gone for q in pending):
                    self._wake()
            if self._news.wait(pause if pending else FORGET_S):
                time.sleep(LOOK_AGAIN_S)  # and take what else comes at the same time with it
                pause = LOOK_AGAIN_S
            else:
                pause = min(LOOK_EVERY_S, 2 * pause)

    def _answer(self, pending: list[_Question]) -> None:
        if self.settings.via == "pooler" or self.settings.address == "service":
            # What one look sees need not be where the session is.
            self._wait_out(pending, "its sessions cannot be looked at")
            return
        try:
            if self._look.started_s is not None and any(self._wants_newer_look(q) for q in pending):
                self._look.close()
            self._look.open()
            found = self._look.rows(SESSIONS_QUERY, rf"shmpool:{re.escape(self._pool)}:[0-9]+\.[0-9]+:[0-9]+$")
        except Exception as error:  # noqa: BLE001 - whatever the server or the network does means: nobody can look
            self._look.close()
            self._wait_out(pending, " ".join(str(error).split()))
            return
        for question in pending:
            self._judge(question, found)

    def _wants_newer_look(self, question: _Question) -> bool:
        """Whether a new connection tells more: the server takes connections in turn, so it comes after the orphan's."""
        return not question.backend_pid and self._look.opened_at <= question.asked_first

    def _judge(self, question: _Question, found: list[tuple[Any, ...]]) -> None:
        name = re.compile(rf":{question.row}\.[0-9]+:{question.place}$")
        mine = [
            pid
            for pid, application, is_ours, _ in found
            if name.search(application) and (pid == question.backend_pid if question.backend_pid else is_ours)
        ]
        if mine:
            question.seen_absent = question.seen_started = None
            self._terminate(question, mine[0])
        elif question.backend_pid:
            question.is_gone = True
        else:
            self._judge_nameless(question, any(is_starting for *_, is_starting in found))

    def _judge_nameless(self, question: _Question, is_one_starting: bool) -> None:
        """Judge a session that nobody saw: it never was, has ended, or has yet to tell its name."""
        now = monotonic()
        if question.seen_absent is None:
            question.seen_absent = now
        if self._look.started_s is None or is_one_starting or self._wants_newer_look(question):
            question.seen_started = None
        elif question.seen_started is None:
            question.seen_started = now
        settled = question.seen_started is not None and now - question.seen_started >= (self._look.started_s or 0.0)
        question.is_gone = settled or now - question.seen_absent >= self._connect_s

    def _terminate(self, question: _Question, pid: int) -> None:
        if question.was_terminated or not question.backend_pid:
            return
        question.was_terminated = True
        log.info("endpoint %s: ending session %d of orphaned slot %d", self.settings.name, pid, question.slot)
        try:
            self._look.rows(TERMINATE_QUERY, pid)
        except Exception as error:  # noqa: BLE001 - not allowed to, or it broke: the session ends by itself or by grace
            self._look.close()
            log.warning(
                "endpoint %s: session %d of orphaned slot %d cannot be ended (%s); its permit waits for it",
                self.settings.name,
                pid,
                question.slot,
                " ".join(str(error).split()),
            )

    def _wait_out(self, pending: list[_Question], why: str) -> None:
        for question in pending:
            if monotonic() - question.asked_first >= self._grace_s:
                question.is_gone = True
                log.warning(
                    "endpoint %s: orphaned slot %d is given up after %g s, nobody was able to look whether its "
                    "session has ended: %s",
                    self.settings.name,
                    question.slot,
                    self._grace_s,
                    why,
                )


class Sessions:
    """Answers for all endpoints of a pool."""

    def __init__(self, segment: Segment, wake: Callable[[], None]) -> None:
        self._segment = segment
        self._wake = wake
        self._endpoints: dict[int, EndpointSessions] = {}
        self._options: tuple[ProbeOptions, float] | None = None

    def configure(
        self,
        endpoints: tuple[EndpointSettings, ...],
        probe: ProbeOptions,
        *,
        grace_s: float,
        lookup: Lookup | None = None,
    ) -> None:
        """Take in the endpoints; a changed one is asked anew.  `lookup` as for a probe."""
        pool = self._segment.names.pool
        is_same = (probe, grace_s) == self._options
        self._options = (probe, grace_s)
        for settings in endpoints:
            known = self._endpoints.get(settings.index)
            if is_same and known is not None and known.settings == settings:
                continue
            look = SessionLook(settings, pool=pool, overlay=probe.conninfo, timeout_s=probe.timeout, lookup=lookup)
            self._endpoints[settings.index] = EndpointSessions(pool, settings, look, grace_s, self._wake)

    def is_gone(self, slot: int, word: int) -> bool:
        """Whether the server session of an orphan's slot has ended (never blocks)."""
        endpoint = self._endpoints.get(word >> E_INDEX_SHIFT & 0xFF)
        if endpoint is None:
            return False
        shape = self._segment.layout
        backend_pid = self._segment.words[shape.at(SLOTS, slot, "backend_pid")]
        row, place = divmod(slot, shape.slots_per_worker)
        return endpoint.ask((slot, word), row, place, backend_pid)
