"""The names that a pool has in the file system, and which names are allowed.

Everything of a pool lies in one directory beside each other; the names carry the owner's uid, so that two users
may run pools of one name.  Semaphores also carry the segment's random token: those of another segment are never
opened by mistake.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

SHM_DIR: Final = Path("/dev/shm")  # where glibc keeps POSIX shared memory and semaphores
ROOM_CURE: Final = f"enlarge {SHM_DIR} (`shmpool-coordinator check-config` tells what a pool needs) or lower [limits]"
POOL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")  # short: it is part of application_name (63 bytes)


class Names(NamedTuple):
    """The names of one user's pool."""

    pool: str
    uid: int

    @classmethod
    def of(cls, pool: str, uid: int | None = None) -> Names:
        """Return the names of a pool of `uid` (default: the effective user).

        Raises:
            ValueError: the pool's name is not allowed.
        """
        if not POOL_NAME.fullmatch(pool):
            raise ValueError(
                f"pool name {pool!r}: expected 1 to 32 lower-case letters, digits, '-' or '_', "
                "beginning with a letter or digit"
            )
        return cls(pool, os.geteuid() if uid is None else uid)

    @property
    def stem(self) -> str:
        """What all names share."""
        return f"shmpool.{self.uid}.{self.pool}"

    @property
    def segment(self) -> Path:
        """The shared memory."""
        return SHM_DIR / self.stem

    @property
    def lock(self) -> Path:
        """The file whose bytes are locked: who lives, who owns which row."""
        return SHM_DIR / f"{self.stem}.lock"

    @property
    def socket(self) -> Path:
        """The coordinator's control socket."""
        return SHM_DIR / f"{self.stem}.sock"

    def semaphore(self, token: int, kind: str, index: int) -> str:
        """Return the POSIX name of a semaphore: kind `g`, `e` (permits), `b`, `w` (bells)."""
        return f"/{self.stem}.{token:016x}.{kind}{index}"

    def semaphore_path(self, token: int, kind: str, index: int) -> Path:
        """Return where glibc keeps it."""
        return SHM_DIR / f"sem.{self.semaphore(token, kind, index)[1:]}"

    def leftovers(self) -> list[Path]:
        """Return every name of this pool that exists now, semaphores of any token included."""
        fixed = [self.segment, self.lock, self.socket]
        named = re.compile(rf"sem\.{re.escape(self.stem)}\.[0-9a-f]{{16}}\.[gebw][0-9]+")
        found = [SHM_DIR / entry for entry in os.listdir(SHM_DIR) if named.fullmatch(entry)]
        return [path for path in fixed if os.path.lexists(path)] + sorted(found)


def uid_of(user: str) -> int:
    """Return the uid of a user given by name or number.

    Raises:
        ValueError: there is no such user.
    """
    if user.isascii() and user.isdecimal():
        return int(user)
    import pwd  # here: workers know their own uid

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ValueError(f"found no user {user!r}, expected a user's name or uid") from None


def uid_in(semaphore: str) -> int:
    """Return whose pool a semaphore's name is of."""
    return int(semaphore.split(".")[1])
