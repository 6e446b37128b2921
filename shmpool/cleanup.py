"""Remove what a pool left behind: segment, lock file, socket, semaphores of any token.

Only when nobody lives: no process holds a byte of the lock file (the kernel is asked), and none that the segment
names is seen alive.  Works on garbage too: what cannot be read cannot say that somebody lives, and goes.

Guarantees: while anything is removed, the coordinator's lock is held and the segment is RETIRED, so that neither a
    coordinator nor a worker comes in between.  Nothing is removed as long as `obstacles` finds something.
If a process dies.  What is left can be cleaned up again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shmpool.errors import MechanismError
from shmpool.names import SHM_DIR, Names
from shmpool.rows import Locks, Process, create_lock_file, owner_of
from shmpool.segment import Segment, attach
from shmpool.states import SegmentState

_LEFT: Final = r"(?:sem\.)?shmpool\.{uid}\.([a-z0-9][a-z0-9_-]*)(?:\.lock|\.sock|\.[0-9a-f]{{16}}\.[gebw][0-9]+)?"


class Remains(NamedTuple):
    """What a pool has in the file system, and what speaks against removing it."""

    names: Names
    paths: tuple[Path, ...]
    obstacles: tuple[str, ...]


def pools_with_remains(uid: int) -> list[str]:
    """Return the names of a user's pools of which anything is left, with a segment or without."""
    named = re.compile(_LEFT.format(uid=uid))
    return sorted({match[1] for entry in os.listdir(SHM_DIR) if (match := named.fullmatch(entry))})


def look(names: Names) -> Remains:
    """Return what is there; changes nothing."""
    with _opened(names) as segment:
        return Remains(names, tuple(names.leftovers()), tuple(_obstacles(names, segment, _locks(names))))


def remove(names: Names) -> Remains:
    """Remove everything unless somebody lives; return what is left and why.

    Raises:
        OSError: a name cannot be removed; what went before is gone.
    """
    paths = names.leftovers()
    if not paths:
        return Remains(names, (), ())
    made_lock = names.lock not in paths
    if made_lock:  # for as long as this takes, nobody else may be the coordinator
        create_lock_file(names)
    locks = _locks(names)
    with _opened(names) as segment:
        obstacles = _obstacles(names, segment, locks)
        if not obstacles and locks is not None and not (locks.try_coordinator() and locks.is_in_place()):
            obstacles = ["a coordinator is just starting or ending"]
        if not obstacles:
            obstacles = _closed(names, segment, locks)
            if obstacles and locks is not None:
                locks.release_coordinator()
    if obstacles:
        if made_lock:
            names.lock.unlink(missing_ok=True)
        return Remains(names, tuple(names.leftovers()), tuple(obstacles))
    for path in names.leftovers():
        if path != names.lock:
            path.unlink(missing_ok=True)
    names.lock.unlink(missing_ok=True)  # last: a newcomer may start once it is gone
    if locks is not None:
        locks.release_coordinator()
    return Remains(names, tuple(names.leftovers()), ())


def _closed(names: Names, segment: Segment | None, locks: Locks | None) -> list[str]:
    """Take nobody in any more, and look again for somebody who came in before; if so, take them in again."""
    if segment is None:
        return _obstacles(names, None, locks)
    before = segment.state
    segment.set_header("state", SegmentState.RETIRED)
    obstacles = _obstacles(names, segment, locks)
    if obstacles:
        segment.set_header("state", before)
    return obstacles


@contextlib.contextmanager
def _opened(names: Names) -> Iterator[Segment | None]:
    """Map the segment while it is looked at; None: there is none, or it is garbage."""
    try:
        segment = attach(names, to_repair=True)
    except (MechanismError, OSError, ValueError):
        yield None
        return
    try:
        yield segment
    finally:
        segment.release()


def _locks(names: Names) -> Locks | None:
    """Return the lock file's locks; None: there is no lock file that anybody could lock."""
    try:
        return Locks(names, os.stat(names.lock, follow_symlinks=False).st_ino)
    except (MechanismError, OSError):
        return None


def _obstacles(names: Names, segment: Segment | None, locks: Locks | None) -> list[str]:
    """Say who lives: holders of the locks, then processes that the segment names."""
    found = []
    if locks is not None:
        pid = locks.coordinator_pid()
        if pid is not None:
            found.append(f"its coordinator runs ({_who(pid)}): stop it first, shmpool-coordinator stop {names.pool}")
        pid = locks.worker_pid()
        if pid is not None and not found:
            found.append(f"a worker still uses it ({_who(pid)}): stop that first")
    if segment is not None and not found:
        found += [
            f"worker row {row} is of a process that lives ({_who(owner.pid)}): stop that first"
            for row in range(segment.layout.workers)
            if (owner := owner_of(segment, row)).visibly_lives() and owner != Process.current()
        ]
    return found


def _who(pid: int) -> str:
    return f"pid {pid}" if pid > 0 else "a process that cannot be seen from here"
