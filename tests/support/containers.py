"""Containers as the kernel knows them: a process in pid and mount namespaces of its own, by `unshare`.

What they share is /dev/shm and the network.  All else is read-only, /tmp, /var and /run are empty and their own, and no
capability is left.  The first process of a container is pid 1 in there; when it ends, the kernel kills all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Self

import pytest

from tests.support.waiting import wait_until
from tools.pg_cluster import children_of

ROOT = Path(__file__).parents[2]
FILES = Path("/mnt")  # where a container finds the directory that it was given
EMPTIED = ("/tmp", "/var", "/run")
PYTHON = (sys.executable, "-B", "-m")
END_S = 10.0

# $1: the directory that becomes FILES; $2: what is emptied; $3: options of a /dev/shm of its own, if it gets one.
SET_UP = f"""
set -e
while read -r _ at _; do
  case $at in /proc|/proc/*|/sys|/sys/*|/dev|/dev/*) ;; *) mount -o remount,bind,ro "$at" ;; esac
done < /proc/self/mounts
mount --bind "$1" {FILES}
mount -o remount,bind,ro {FILES}
for each in $2; do mount -t tmpfs -o ro tmpfs "$each"; done
if [ -n "$3" ]; then mount -t tmpfs -o "$3" tmpfs /dev/shm; fi
shift 3
exec "$@"
"""
UNPRIVILEGED = ("setpriv", "--no-new-privs", "--ambient-caps=-all", "--inh-caps=-all", "--bounding-set=-all")


def require_containers(*, has_user_namespaces: bool) -> None:
    """Skip the test where namespaces cannot be made; fail it in CI."""
    problem = _problem(has_user_namespaces)
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


@lru_cache
def _problem(has_user_namespaces: bool) -> str:
    """Say why there can be no container, "" if there can."""
    try:
        made = Container(ROOT / "tests", "true", has_user_namespace=has_user_namespaces, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        return f"no container can be made: {error}"
    _, told = made.process.communicate(timeout=END_S)
    return f"no container can be made: {told.decode().strip()}" if made.process.returncode else ""


class Container:
    """A running container."""

    def __init__(
        self,
        files: Path,
        *command: str,
        has_user_namespace: bool = False,
        shm: str = "",
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        """Start it.

        Args:
            files: a directory that it finds as FILES.
            has_user_namespace: as whoever is not root must have it.
            shm: mount options of a /dev/shm of its own; none: that of the host.
        """
        kinds = ["--mount", "--pid"]
        self._entered = [*kinds]
        if has_user_namespace or os.geteuid() != 0:
            kinds += ["--user", "--map-current-user", "--keep-caps"]
            self._entered += ["--user", "--preserve-credentials"]
        emptied = " ".join(each for each in EMPTIED if not _is_needed(each))
        set_up = ["sh", "-c", SET_UP, "sh", str(files), emptied, shm, *UNPRIVILEGED]
        self.process = subprocess.Popen(
            ["unshare", *kinds, "--mount-proc", "--fork", "--kill-child", *set_up, *command],
            cwd=ROOT,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its first process, as the test sees it."""
        return _child_of(self.process)

    def exec(self, *command: str, **streams: Any) -> subprocess.Popen[bytes]:
        """Run one more process in there, as `docker exec` does."""
        enter = ["nsenter", f"--target={self.pid}", *self._entered, f"--wd={ROOT}"]
        return subprocess.Popen([*enter, "--", *UNPRIVILEGED, *command], **streams)

    def output(self, *command: str) -> tuple[int, str]:
        """Run a command in there; return its exit code and what it printed."""
        process = self.exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed, _ = process.communicate(timeout=END_S)
        return process.returncode, printed.decode()

    def kill(self) -> None:
        """Kill its first process, and thereby all."""
        _kill_child_of(self.process)


class Worker:
    """A process of `tests.support.contained_worker`; the one child of `process`, which brought it into a container."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        finally:
            self.kill()
            self._process.stdout.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do something and return its answer; what it raised is an AssertionError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the worker ended"}')
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        _kill_child_of(self._process)


def _is_needed(directory: str) -> bool:
    """Whether the project or its Python lies in there."""
    return any(Path(place).is_relative_to(directory) for place in (ROOT, sys.prefix, sys.base_prefix))


def _child_of(process: subprocess.Popen[bytes]) -> int:
    wait_until(lambda: children_of(process.pid) or process.poll() is not None, within=END_S)
    (pid,) = children_of(process.pid)
    return pid


def _kill_child_of(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.kill(_child_of(process), signal.SIGKILL)
        process.wait(END_S)
