"""Look at a pool from outside: attach, copy, let go.

Works with the coordinator dead or stopped, and on a retired segment.  Disturbs nobody: no record lock is
taken (F_GETLK asks), no word is stored, no semaphore is acquired or posted.  The lock file is opened once per
process and stays open (rows.py).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Final

from shmpool.errors import MechanismError, SegmentMismatchError
from shmpool.judgement import judge, missing
from shmpool.layout import GROUPS, PERMITS
from shmpool.names import SHM_DIR, Names
from shmpool.rows import Locks, Process, owner_of
from shmpool.segment import Segment, attach
from shmpool.semaphores import Semaphore, check, inode_of, open_existing
from shmpool.status import Facts, LostName, Report
from shmpool.views import PoolView, read_pool

READ_TRIES: Final = 3  # what looks wrong, or was torn by load, is looked at again


def pools_of(uid: int) -> list[str]:
    """Return the names of a user's pools that have a segment now."""
    named = re.compile(rf"shmpool\.{uid}\.([a-z0-9][a-z0-9_-]*)")
    return sorted(match[1] for entry in os.listdir(SHM_DIR) if (match := named.fullmatch(entry)))


def observe(names: Names) -> Report:
    """Return the report on a pool; what is missing or broken is a finding in it, never an exception."""
    try:
        with _attached(names) as segment:
            return _report(segment)
    except MechanismError as error:
        return missing(names.pool, str(error))


@contextlib.contextmanager
def _attached(names: Names) -> Iterator[Segment]:
    segment = attach(names)
    try:
        yield segment
    except (ValueError, IndexError) as error:  # a code that does not exist
        raise SegmentMismatchError(
            f"segment {names.segment}: somebody wrote over it ({error}); restart the coordinator"
        ) from None
    finally:
        segment.release()


def _report(segment: Segment) -> Report:
    with _semaphores(segment) as (semaphores, lost):
        locks, lost_lock = _locks(segment)
        if not segment.is_in_place():
            lost.append(LostName(str(segment.names.segment), segment.inode, 0))
        lost += lost_lock

        def is_held(row: int) -> bool:
            assert locks is not None
            return locks.holder(row) is not None or owner_of(segment, row) == Process.current()

        for attempt in range(READ_TRIES):
            view = read_pool(
                segment,
                lambda: [s.value if s is not None else None for s in semaphores],
                is_held if locks is not None else None,
            )
            facts = Facts(_coordinator(segment, locks), tuple(lost), _alive_without_lock(segment, view))
            report = judge(view, facts)
            if (view.is_clean and not report.violations) or attempt == READ_TRIES - 1:
                break
    return report


@contextlib.contextmanager
def _semaphores(segment: Segment) -> Iterator[tuple[list[Semaphore | None], list[LostName]]]:
    """Open the permit semaphores, by row; None where the row is not in use or the name leads elsewhere."""
    names, shape, words = segment.names, segment.layout, segment.words
    opened: list[Semaphore | None] = []
    lost: list[LostName] = []

    def note(kind: str, index: int, expected: int) -> None:
        path, name = names.semaphore_path(segment.token, kind, index), names.semaphore(segment.token, kind, index)
        found = inode_of(name)
        if found != expected:
            lost.append(LostName(str(path), expected, found))
            return
        try:
            check(name, expected)
        except SegmentMismatchError as error:
            lost.append(LostName(str(path), expected, found, str(error)))

    with contextlib.ExitStack() as stack:
        for row in range(shape.semaphores):
            kind, index = ("g", row) if row < shape.groups else ("e", row - shape.groups)
            inode = words[shape.at(PERMITS, row, "semaphore_inode")]
            opened.append(None)
            if inode == 0:
                continue
            try:
                semaphore = open_existing(names.semaphore(segment.token, kind, index), inode)
            except (SegmentMismatchError, OSError):
                note(kind, index, inode)
                continue
            stack.callback(semaphore.close)
            opened[row] = semaphore
        for group in range(shape.groups):
            if words[shape.at(GROUPS, group, "in_use")]:
                note("b", group, words[shape.at(GROUPS, group, "bell_inode")])
                note("w", group, words[shape.at(GROUPS, group, "endpoint_bell_inode")])
        yield opened, lost


def _locks(segment: Segment) -> tuple[Locks | None, list[LostName]]:
    expected = segment.header("lock_inode")
    try:
        locks, refusal = Locks(segment.names, expected), ""
        if locks.is_in_place():
            return locks, []
    except (MechanismError, OSError) as error:
        locks, refusal = None, str(error)
    path = segment.names.lock
    found = path.stat().st_ino if path.exists() else 0
    return locks, [LostName(str(path), expected, found, refusal if found == expected else "")]


def _coordinator(segment: Segment, locks: Locks | None) -> int | None:
    """Return who holds the coordinator's lock; where it cannot tell, whom the header names."""
    pid = locks.coordinator_pid() if locks is not None else None
    if pid is not None:
        return pid
    named = Process(
        segment.header("coordinator_pid"),
        segment.header("coordinator_start"),
        segment.header("coordinator_pid_namespace"),
    )
    is_here = named == Process.current()
    return named.pid if is_here or (locks is None and named.visibly_lives()) else None


def _alive_without_lock(segment: Segment, view: PoolView) -> frozenset[int]:
    unlocked = (worker.number for worker in view.workers if worker.is_held is False)
    return frozenset(row for row in unlocked if owner_of(segment, row).visibly_lives())
