"""Whose a pool's names are, and whom they let in.

Everything of a pool belongs to the user whose uid its names carry, and is private (0600) or one group's (0660).  What
differs was put there by somebody else, or changed since: it is refused, and nothing is touched.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from shmpool.errors import SegmentMismatchError

EVERYBODY: Final = 0o007


def check(what: str, info: os.stat_result, uid: int) -> None:
    """Refuse what is not a file of `uid`, or lets everybody in.

    Args:
        what: the thing, with its name.
        info: of the open descriptor, where there is one.

    Raises:
        SegmentMismatchError: what was found, what was expected, what to do.
    """
    if not stat.S_ISREG(info.st_mode):
        raise SegmentMismatchError(f"{what}: not a regular file; remove it")
    if info.st_uid != uid:
        raise SegmentMismatchError(
            f"{what}: belongs to uid {info.st_uid}, expected uid {uid}; remove it as its owner, or as root"
        )
    if info.st_mode & EVERYBODY:
        raise SegmentMismatchError(
            f"{what}: mode {stat.S_IMODE(info.st_mode):04o} lets everybody in, expected 0600 or 0660; "
            "stop the pool, remove it and start again"
        )


def refusal(what: str, path: Path, reason: str | None) -> SegmentMismatchError:
    """Return the error for what the kernel did not let this process open; says whose it is."""
    told = f"{what}: cannot be opened ({reason})"
    try:
        info = os.lstat(path)
    except OSError:
        return SegmentMismatchError(told)
    groups = ", ".join(map(str, sorted({os.getegid(), *os.getgroups()})))
    return SegmentMismatchError(
        f"{told}: mode {stat.S_IMODE(info.st_mode):04o} of uid {info.st_uid} and gid {info.st_gid}, and this process "
        f"is uid {os.geteuid()} with groups {groups}; run it as that user, or let a group of both attach "
        "([access] group)"
    )
