"""Start a coordinator for a pool, as a program of its own.

The coordinator is never imported: it runs in its own process session, with no inherited descriptor, and outlives
whoever started it.  Whether it came up is read from the lock file and the segment, never from an exit status: an
application server's master reaps every child, and may take that status first.

Processes.  Any number may start one at the same time: the pool's lock lets one through, all find it serving.
Fork.  Nothing is kept; at-fork handlers do not run.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from shmpool.endpoints import heartbeat_age
from shmpool.errors import MechanismError, SegmentMissingError
from shmpool.names import Names
from shmpool.rows import Locks
from shmpool.segment import attach
from shmpool.states import SegmentState

CONFIG_VARIABLE: Final = "SHMPOOL_CONFIG"
DEFAULT_LINGER: Final = "30s"  # the configuration's own default
START_S: Final = 10.0
JITTER_S: Final = 0.2  # all workers of a host find out at the same moment
AGAIN_AFTER_S: Final = 5.0  # after a try on demand that failed
AGAIN_AFTER_SUCCESS_S: Final = 1.0  # after one that succeeded: the coordinator ended again at once
FRESH_S: Final = 1.0  # a heartbeat older than this is a predecessor's
_POLL_S: Final = 0.02

_not_before: dict[tuple[int, Names], float] = {}  # next try on demand, monotonic; by process, as a fork copies it
_starts: dict[tuple[int, Names], _Start] = {}


class LaunchError(MechanismError):
    """No coordinator came up; the message says why."""


def ensure_coordinator(
    config: str | None = None,
    *,
    uid: int | None = None,
    gid: int | None = None,
    linger: str | None = None,
    within: float = START_S,
) -> None:
    """Return when a coordinator serves the pool; start one if none lives.

    Args:
        config: its configuration file; default: environment variable SHMPOOL_CONFIG.
        uid, gid: whom the pool belongs to; the program runs as that user if the caller is root.  Default: the caller.
        linger: how long after the last worker it ends, such as "30s"; default: what the file says.
        within: seconds to wait for it.

    Raises:
        LaunchError: the file cannot be read, or no coordinator served in time.
        ValueError: the pool's name is not allowed.
    """
    file, raw = _read(config)
    names = _names(raw, uid)
    is_other_user = names.uid != os.geteuid()
    if serving_pid(names) is not None:
        return
    chosen = linger or str(raw.get("coordinator", {}).get("linger", DEFAULT_LINGER))
    as_user = _as_user(uid, gid) if is_other_user and uid is not None else {}
    deadline = time.monotonic() + within
    with tempfile.TemporaryFile() as said, _program(file, chosen, said, as_user) as program:
        while serving_pid(names, is_fresh=True) is None:
            has_ended = program.poll() is not None
            if (has_ended and _lock_holder(names) is None) or time.monotonic() >= deadline:
                said.seek(0)
                told = said.read().decode(errors="replace").strip()
                why = told or ("it ended without a word" if has_ended else f"not ready within {within:g} s")
                raise LaunchError(f"pool {names.pool!r}: no coordinator could be started with {file}: {why}")
            time.sleep(_POLL_S)


def names_in(config: str, *, uid: int | None = None) -> Names:
    """Return the names of the pool of a configuration file; `uid` as for `ensure_coordinator`.

    Raises:
        LaunchError: the file cannot be read.
        ValueError: the pool's name is not allowed.
    """
    return _names(_read(config)[1], uid)


def _names(raw: dict[str, Any], uid: int | None) -> Names:
    is_other_user = os.geteuid() == 0 and bool(uid)
    return Names.of(str(raw.get("name", "")), uid if is_other_user else None)


def start_on_demand(names: Names, config: str | None = None) -> bool:
    """Start a coordinator for a worker that found none; return whether one serves now.  Blocks until it does.

    Done where a file of the pool is known (SHMPOOL_CONFIG, or `config`) that does not say `autostart = false`, and
    not again for a while after a try: one that cannot start must not cost every request its time.

    Raises:
        LaunchError: it could not be started.
    """
    file = _wanted_file(names, config)
    if file is None or not _may_try(names):
        return False
    key = (os.getpid(), names)
    _not_before[key] = time.monotonic() + AGAIN_AFTER_S
    time.sleep(random.uniform(0, JITTER_S))
    for is_last in (False, True):
        try:
            ensure_coordinator(file, uid=names.uid)
            break
        except LaunchError:
            if is_last:  # else it may have met one that was just ending
                raise
    _not_before[key] = time.monotonic() + AGAIN_AFTER_SUCCESS_S
    return serving_pid(names) is not None


def begin_on_demand(names: Names, config: str | None = None) -> bool:
    """Do as `start_on_demand` in a thread; return at once whether one is being started, or will be in a moment.

    Raises:
        LaunchError: that was tried a moment ago, and failed.
    """
    key = (os.getpid(), names)
    start = _starts.get(key)
    if start is not None and start.is_alive():
        return True
    if start is not None and start.error is not None and not _may_try(names):
        raise start.error
    if _wanted_file(names, config) is None:
        return False
    if not _may_try(names):
        return True
    start = _Start(names, config)
    if _starts.setdefault(key, start) is not start:
        _starts[key] = start
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, or out of threads
        start.start()
        return True
    return False


class _Start(threading.Thread):
    """A try to start a coordinator; `error` tells why it failed, once the thread is over."""

    def __init__(self, names: Names, config: str | None) -> None:
        super().__init__(name=f"shmpool-launch-{names.pool}", daemon=True)
        self._names = names
        self._config = config
        self.error: LaunchError | None = None

    def run(self) -> None:
        try:
            start_on_demand(self._names, self._config)
        except LaunchError as error:
            self.error = error
        except (MechanismError, OSError, ValueError) as error:
            self.error = LaunchError(str(error))


def _may_try(names: Names) -> bool:
    return time.monotonic() >= _not_before.get((os.getpid(), names), 0.0)


def _wanted_file(names: Names, config: str | None) -> str | None:
    """Return the configuration file to start a coordinator with; None where that is not wanted."""
    if os.geteuid() != 0 and names.uid != os.geteuid():
        return None
    for file in (os.environ.get(CONFIG_VARIABLE), config):
        if file:
            _, raw = _read(file)
            if raw.get("name") == names.pool:
                return file if raw.get("coordinator", {}).get("autostart", True) is True else None
    return None


def serving_pid(names: Names, *, is_fresh: bool = False) -> int | None:
    """Return the pid of the coordinator (0 where it cannot be seen) of an open pool; None if there is none.

    Args:
        is_fresh: its heartbeat must be, too (it has ticked since it took over).
    """
    pid = _lock_holder(names)
    if pid is None:
        return None
    try:
        segment = attach(names)
    except MechanismError:
        return None
    try:
        is_serving = segment.state is SegmentState.OPEN and (not is_fresh or heartbeat_age(segment) < FRESH_S)
    finally:
        segment.release()
    return pid if is_serving else None


def _lock_holder(names: Names) -> int | None:
    try:
        return Locks(names).coordinator_pid()
    except SegmentMissingError:
        return None


def _read(config: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the file's absolute path and what is in it, unchecked: that is the coordinator's business."""
    name = config or os.environ.get(CONFIG_VARIABLE, "")
    if not name:
        raise LaunchError(f"found no configuration file, expected one as argument or in {CONFIG_VARIABLE}")
    file = Path(name).absolute()
    try:
        return file, tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise LaunchError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LaunchError(f"{file}: is not valid TOML: {error}") from None


@contextlib.contextmanager
def _program(file: Path, linger: str, said: IO[bytes], as_user: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program that brings the coordinator to the background and ends; it is not left as a zombie."""
    # -P: a module in the current directory must not take the place of one of ours.
    command = [_python(), "-P", "-m", "shmpool_coordinator", "run", "--config", str(file)]
    program = subprocess.Popen(
        [*command, "--detach", "--linger", linger],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,
        **as_user,
    )
    try:
        yield program
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(FRESH_S)
    finally:
        if program.poll() is None:
            program.kill()
            program.wait()


def _python() -> str:
    """Return the interpreter: where Python is embedded (uWSGI, mod_wsgi) `sys.executable` is something else."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    inside = Path(sys.prefix, "bin", "python3")
    return str(inside) if inside.exists() else shutil.which("python3") or "python3"


def _as_user(uid: int, gid: int | None) -> dict[str, Any]:
    """Return how to run a program as another user: with that user's groups instead of root's."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        group = uid if gid is None else gid
        return {"user": uid, "group": group, "extra_groups": [group]}
    group = user.pw_gid if gid is None else gid
    return {"user": uid, "group": group, "extra_groups": os.getgrouplist(user.pw_name, group)}
