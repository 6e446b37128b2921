"""Permits and bells: the POSIX semaphores of a pool.  With segment.py's file handling, the only posix_ipc here.

A permit semaphore counts permits that nobody holds.  A bell wakes and carries no right: it may be rung too often or
consumed for nothing, and whoever sleeps on one looks again after a slice.

posix_ipc facts that the callers rely on: `acquire(0)` is sem_trywait and raises BusyError; a longer timeout is
turned into an absolute wall-clock deadline, so nobody sleeps longer than SLICE_S at a time; the GIL is released
around both; unlink before close.

A semaphore is a file of the C library.  glibc calls it /dev/shm/sem.NAME, musl /dev/shm/NAME; both have 32 bytes, and
with different meanings, so that a post of the one does not wake a sleeper of the other.  Only glibc's are used.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from posix_ipc import (
    O_CREX,
    BusyError,
    ExistentialError,
    PermissionsError,
    Semaphore,
    SignalError,
    unlink_semaphore,
)

from shmpool import access
from shmpool.errors import SegmentMismatchError
from shmpool.names import ROOM_CURE, SHM_DIR, uid_in

SLICE_S: Final = 0.05
LIBC_CURE: Final = (
    "this process's C library is not glibc (Alpine's is musl): run the coordinator and all workers in images with glibc"
)

__all__ = [
    "SLICE_S",
    "BusyError",
    "ExistentialError",
    "Semaphore",
    "SignalError",
    "check",
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
        OSError: no room in the shared-memory file system.
        SegmentMismatchError: the C library keeps semaphores where nobody would look for them.
    """
    old = os.umask(0)
    try:
        semaphore = Semaphore(name, O_CREX, mode=mode, initial_value=0)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            told = f"no page or no inode is left for a semaphore; {ROOM_CURE}"
            raise OSError(error.errno, told, str(SHM_DIR / f"sem.{name[1:]}")) from None
        raise
    finally:
        os.umask(old)
    if not inode_of(name):
        unlink(name)
        semaphore.close()
        raise SegmentMismatchError(f"semaphore {name}: made, but not as {SHM_DIR}/sem.{name[1:]}; {LIBC_CURE}")
    if gid >= 0:
        os.chown(SHM_DIR / f"sem.{name[1:]}", -1, gid)
    return semaphore


def inode_of(name: str) -> int:
    """Return the inode that a semaphore's name leads to, 0 if there is none."""
    info = _info_of(name)
    return 0 if info is None else info.st_ino


def _info_of(name: str) -> os.stat_result | None:
    try:
        return os.stat(SHM_DIR / f"sem.{name[1:]}")
    except FileNotFoundError:
        return None


def open_existing(name: str, inode: int) -> Semaphore:
    """Open a semaphore and check that it is the one that the segment means, and its owner's or group's alone.

    Raises:
        SegmentMismatchError: it is gone, it was removed and made again, or owner or mode are wrong.
    """
    try:
        semaphore = Semaphore(name)
    except ExistentialError:
        if inode_of(name) == inode:
            raise SegmentMismatchError(
                f"semaphore {name}: there as {SHM_DIR}/sem.{name[1:]}, but not found under its name; {LIBC_CURE}"
            ) from None
        raise SegmentMismatchError(
            f"semaphore {name}: gone, though the segment names it; something cleans /dev/shm "
            "(systemd's RemoveIPC?); restart the coordinator"
        ) from None
    except PermissionsError:
        raise access.refusal(f"semaphore {name}", SHM_DIR / f"sem.{name[1:]}", "Permission denied") from None
    try:
        check(name, inode)
    except SegmentMismatchError:
        semaphore.close()
        raise
    return semaphore


def check(name: str, inode: int) -> None:
    """Refuse a semaphore that is another one than the segment means, another user's, or open to everybody.

    Raises:
        SegmentMismatchError: says what is wrong with it.
    """
    info = _info_of(name)
    if info is None or info.st_ino != inode:
        raise SegmentMismatchError(
            f"semaphore {name}: inode {0 if info is None else info.st_ino}, expected {inode}; it was removed and made "
            "again: restart the coordinator and the workers"
        )
    access.check(f"semaphore {name}", info, uid_in(name))


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
