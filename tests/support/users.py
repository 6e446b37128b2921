"""Processes of other users, run by root.

A user may be unable to reach what the tests run with: an interpreter under /root, a checkout in a private home.  There
such a process gets a mount namespace of its own, in which the directories in the way can be passed through; files,
processes and shared memory are those of everybody.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CHECK = "import psycopg2, shmpool.pool, shmpool_coordinator.cli"


class User(NamedTuple):
    """A user that need not be known to the system."""

    uid: int
    groups: tuple[int, ...] = ()

    def command(self, *command: str) -> list[str]:
        """Return the command that does another one as this user (root has to start it)."""
        groups = ",".join(map(str, (self.uid, *self.groups)))
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", f"--groups={groups}", "--", *command]


class Users:
    """What root needs to run this interpreter and this checkout as anybody."""

    def __init__(self, prefix: list[str]) -> None:
        self._prefix = prefix

    def as_root(self, *command: str) -> list[str]:
        """Return a command whose children may become anybody."""
        return [*self._prefix, *command]

    def python(self, user: User, *arguments: str) -> list[str]:
        """Return the command that runs Python as a user."""
        return self.as_root(*user.command(sys.executable, *arguments))


@pytest.fixture(scope="session")
def users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    """Other users; skips the test where there are none to be had."""
    if os.geteuid() != 0:
        pytest.skip("only root can run programs as other users")
    if shutil.which("setpriv") is None:
        _cannot("setpriv (util-linux) is not installed")
    made = Users(_opening(tmp_path_factory.mktemp("mounts")))
    done = subprocess.run(
        made.python(User(54000), "-c", CHECK), cwd="/", capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode != 0:
        _cannot(f"another user cannot run {sys.executable} with {ROOT}: {done.stderr[-500:]}")
    return made


def _cannot(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _opening(room: Path) -> list[str]:
    """Return how to start a program for which everything needed can be reached; nothing where that is so anyway.

    Args:
        room: an empty directory for mount points.
    """
    needed = sorted({Path(path).resolve() for path in (sys.base_prefix, sys.prefix, ROOT)})
    hidden: dict[Path, list[Path]] = {}
    for tree in needed:
        closed = [parent for parent in tree.parents if not parent.stat().st_mode & stat.S_IXOTH]
        if closed:
            hidden.setdefault(closed[-1], []).append(tree)
    if not hidden:
        return []
    lines = ["set -e", "umask 022"]
    for number, (_, tree) in enumerate((d, t) for d, trees in hidden.items() for t in trees):
        (room / str(number)).mkdir()
        lines.append(f"mount --bind {shlex.quote(str(tree))} {shlex.quote(str(room / str(number)))}")
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(directory))}" for directory in hidden]
    for number, tree in enumerate(tree for trees in hidden.values() for tree in trees):
        lines.append(f"mkdir -p {shlex.quote(str(tree))}")
        lines.append(f"mount --bind {shlex.quote(str(room / str(number)))} {shlex.quote(str(tree))}")
    return ["unshare", "--mount", "sh", "-c", "\n".join([*lines, 'exec "$@"']), "sh"]
