"""Start a coordinator for a pool, as a program of its own: on a file, or on what this process knows (document.py).

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from shmpool.document import Document
from shmpool.endpoints import heartbeat_age
from shmpool.errors import MechanismError
from shmpool.names import SHM_DIR, Names
from shmpool.rows import coordinator_pid
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


class _Origin(NamedTuple):
    """What a coordinator is to be configured with."""

    told: str  # in messages
    raw: Mapping[str, Any]  # unchecked: that is the coordinator's business
    arguments: tuple[str, ...]  # of the program
    document: Document | None = None  # goes over the pipe

    def of_coordinator(self, key: str, default: object) -> object:
        """Return a key of the [coordinator] table."""
        table = self.raw.get("coordinator")
        return table.get(key, default) if isinstance(table, Mapping) else default


def ensure_coordinator(
    config: str | Document | None = None,
    *,
    uid: int | None = None,
    gid: int | None = None,
    linger: str | None = None,
    within: float = START_S,
) -> None:
    """Return when a coordinator serves the pool; start one if none lives.

    Args:
        config: its configuration file, or the configuration itself; default: environment variable SHMPOOL_CONFIG.
        uid, gid: whom the pool belongs to; the program runs as that user if the caller is root.  Default: the caller.
        linger: how long after the last worker it ends, such as "30s"; default: what the file says.
        within: seconds to wait for it.

    Raises:
        LaunchError: the file cannot be read, or no coordinator served in time.
        ValueError: the pool's name is not allowed.
    """
    origin = _origin(config)
    names = _names(origin.raw, uid)
    is_other_user = names.uid != os.geteuid()
    if serving_pid(names) is not None:
        return
    chosen = linger or _duration(origin.of_coordinator("linger", DEFAULT_LINGER))
    as_user = _as_user(uid, gid) if is_other_user and uid is not None else {}
    deadline = time.monotonic() + within
    # Beside the segment: a container with a read-only root has no other place to write to.
    with tempfile.TemporaryFile(dir=SHM_DIR) as said, _program(origin, chosen, said, as_user) as program:
        feed = _Feed(program, b"" if origin.document is None else origin.document.encode())
        while serving_pid(names, is_fresh=True) is None:
            feed.more()
            has_ended = program.poll() is not None
            if (has_ended and coordinator_pid(names) is None) or time.monotonic() >= deadline:
                said.seek(0)
                told = said.read().decode(errors="replace").strip()
                why = told or ("it ended without a word" if has_ended else f"not ready within {within:g} s")
                raise LaunchError(f"pool {names.pool!r}: no coordinator could be started with {origin.told}: {why}")
            time.sleep(_POLL_S)


def names_in(config: str, *, uid: int | None = None) -> Names:
    """Return the names of the pool of a configuration file; `uid` as for `ensure_coordinator`.

    Raises:
        LaunchError: the file cannot be read.
        ValueError: the pool's name is not allowed.
    """
    return _names(_origin(config).raw, uid)


def _names(raw: Mapping[str, Any], uid: int | None) -> Names:
    is_other_user = os.geteuid() == 0 and bool(uid)
    return Names.of(str(raw.get("name", "")), uid if is_other_user else None)


def start_on_demand(names: Names, config: str | Document | None = None) -> bool:
    """Start a coordinator for a worker that found none; return whether one serves now.  Blocks until it does.

    Done where a configuration of the pool is known (`config`; a file also by SHMPOOL_CONFIG, which goes first) that
    does not say `autostart = false`, and not again for a while after a try: one that cannot start must not cost every
    request its time.

    Raises:
        LaunchError: it could not be started.
    """
    wanted = _wanted(names, config)
    if wanted is None or not _may_try(names):
        return False
    key = (os.getpid(), names)
    _not_before[key] = time.monotonic() + AGAIN_AFTER_S
    time.sleep(random.uniform(0, JITTER_S))
    for is_last in (False, True):
        try:
            ensure_coordinator(wanted, uid=names.uid)
            break
        except LaunchError:
            if is_last:  # else it may have met one that was just ending
                raise
    _not_before[key] = time.monotonic() + AGAIN_AFTER_SUCCESS_S
    return serving_pid(names) is not None


def begin_on_demand(names: Names, config: str | Document | None = None) -> bool:
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
    if _wanted(names, config) is None:
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

    def __init__(self, names: Names, config: str | Document | None) -> None:
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


def _wanted(names: Names, config: str | Document | None) -> str | Document | None:
    """Return what to start a coordinator with; None where that is not wanted."""
    if os.geteuid() != 0 and names.uid != os.geteuid():
        return None
    known = (config,) if isinstance(config, Document) else (os.environ.get(CONFIG_VARIABLE), config)
    for one in known:
        if one:
            origin = _origin(one)
            if origin.raw.get("name") == names.pool:
                return one if origin.of_coordinator("autostart", True) is True else None
    return None


def serving_pid(names: Names, *, is_fresh: bool = False) -> int | None:
    """Return the pid of the coordinator (0 where it cannot be seen) of an open pool; None if there is none.

    Args:
        is_fresh: its heartbeat must be, too (it has ticked since it took over).
    """
    pid = coordinator_pid(names)
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


def _origin(config: str | Document | None) -> _Origin:
    """Return what is in a configuration.

    Raises:
        LaunchError: the file cannot be read.
    """
    if isinstance(config, Document):
        return _Origin("the configuration of this process", config.config, ("--config-stdin",), config)
    name = config or os.environ.get(CONFIG_VARIABLE, "")
    if not name:
        raise LaunchError(f"found no configuration file, expected one as argument or in {CONFIG_VARIABLE}")
    file = Path(name).absolute()
    try:
        return _Origin(str(file), tomllib.loads(file.read_text("utf-8")), ("--config", str(file)))
    except OSError as error:
        raise LaunchError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LaunchError(f"{file}: is not valid TOML: {error}") from None


def _duration(value: object) -> str:
    """Return a duration of the configuration as the command line has it; what is none is told about by the program."""
    return f"{value:f}s" if isinstance(value, int | float) else str(value)


class _Feed:
    """What goes into a program's standard input as it reads it; never waits for it."""

    def __init__(self, program: subprocess.Popen[bytes], text: bytes) -> None:
        self._pipe = program.stdin
        self._left = memoryview(text)
        if self._pipe is not None:
            os.set_blocking(self._pipe.fileno(), False)

    def more(self) -> None:
        """Hand over what fits into the pipe; close it after the last byte."""
        if self._pipe is None or self._pipe.closed:
            return
        try:
            while self._left:
                self._left = self._left[os.write(self._pipe.fileno(), self._left) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the program ended before it read all; its words tell why
            pass
        self._pipe.close()


@contextlib.contextmanager
def _program(
    origin: _Origin, linger: str, said: IO[bytes], as_user: dict[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program that brings the coordinator to the background and ends; it is not left as a zombie."""
    # -P: a module in the current directory must not take the place of one of ours.
    command = [python(), "-P", "-m", "shmpool_coordinator", "run", *origin.arguments]
    program = subprocess.Popen(
        [*command, "--detach", "--linger", linger],
        stdin=subprocess.DEVNULL if origin.document is None else subprocess.PIPE,
        stdout=said,
        stderr=said,
        start_new_session=True,
        **as_user,
    )
    try:
        yield program
        _close_input(program)  # another starter was first: this program is not to wait for the rest
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(FRESH_S)
    finally:
        _close_input(program)
        if program.poll() is None:
            program.kill()
            program.wait()


def _close_input(program: subprocess.Popen[bytes]) -> None:
    if program.stdin is not None:
        program.stdin.close()


def python() -> str:
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
    own = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}  # where libpq looks for a passfile
    groups = os.getgrouplist(user.pw_name, group)
    return {"user": uid, "group": group, "extra_groups": groups, "env": os.environ | own}
