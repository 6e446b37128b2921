"""Worker rows and the kernel record locks that say who owns them.

A row belongs to the process that holds the record lock of its byte in the lock file beside the segment.  The
kernel drops that lock when the process dies, in whatever pid namespace; a child does not inherit it.

Record locks vanish when *any* descriptor of the file is closed in the process, so this module opens the file once
per process and never closes it while the process holds a lock.  They also do not exclude their own process: a row
whose pid and start time are mine is neither dead nor free.  Taking a row is therefore guarded by a second byte, locked
through the open file description (OFD), which excludes sub-interpreters too (each opens the file for itself), and by
`_guards`, which excludes the threads and signal handlers of one interpreter, since they share a descriptor.

Bytes of the lock file: 0 the coordinator; 1 its guard; then a row byte and a guard byte for each worker row.

Writers.  A row's words: its owner; the generation also the reaper, which holds the row's lock while it writes.
Stale reads.  Liveness is asked of the kernel (F_GETLK), never concluded from words alone.
If a process dies.  Its lock is gone, its words stay: pid and start time name the dead process; the slot words
    say what it held.
Fork.  A child holds none of its parent's record locks, but shares the descriptor and thereby the OFD locks: it
    opens the file anew (`_descriptor` compares the pid).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shmpool import access
from shmpool.clock import monotonic
from shmpool.errors import (
    SegmentMismatchError,
    SegmentMissingError,
    SegmentRetiredError,
    TableFullError,
)
from shmpool.layout import SLOT_WORDS, WORKERS
from shmpool.names import Names
from shmpool.segment import Segment
from shmpool.states import SegmentState, ServerKind
from shmpool.words import FIELDS_MASK, ORPHAN

COORDINATOR_BYTE: Final = 0
_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid on 64-bit Linux

_open_files: dict[Path, tuple[int, int, int]] = {}  # path -> descriptor, inode, pid that opened it
_guards: dict[tuple[int, int, int], object] = {}  # pid, descriptor, guard byte -> who holds it in this interpreter


class Process(NamedTuple):
    """What names a process: pid and start time, meaningful within one pid namespace."""

    pid: int
    start: int
    namespace: int

    @classmethod
    def current(cls) -> Process:
        """Return this process."""
        return cls(os.getpid(), start_time(os.getpid()) or 0, os.stat("/proc/self/ns/pid").st_ino)

    def visibly_lives(self) -> bool:
        """Whether the process is seen alive; False where it cannot be seen (another pid namespace)."""
        return (
            self.pid != 0
            and self.namespace == os.stat("/proc/self/ns/pid").st_ino
            and start_time(self.pid) == self.start
        )


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it is gone or only a zombie."""
    fields = _read_stat(pid)
    return None if fields is None else int(fields[19])


def parent_of(pid: int) -> int | None:
    """Return the pid of a process's parent; None if the process is gone or only a zombie."""
    fields = _read_stat(pid)
    return None if fields is None else int(fields[1])


def _read_stat(pid: int) -> list[bytes] | None:
    """Return what /proc tells of a living process, from its state on (proc_pid_stat(5): field 3)."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else fields


def create_lock_file(names: Names, *, mode: int = 0o600, gid: int = -1) -> int:
    """Make the lock file if there is none, and return its inode (coordinator only)."""
    with contextlib.suppress(FileExistsError):
        fd = os.open(names.lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _remember(names.lock, fd)
        if gid >= 0:
            os.fchown(fd, -1, gid)
        os.fchmod(fd, mode)
    _descriptor(names)
    return _open_files[names.lock][1]


def _remember(path: Path, fd: int) -> None:
    _open_files[path] = (fd, os.fstat(fd).st_ino, os.getpid())


def _descriptor(names: Names, inode: int | None = None) -> int:
    """Return this process's one descriptor of the lock file.

    Raises:
        SegmentMissingError: there is no lock file.
        SegmentMismatchError: it is not the one that the segment names, or not the user's.
    """
    known = _open_files.get(names.lock)
    if known is not None and known[2] == os.getpid():
        try:
            current = os.stat(names.lock).st_ino
        except FileNotFoundError:
            current = None
        if inode == known[1] or (inode is None and current == known[1]):
            return known[0]
        if current == known[1]:  # not to be opened again: closing it would drop our locks
            raise _replaced(names, known[1], names.uid, inode)
    try:
        fd = os.open(names.lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SegmentMissingError(f"pool {names.pool!r}: no lock file {names.lock}") from None
    except OSError as error:
        raise access.refusal(f"lock file {names.lock}", names.lock, error.strerror) from None
    info = os.fstat(fd)
    try:
        access.check(f"lock file {names.lock}", info, names.uid)
        if inode is not None and info.st_ino != inode:
            raise _replaced(names, info.st_ino, info.st_uid, inode)
    except SegmentMismatchError:
        os.close(fd)  # another file than any that holds our locks, else it had been returned above
        raise
    _remember(names.lock, fd)
    return fd


def _replaced(names: Names, found: int, uid: int, expected: int | None) -> SegmentMismatchError:
    return SegmentMismatchError(
        f"lock file {names.lock}: inode {found} of uid {uid}, expected inode {expected} of uid {names.uid}; "
        "it was replaced: stop everything and start the coordinator again"
    )


def _record(fd: int, command: int, kind: int, byte: int, length: int = 1) -> tuple[int, int, int, int, int]:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, length, 0)
    answer = fcntl.fcntl(fd, command, request)
    return _FLOCK.unpack(answer)


def _try_lock(fd: int, command: int, byte: int) -> bool:
    try:
        _record(fd, command, fcntl.F_WRLCK, byte)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _row_byte(row: int) -> int:
    return 2 + 2 * row


class Locks:
    """The lock file of one pool, as this process sees it."""

    def __init__(self, names: Names, inode: int | None = None) -> None:
        self.names = names
        self.inode = inode
        _descriptor(names, inode)

    @property
    def _fd(self) -> int:
        return _descriptor(self.names, self.inode)

    def is_in_place(self) -> bool:
        """Whether the name still leads to the file that holds the locks."""
        try:
            return os.stat(self.names.lock).st_ino == self.inode
        except FileNotFoundError:
            return False

    def try_coordinator(self) -> bool:
        """Become the coordinator of the pool, unless one lives (in this process or another)."""
        fd, mine = self._fd, object()
        key = (os.getpid(), fd, COORDINATOR_BYTE + 1)
        if _guards.setdefault(key, mine) is not mine:
            return False
        if _try_lock(fd, fcntl.F_OFD_SETLK, COORDINATOR_BYTE + 1):
            if _try_lock(fd, fcntl.F_SETLK, COORDINATOR_BYTE):
                return True  # both bytes stay locked while the coordinator lives
            _record(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, COORDINATOR_BYTE + 1)
        del _guards[key]
        return False

    def release_coordinator(self) -> None:
        """Stop being the coordinator."""
        fd = self._fd
        _record(fd, fcntl.F_SETLK, fcntl.F_UNLCK, COORDINATOR_BYTE)
        _record(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, COORDINATOR_BYTE + 1)
        _guards.pop((os.getpid(), fd, COORDINATOR_BYTE + 1), None)

    def coordinator_pid(self) -> int | None:
        """Return the pid that holds the coordinator's lock (0 where it cannot be seen), None if nobody does.

        A coordinator in this very process is not seen.
        """
        return self._holder(COORDINATOR_BYTE, 1)

    def holder(self, row: int) -> int | None:
        """Return the pid that holds a row's lock (0 where it cannot be seen), None if nobody else does."""
        return self._holder(_row_byte(row), 1)

    def any_row_held(self, rows: int) -> bool:
        """Whether any other process holds, or is just taking, a row."""
        return self._holder(_row_byte(0), 2 * rows) is not None

    def worker_pid(self) -> int | None:
        """Return the pid of some other process that holds, or is just taking, a row (0: cannot be seen), or None."""
        return self._holder(_row_byte(0), 0)

    def _holder(self, byte: int, length: int) -> int | None:
        kind, _, _, _, pid = _record(self._fd, fcntl.F_GETLK, fcntl.F_WRLCK, byte, length)
        return None if kind == fcntl.F_UNLCK else max(pid, 0)

    def try_row(self, row: int) -> bool:
        """Lock a row's byte for this process, without waiting."""
        return _try_lock(self._fd, fcntl.F_SETLK, _row_byte(row))

    def unlock_row(self, row: int) -> None:
        """Give a row's byte back."""
        _record(self._fd, fcntl.F_SETLK, fcntl.F_UNLCK, _row_byte(row))

    @contextlib.contextmanager
    def guard(self, row: int) -> Iterator[bool]:
        """Hold a row's guard byte, without waiting; yields whether it was free."""
        fd, byte, mine = self._fd, _row_byte(row) + 1, object()
        key = (os.getpid(), fd, byte)
        try:
            yield _guards.setdefault(key, mine) is mine and _try_lock(fd, fcntl.F_OFD_SETLK, byte)
        finally:
            if _guards.get(key) is mine:
                _record(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
                del _guards[key]


def coordinator_pid(names: Names) -> int | None:
    """Return the pid of the pool's coordinator as `Locks.coordinator_pid` does; None also if there is no lock file."""
    try:
        return Locks(names).coordinator_pid()
    except SegmentMissingError:
        return None


class Server(NamedTuple):
    """The application server that a process works for."""

    kind: ServerKind
    pid: int  # of its master
    generation: int  # which start or reload of it


NO_SERVER: Final = Server(ServerKind.NONE, 0, 0)


class Row(NamedTuple):
    """A worker row that this process owns, and what its slot words said when it was taken."""

    number: int
    generation: int
    free: tuple[int, ...]  # slot numbers (of all workers' slots) that were FREE
    away: tuple[int, ...]  # those that were orphans: the coordinator's until they are FREE


def owner_of(segment: Segment, row: int) -> Process:
    """Return the process that a row's words name."""
    at = segment.layout.at(WORKERS, row)
    words = segment.words
    return Process(
        pid=words[at + WORKERS.column("pid")],
        start=words[at + WORKERS.column("start")],
        namespace=words[at + WORKERS.column("pid_namespace")],
    )


def _candidates(segment: Segment) -> list[int]:
    """Return rows without live slot words, most FREE first."""
    per_row = segment.layout.slots_per_worker
    start, end = segment.layout.span(SLOT_WORDS)
    words = segment.words[start:end].tolist()
    ranked = []
    for row in range(segment.layout.workers):
        own = words[row * per_row : (row + 1) * per_row]
        orphans = sum(word & ORPHAN for word in own)
        if all(word & ORPHAN or not word & FIELDS_MASK for word in own) and orphans < per_row:
            ranked.append((orphans, row))
    return [row for _, row in sorted(ranked)]


def take_row(segment: Segment, locks: Locks, *, server: Server = NO_SERVER) -> Row:
    """Become the owner of a row (PROTOCOL: take row).  Slot words are not touched.

    Raises:
        TableFullError: no row is free.
        SegmentRetiredError: the segment takes nobody in any more.
    """
    me = Process.current()
    for row in _candidates(segment):
        taken = _try_take(segment, locks, row, me, server)
        if taken is None:
            continue
        if segment.state is not SegmentState.OPEN:
            leave_row(segment, locks, taken)
            raise SegmentRetiredError(f"segment {segment.names.segment} is {segment.state.name}")
        return taken
    raise TableFullError(
        f"pool {segment.names.pool!r}: all {segment.layout.workers} worker rows are taken; raise [limits] workers "
        "and restart the coordinator, or see `shmpool status` for who holds them"
    )


def _try_take(segment: Segment, locks: Locks, row: int, me: Process, server: Server) -> Row | None:
    """Become a row's owner unless it has one; an exception in here leaves the row as free as it was."""
    if _is_owner(segment, row, me):
        return None
    taken = None
    with locks.guard(row) as guarded:
        if not guarded or _is_owner(segment, row, me):
            return None
        try:
            if locks.try_row(row):
                taken = _enter(segment, row, me, server)
        finally:
            if taken is None:
                if _is_owner(segment, row, me):
                    segment.words[segment.layout.at(WORKERS, row, "pid")] = 0
                locks.unlock_row(row)
    return taken


def _is_owner(segment: Segment, row: int, me: Process) -> bool:
    return owner_of(segment, row) == me


def _enter(segment: Segment, row: int, me: Process, server: Server) -> Row | None:
    """Write the owner into a locked row, unless one of its words is neither FREE nor an orphan's."""
    shape, words = segment.layout, segment.words
    free, away = [], []
    for number in range(row * shape.slots_per_worker, (row + 1) * shape.slots_per_worker):
        word = words[shape.at(SLOT_WORDS, number)]  # read once: a second read may see the coordinator's store
        if word & ORPHAN:
            away.append(number)
        elif word & FIELDS_MASK:
            return None
        else:
            free.append(number)
    at = shape.at(WORKERS, row)
    generation = words[at + WORKERS.column("generation")] + 1
    words[at + WORKERS.column("generation")] = generation
    words[at + WORKERS.column("start")] = me.start
    words[at + WORKERS.column("pid_namespace")] = me.namespace
    words[at + WORKERS.column("server_generation")] = server.generation
    words[at + WORKERS.column("server")] = server.kind
    words[at + WORKERS.column("server_pid")] = server.pid
    words[at + WORKERS.column("uid")] = os.geteuid()
    segment.times[at + WORKERS.column("attached_at")] = monotonic()
    words[at + WORKERS.column("pid")] = me.pid
    return Row(row, generation, tuple(free), tuple(away))


def leave_row(segment: Segment, locks: Locks, row: Row) -> bool:
    """Give a row back if none of its slots holds anything; return whether it was given back.

    A row that still holds something stays this process's until it ends.
    """
    shape, words = segment.layout, segment.words
    start = shape.at(SLOT_WORDS, row.number * shape.slots_per_worker)
    held = [w for w in words[start : start + shape.slots_per_worker] if w & FIELDS_MASK and not w & ORPHAN]
    if held or words[shape.at(WORKERS, row.number, "generation")] != row.generation:
        return False
    words[shape.at(WORKERS, row.number, "pid")] = 0
    locks.unlock_row(row.number)
    return True
