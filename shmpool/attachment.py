"""One process's place in a pool: the segment, a worker row, the opened semaphores, the configuration.

There is one attachment per process and pool; it is made on first use in each process.

Guarantees: nothing is shared across fork; a process that forks gives back what rests first.
Assumptions: the lock file is opened by rows.py alone.

If the process dies.  The kernel drops the row's lock, the coordinator reaps the row.
Fork.  `_before_fork` runs in the parent of every fork: attachments that can, detach entirely (a pre-loading master
    then holds nothing); `forget_parent` releases the views and closes the semaphores in the child, so that a
    copied frame fails instead of doing harm.  Where no at-fork handlers run (uWSGI), the private page reads zero in the
    child, and the process id in the registry's keys keeps the parent's attachments out of reach.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from shmpool import semaphores
from shmpool.background import ROUND_S, Background, Rounds
from shmpool.clock import monotonic
from shmpool.control_client import tell
from shmpool.errors import DisownedError, MechanismError, SegmentRetiredError, TableFullError
from shmpool.frames import encode
from shmpool.layout import GROUPS, HEADER, PERMITS, SLOTS, WORKERS
from shmpool.names import Names
from shmpool.rows import NO_SERVER, Locks, Row, Server, coordinator_pid, leave_row, take_row
from shmpool.segment import Segment, attach, private_page
from shmpool.semaphores import Semaphore
from shmpool.settings import EndpointSettings, GroupSettings, PoolSettings
from shmpool.slots import EndpointPermits, GroupPermits, SlotTable, Token
from shmpool.states import Role, SegmentState, ServerKind
from shmpool.trials import Trials

_EVIDENCE_CHARS: Final = 200
_ROUNDS_EVERY_S: Final = ROUND_S / 4  # in between a call costs one look at the clock
_ROWS_MAX: Final = 16  # rows that one process may take, if one is not enough for its threads

BACKGROUND_STOP_S: Final = 2.0
TELL_S: Final = 0.1  # what handing passwords over may take
MISSED_ANEW_S: Final = 10.0  # a coordinator that nobody has missed for so long is missed anew
SERVER_RELOADS_S: Final = 60.0  # what an application server has to start its coordinator again: the bound of a reload

_registry: dict[tuple[int, Names], Attachment] = {}
_mapped: weakref.WeakSet[Attachment] = weakref.WeakSet()  # those that left the registry too: frames may still use them
_paused: list[Attachment] = []  # their background threads stopped for a fork
_locks: dict[int, threading.RLock] = {}
_server = NO_SERVER
_has_threads = True
_forking_pid = 0  # of a process that has forked
_passing_pid = 0  # of a process that attaches only on its way to a fork
_rounds_at = 0.0  # monotonic; when it is next seen what is due
_has_own_coordinator = False  # the application server
_told: set[Names] = set()  # pools that this process was seen to use on its way to a fork
_missed = (0.0, float("-inf"))  # when a coordinator was first and last missed


def set_server(kind: ServerKind, pid: int, generation: int) -> None:
    """Say which application server this process works for, before it attaches.

    Args:
        pid: of the server's master.
        generation: which start or reload of it; a later one has a larger number.
    """
    global _server
    _server = Server(kind, pid, generation)


def be_without_threads() -> None:
    """Start no background thread, in this process and its children: `do_rounds` does its work."""
    global _has_threads
    _has_threads = False


def has_threads() -> bool:
    """Whether threads of this package run in this process."""
    return _has_threads


def pass_through() -> None:
    """Keep nothing between checkin and checkout, neither connection nor row; children are not meant.

    For a master that cannot give back before it forks, as it runs no at-fork handlers.
    """
    global _passing_pid
    _passing_pid = os.getpid()


def leave_starting_to_server() -> None:
    """Give the application server time to start a coordinator before workers do: this process and its children."""
    global _has_own_coordinator
    _has_own_coordinator = True


def is_server_starting(within: float) -> bool:
    """Whether the application server still has time to start a coordinator.  Asked while one is missing.

    Args:
        within: seconds that it has from the first time on.
    """
    global _missed
    now, (first, last) = monotonic(), _missed
    _missed = (now if now - last >= MISSED_ANEW_S else first, now)
    return _has_own_coordinator and now - _missed[0] < within


def _callers(limit: int = 8) -> str:
    """Return who is calling this package, innermost last: a short trace for the log."""
    lines: list[str] = []
    mine = os.path.join(os.path.dirname(__file__), "")
    frame = sys._getframe(1)
    while frame is not None and len(lines) < limit:
        code = frame.f_code
        if not code.co_filename.startswith(mine):
            lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return "\n".join(reversed(lines))


class Resting(Protocol):
    """What keeps idle connections through an attachment: a pool."""

    def read_passwords(self) -> Mapping[str, str]:
        """Return what a coordinator is told that has its configuration from a process, by endpoint."""

    def rest(self) -> int:
        """Give them all back; return how many there were."""

    def look_after_idle(self) -> float:
        """Give back those that are recalled, too old or dead; return the seconds until it is to look again."""

    def start_coordinator(self) -> None:
        """Start one, where that is wanted: none has answered for a while."""


class Attachment:
    """Made by `join`; use `is_current` before believing an old reference."""

    def __init__(self, segment: Segment, locks: Locks, token_type: type[Token]) -> None:
        self.segment = segment
        self.locks = locks
        self.pid = os.getpid()
        self.keeps_nothing = _passing_pid == self.pid
        self.page = private_page()
        self.table = SlotTable(segment, self.page, token_type)
        self.opened_by = _callers()
        self.users: weakref.WeakSet[Resting] = weakref.WeakSet()  # pools with idle connections here
        self.trials = Trials()
        self._background: Background | Rounds | None = None
        self._semaphores: dict[str, Semaphore] = {}
        self._rows = threading.Lock()
        self.config_generation = 0
        self.settings: PoolSettings
        self.endpoints: dict[int, EndpointPermits] = {}
        self.groups: dict[str, tuple[GroupSettings, GroupPermits]] = {}
        self._config_at = segment.layout.at(HEADER, 0, "config_generation")
        self._state_at = segment.layout.at(HEADER, 0, "state")
        _mapped.add(self)

    def __repr__(self) -> str:
        return f"<Attachment {self.segment.names.stem} rows {[row.number for row in self.table.rows]}>"

    @property
    def names(self) -> Names:
        """The pool's names."""
        return self.segment.names

    def is_current(self) -> bool:
        """Whether this process may still work through this attachment."""
        page: int = self.page[0]
        if page == 0:
            return False
        words = self.segment.words
        return bool(words[self.table.generation_at] == page and words[self._state_at] == SegmentState.OPEN)

    def is_retired(self) -> bool:
        """Whether the segment takes nobody in any more: this process gives back what it holds, and leaves."""
        return bool(self.page[0] and self.segment.words[self._state_at] == SegmentState.RETIRED)

    def is_served(self) -> bool:
        """Whether a coordinator has the pool that has also taken the segment over, and published what it was given."""
        try:
            pid = coordinator_pid(self.names)
        except MechanismError:
            return False
        return pid is not None and pid in (0, self.segment.header("coordinator_pid"))  # 0: it cannot be seen

    def is_outdated(self) -> bool:
        """Whether a newer configuration was published."""
        return bool(self.segment.words[self._config_at] != self.config_generation)

    def refresh(self) -> bool:
        """Read the configuration again if a newer one was published; return whether there was one."""
        if not self.is_outdated():
            return False
        generation, settings = self.segment.read_settings()
        endpoints = {e.index: self._endpoint(e, settings) for e in settings.endpoints}
        groups = {g.name: (g, self._group(g)) for g in settings.groups if g.connections}  # 0: being removed
        self.settings, self.endpoints, self.groups = settings, endpoints, groups
        self.config_generation = generation
        return True

    def _open(self, kind: str, index: int, inode_at: int) -> Semaphore:
        name = self.names.semaphore(self.segment.token, kind, index)
        inode = self.segment.words[inode_at]
        known = self._semaphores.get(f"{name}#{inode}")
        if known is None:
            known = semaphores.open_existing(name, inode)
            self._semaphores[f"{name}#{inode}"] = known
        return known

    def _bell(self, kind: str, group: int) -> Semaphore:
        column = "bell_inode" if kind == "b" else "endpoint_bell_inode"
        return self._open(kind, group, self.segment.layout.at(GROUPS, group, column))

    def _permit(self, kind: str, index: int) -> Semaphore:
        row = index if kind == "g" else self.segment.layout.groups + index
        return self._open(kind, index, self.segment.layout.at(PERMITS, row, "semaphore_inode"))

    def _endpoint(self, endpoint: EndpointSettings, settings: PoolSettings) -> EndpointPermits:
        users = [g for g in settings.groups if not g.endpoints or endpoint.name in g.endpoints]
        bells = [self._bell("w", g.index) for g in users]
        return EndpointPermits(self.segment, endpoint.index, self._permit("e", endpoint.index), bells)

    def _group(self, group: GroupSettings) -> GroupPermits:
        return GroupPermits(
            self.segment,
            group.index,
            self._permit("g", group.index),
            self._bell("b", group.index),
            self._bell("w", group.index),
        )

    def take_token(self, group: GroupPermits) -> Token:
        """Take a slot out, from a further row if those of the first are in use.

        Raises:
            TableFullError: neither a slot nor a row is free.
            DisownedError: the process left the pool meanwhile.
        """
        try:
            return self.table.take(group)
        except TableFullError:
            with self._rows:
                with contextlib.suppress(TableFullError):
                    return self.table.take(group)
                if not self.page[0]:  # a fork in another thread made this process leave
                    raise DisownedError("this process has just left the pool") from None
                if len(self.table.rows) >= _ROWS_MAX:
                    raise
                self.table.add_row(self._take_row())
        return self.table.take(group)

    def _take_row(self) -> Row:
        return take_row(self.segment, self.locks, server=_server)

    def slot_name(self, token: Token) -> tuple[int, int, int]:
        """Return row, generation and slot number within the row: what names a token's session at the server."""
        per_row = self.segment.layout.slots_per_worker
        return token.number // per_row, self.page[token.page_at], token.number % per_row

    def details_at(self, token: Token, column: str) -> int:
        """Return where one of a slot's notes lies."""
        return token.detail_at + SLOTS.column(column)

    def start_background(self) -> None:
        """Start the background thread, if it does not run (first use in a process), or what stands in for it."""
        if self._background is None and not self.keeps_nothing:
            with self._rows:
                if self._background is None:
                    if _has_threads:
                        self._background = Background(self.names, self._greetings, self._look, self._seek_coordinator)
                    else:
                        self._background = Rounds(
                            self._look, self._seek_coordinator, lambda: is_coordinated(self.names), self._hand_over
                        )

    def do_round(self) -> None:
        """Do what is due of the background thread's work, where that does not run."""
        if isinstance(self._background, Rounds):
            self._background.go()

    def stop_background(self, within: float = BACKGROUND_STOP_S) -> bool:
        """End the background thread (before a fork, at exit); return whether there was one."""
        background, self._background = self._background, None
        if background is not None:
            background.stop(within)
        return background is not None

    def _greetings(self) -> bytes:
        row = self.table.rows[0]
        said = encode("hello", pid=self.pid, row=row.number, generation=row.generation)
        return said + b"".join(encode("passwords", passwords=passwords) for passwords in self._passwords())

    def _hand_over(self) -> None:
        """Tell the coordinator the passwords, where no control connection does."""
        for passwords in self._passwords():
            with contextlib.suppress(MechanismError):
                tell(self.names, "passwords", TELL_S, passwords=passwords)

    def _passwords(self) -> list[Mapping[str, str]]:
        return [passwords for user in list(self.users) if (passwords := user.read_passwords())]

    def _look(self) -> float:
        return min((user.look_after_idle() for user in list(self.users)), default=float("inf"))

    def _seek_coordinator(self) -> None:
        if not self.settings.autostart or is_coordinated(self.names):
            return
        if self.settings.document or not is_server_starting(SERVER_RELOADS_S):
            for user in list(self.users):  # not each of them need know how
                user.start_coordinator()

    def say_waiting(self, group: int) -> None:
        """Tell the coordinator that a thread sleeps on a group's bell."""
        if self._background is not None:
            self._background.say("waiting", group=group)

    def say_evidence(self, endpoint: int, error: str) -> None:
        """Tell the coordinator that an endpoint did not serve."""
        if self._background is not None:
            self._background.say("evidence", endpoint=endpoint, error=error[:_EVIDENCE_CHARS])

    def may_open_ahead(self) -> bool:
        """Whether connections opened ahead of need stay with this process: not a master, which forks."""
        return not self.keeps_nothing and self.pid != _forking_pid

    def say_served(self, endpoint: int, role: Role) -> None:
        """Tell the coordinator that an endpoint took a connection that was tried against its advice."""
        if self._background is not None:
            self._background.say("served", endpoint=endpoint, role=int(role))

    def rest(self) -> int:
        """Give idle connections back; return how many there were."""
        return sum(user.rest() for user in list(self.users))

    def leave(self) -> bool:
        """Give the rows back if nothing is held through them; return whether this process has left the pool.

        Afterwards the next use joins anew.  What is still checked out keeps its row until the process ends.
        Other threads may use the attachment meanwhile: one that takes a token after the page was cleared finds
        itself disowned before its first store, and one that took it before keeps the row.
        """
        if self.pid != os.getpid() or self.page[0] == 0:
            return True
        if not self.table.is_home():
            return False
        self.table.forget()
        if not self.table.is_home():
            self.table.remember()
            return False
        with contextlib.suppress(MechanismError):  # the lock file was removed: nobody looks at these locks any more
            for row in self.table.rows:
                leave_row(self.segment, self.locks, row)
        self._unregister()
        self._close_semaphores()
        return True

    def leave_when_due(self) -> bool:
        """Leave if nobody uses the attachment any more, or nobody should; called whenever something came back."""
        if (self.users and self.is_current() and not self.keeps_nothing) or not self.leave():
            return False
        self.stop_background(within=0.0)  # not to be waited for: it may be waiting for the caller
        return True

    def step_aside(self) -> None:
        """Make room for the attachment that comes next.

        Through a retired segment everything still goes home, and the rows with it (`leave_when_due`).  Rows that
        are not this process's any more are forgotten: nothing is stored or given back through them.
        """
        if not self.is_retired() or not self._owns_rows():
            self.table.forget()
        self._unregister()

    def _owns_rows(self) -> bool:
        words, shape = self.segment.words, self.segment.layout
        return all(words[shape.at(WORKERS, row.number, "generation")] == row.generation for row in self.table.rows)

    def _unregister(self) -> None:
        if _registry.get((self.pid, self.names)) is self:
            del _registry[self.pid, self.names]

    def _close_semaphores(self) -> None:
        for semaphore in self._semaphores.values():
            with contextlib.suppress(semaphores.ExistentialError):
                semaphore.close()
        self._semaphores.clear()

    def forget_in_child(self) -> None:
        """Make every copied frame fail (child of a fork)."""
        self.segment.release()
        self._close_semaphores()


def join(names: Names, token_type: type[Token] = Token) -> Attachment:
    """Return this process's attachment to a pool, making it on first use.

    Raises:
        SegmentMissingError, SegmentMismatchError, SegmentRetiredError, TableFullError: says what to do.
    """
    pid = os.getpid()
    known = _registry.get((pid, names))
    if known is not None and known.is_current():
        return known
    with _locks.setdefault(pid, threading.RLock()):
        known = _registry.get((pid, names))
        if known is not None:
            if known.is_current():
                return known
            known.step_aside()
        segment = attach(names)
        row: Row | None = None
        try:
            if segment.state is SegmentState.RETIRED:
                raise SegmentRetiredError(f"segment {names.segment} is retired; its successor is not open yet")
            locks = Locks(names, segment.header("lock_inode"))
            attachment = Attachment(segment, locks, token_type)
            attachment.refresh()
            row = attachment._take_row()
            attachment.table.add_row(row)
            _registry[pid, names] = attachment
            if attachment.keeps_nothing and names not in _told:
                _told.add(names)
                _warn(
                    f"pool {names.pool}: used in pid {pid} before it forks; nothing is kept for its children, each "
                    f"connection is closed at checkin. It is used by:\n{attachment.opened_by}"
                )
        except MechanismError as error:
            is_retired = segment.state is SegmentState.RETIRED  # its names may be gone, in the middle of all this
            segment.release()
            if is_retired and not isinstance(error, SegmentRetiredError):
                raise SegmentRetiredError(f"segment {names.segment} was just retired") from error
            raise
        except BaseException:
            if row is not None:  # a signal handler raised: nobody will use this row, and nobody else could
                attachment.table.forget()
                leave_row(segment, locks, row)
            segment.release()
            raise
        return attachment


def is_coordinated(names: Names) -> bool:
    """Whether a coordinator, running or stopped, has the pool.  One in this very process is not seen."""
    try:
        return Locks(names).coordinator_pid() is not None
    except MechanismError:
        return False


def attached() -> Sequence[Attachment]:
    """Return this process's attachments, those to retired segments that it still holds something of included."""
    pid = os.getpid()
    return [a for a in list(_mapped) if a.pid == pid and a.page[0] and a.table.rows]


def do_rounds() -> None:
    """Do what is due of the background threads' work, where none runs; to be called often: after each request."""
    global _rounds_at
    now = monotonic()
    if now < _rounds_at:
        return
    _rounds_at = now + _ROUNDS_EVERY_S
    for attachment in attached():
        attachment.do_round()


def _before_fork() -> None:
    """Runs in the parent, before every fork."""
    global _forking_pid
    _forking_pid = os.getpid()
    for attachment in attached():
        if attachment.stop_background():
            _paused.append(attachment)
        count = attachment.rest()
        if count:
            _warn(
                f"pool {attachment.names.pool}: attached in pid {attachment.pid}, which now forks; gave back {count} "
                f"idle connections first. It was attached by:\n{attachment.opened_by}"
            )
        attachment.leave()


def _warn(text: str) -> None:
    """Log a warning without importing `logging`: in the middle of a fork that would add at-fork handlers of its own."""
    logging = sys.modules.get("logging")
    if logging is None:
        print(text, file=sys.stderr)  # what `logging` does without a handler
    else:
        logging.getLogger("shmpool").warning("%s", text)


def _after_fork_in_parent() -> None:
    """Runs in the parent, after every fork: what it still uses is looked after again."""
    while _paused:
        attachment = _paused.pop()
        if attachment in attached():
            attachment.start_background()


def forget_parent() -> None:
    """Let go of what was copied from the parent (child of a fork, as soon as possible; once more: nothing)."""
    me = os.getpid()
    for attachment in [a for a in list(_mapped) if a.pid != me]:
        attachment.forget_in_child()
        _mapped.discard(attachment)
    for key in [key for key in _registry if key[0] != me]:
        del _registry[key]
    for pid in [pid for pid in _locks if pid != me]:
        del _locks[pid]
    _paused.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=forget_parent)
