"""Permits and bells: the POSIX semaphores of a pool.  With segment.py's file handling, the only posix_ipc here.

A permit semaphore counts permits that nobody holds.  A bell wakes and carries no right: it may be rung too often or
consumed for nothing, and whoever sleeps on one looks again after a slice.

posix_ipc facts that the callers rely on: `acquire(0)` is sem_trywait and raises BusyError; a longer timeout is
turned into an absolute wall-clock deadline, so nobody sleeps longer than SLICE_S at a time; the GIL is released
around both; unlink before close.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from posix_ipc import (
    O_CREX,
    BusyError,
    ExistentialError,
    Semaphore,
    SignalError,
    unlink_semaphore,
)

from shmpool.errors import SegmentMismatchError
from shmpool.names import SHM_DIR

SLICE_S: Final = 0.05

__all__ = [
    "SLICE_S",
    "BusyError",
    "ExistentialError",
    "Semaphore",
    "SignalError",
    "create",
    "inode_of",
    "open_existing",
    "ring",
    "ring_anyway",
    "sleep_on",
    "unlink",
]


def create(name: str, *, mode: int, gid: int = -1) -> Semaphore:
    """Make a new semaphore with value 0 (coordinator only).

    Raises:
        ExistentialError: the name is taken.
    """
    old = os.umask(0)
    try:
        semaphore = Semaphore(name, O_CREX, mode=mode, initial_value=0)
    finally:
        os.umask(old)
    if gid >= 0:
        os.chown(SHM_DIR / f"sem.{name[1:]}", -1, gid)
    return semaphore


def inode_of(name: str) -> int:
    """Return the inode that a semaphore's name leads to, 0 if there is none."""
    try:
        return os.stat(SHM_DIR / f"sem.{name[1:]}").st_ino
    except FileNotFoundError:
        return 0


def open_existing(name: str, inode: int) -> Semaphore:
    """Open a semaphore and check that it is the one that the segment means.

    Raises:
        SegmentMismatchError: it is gone, or it was removed and made again.
    """
    try:
        semaphore = Semaphore(name)
    except ExistentialError:
        raise SegmentMismatchError(
            f"semaphore {name}: gone, though the segment names it; something cleans /dev/shm "
            "(systemd's RemoveIPC?); restart the coordinator"
        ) from None
    found = inode_of(name)
    if found != inode:
        semaphore.close()
        raise SegmentMismatchError(
            f"semaphore {name}: inode {found}, expected {inode}; it was removed and made again: "
            "restart the coordinator and the workers"
        )
    return semaphore


def ring(bell: Semaphore) -> None:
    """Wake one sleeper, unless a ring is waiting to be taken already."""
    if bell.value == 0:
        bell.release()


def ring_anyway(bell: Semaphore) -> None:
    """Wake one sleeper without looking (coordinator: a killed poster may have left a ring without its wake)."""
    bell.release()


def sleep_on(bell: Semaphore, seconds: float) -> bool:
    """Sleep until the bell rings, for one slice at most; return whether a ring was taken.

    Signal handlers run, and may raise, before this returns.
    """
    try:
        bell.acquire(max(0.0, min(seconds, SLICE_S)))
    except (BusyError, SignalError):
        return False
    return True


def unlink(name: str) -> None:
    """Remove a semaphore's name; whoever has it open keeps it.  No error if it is gone."""
    with contextlib.suppress(ExistentialError):
        unlink_semaphore(name)
