"""`shmpool-coordinator`: run a coordinator, check a configuration, talk to a running one."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from shmpool.control_client import ControlError, request
from shmpool.errors import CoordinatorRunningError, MechanismError
from shmpool.layout import PAGE_BYTES, Layout
from shmpool.names import SHM_DIR, Names, uid_of
from shmpool.rows import coordinator_pid, start_time
from shmpool.settings import GIVEN
from shmpool_coordinator import mule
from shmpool_coordinator.config import ConfigError, DurationOrZero, describe, find, load, warnings_of
from shmpool_coordinator.daemon import Daemon
from shmpool_coordinator.origin import File, Origin, given_by, hide_memory

NAME_VARIABLE: Final = "SHMPOOL_NAME"
STOP_S: Final = 10.0
STANDARD_INPUT_FD: Final = 0

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2  # also: the configuration is wrong
EXIT_RUNNING: Final = 4  # another coordinator has the pool

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (MechanismError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        if getattr(options, "mule", False):
            mule.pause()
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    return EXIT_RUNNING if isinstance(error, CoordinatorRunningError) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shmpool-coordinator",
        description="One coordinator per pool and host: owns the connection budget, probes the endpoints.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="be the coordinator of a pool")
    source = run.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help="configuration file (default: $SHMPOOL_CONFIG)")
    source.add_argument(
        "--config-stdin",
        action="store_true",
        help='read one JSON document, {"config": {as in the file}, "passwords": {endpoint: text}}, from standard input',
    )
    run.add_argument(
        "--linger",
        metavar="DURATION",
        type=_duration,
        help="end so long after the last worker has gone, such as 30s (default: never)",
    )
    how = run.add_mutually_exclusive_group()
    how.add_argument("--detach", action="store_true", help="go to the background once the pool is ready")
    how.add_argument(
        "--mule",
        action="store_true",
        help="run beside the workers of the master that started this: stand by while another coordinator has the "
        "pool, end after the workers, and on SIGHUP leave the segment to the next one",
    )
    run.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="default: info")
    run.add_argument("--log-file", metavar="FILE", help="append to a file instead of standard error")
    run.set_defaults(command=_run)

    check = commands.add_parser("check-config", help="check a configuration file and print what it means")
    check.add_argument("file", metavar="FILE", nargs="?", help="default: $SHMPOOL_CONFIG")
    check.set_defaults(command=_check_config)

    for name, command, what in (
        ("stop", _stop, "end the coordinator of a pool"),
        ("reload", _reload, "make the coordinator of a pool read its configuration again"),
        ("info", _info, "print what the coordinator of a pool says of itself"),
    ):
        sub = commands.add_parser(name, help=what)
        sub.add_argument("name", metavar="NAME", nargs="?", help=f"the pool (default: ${NAME_VARIABLE})")
        sub.add_argument("--user", metavar="USER", type=_user, help="whose: a name or uid (default: yours)")
        sub.set_defaults(command=command)
    return parser


def _duration(text: str) -> float:
    try:
        return TypeAdapter[float](DurationOrZero).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg']}") from None


def _user(text: str) -> int:
    try:
        return uid_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(options: argparse.Namespace) -> Names:
    name = options.name or os.environ.get(NAME_VARIABLE, "")
    if not name:
        raise ConfigError("pool", (f"found no name, expected one as argument or in {NAME_VARIABLE}",))
    return Names.of(name, options.user)


def _run(options: argparse.Namespace) -> int:
    # Until the daemon can take them: SIGHUP is a reload, and of a mule each of its signals is an order.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, mule.SIGNALS if options.mule else {signal.SIGHUP})
    try:
        return _be_coordinator(options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_coordinator(options: argparse.Namespace) -> int:
    origin: Origin
    if options.config_stdin:
        hide_memory()
        origin = given_by(STANDARD_INPUT_FD)
    else:
        origin = File(find(options.config))
    config = origin.read()
    log_file = Path(options.log_file).absolute() if options.log_file else None
    ready = _detach() if options.detach else None
    if ready is None:
        _close_from(3)  # what a master left open is not ours to keep
    try:
        _begin_logging(options.log_level, log_file, is_detached=ready is not None)
        for warning in warnings_of(config):
            logging.getLogger(__name__).warning("config: %s", warning)
        if options.mule:
            if not mule.stand_by(Names.of(config.name)):
                return 0
            config = origin.read()  # it may have changed meanwhile
        master_pid = os.getppid() if options.mule else None
        daemon = Daemon(config, origin=origin, linger_s=options.linger, master_pid=master_pid)
    except (MechanismError, OSError, ValueError) as error:
        _report(ready, _exit_code(error), str(error))
        raise
    _report(ready, 0)
    return daemon.run()


def _begin_logging(level: str, path: Path | None, *, is_detached: bool) -> None:
    handler: logging.Handler
    if path is not None:
        handler = logging.FileHandler(path)
    elif is_detached:
        handler = logging.NullHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, handlers=[handler])


def _detach() -> int:
    """Become a process of its own session, without terminal and inherited descriptors.

    The first process waits until the pool is ready (or failed) and exits accordingly.  Runs before anything is
    locked: record locks do not survive the forks.

    Returns:
        A descriptor for `_report`.
    """
    read_fd, write_fd = os.pipe()
    if os.fork():
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            code, _, text = pipe.read().decode().partition(" ")
        if code != "0":
            print(text or "the coordinator died before it was ready", file=sys.stderr)
        sys.stderr.flush()
        os._exit(int(code or EXIT_FAILED))
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.dup2(write_fd, 3, inheritable=False)
    _close_from(4)
    return 3


def _close_from(first: int) -> None:
    """Close this descriptor and all above.

    Those that are open, one by one: a container may allow a billion, and its seccomp profile may know no close_range.
    """
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd >= first:
            with contextlib.suppress(OSError):  # the one that the directory was read with
                os.close(fd)


def _report(ready: int | None, code: int, text: str = "") -> None:
    """Tell the waiting first process that the pool is ready, or why not."""
    if ready is not None:
        os.write(ready, f"{code} {text}".encode())
        os.close(ready)


def _check_config(options: argparse.Namespace) -> int:
    config = load(find(options.file))
    limits = config.limits
    shape = Layout(limits.workers, limits.slots_per_worker, limits.endpoints, limits.groups)
    print(describe(config))
    count = 3 * len(config.groups) + len(config.endpoints)  # a permit semaphore each, and two bells per group
    needed = shape.size_bytes + count * PAGE_BYTES
    print(f"{SHM_DIR}: {needed} bytes: {shape.size_bytes} for the segment, and a page for each of {count} semaphores")
    for warning in warnings_of(config):
        print(f"warning: {warning}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    names = _names(options)
    seen = coordinator_pid(names)  # 0: in another pid namespace, and the number that it answers with means nothing here
    pid = int(request(names, "stop")["pid"])
    deadline = time.monotonic() + STOP_S
    while seen is not None and (coordinator_pid(names) == seen or (seen and start_time(seen) is not None)):
        if time.monotonic() >= deadline:
            print(f"pool {names.pool}: pid {pid} is still ending after {STOP_S:g} s", file=sys.stderr)
            return EXIT_FAILED
        time.sleep(0.02)
    print(f"pool {names.pool}: pid {pid} ended")
    return 0


def _reload(options: argparse.Namespace) -> int:
    names = _names(options)
    try:
        changes = request(names, "reload")["changes"]
    except ControlError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    for change in changes or ["no change"]:
        print(change)
    return 0


def _info(options: argparse.Namespace) -> int:
    info = request(_names(options), "info")
    for key, value in info.items():
        if key not in ("v", "type", "endpoints"):
            print(f"{key}: {value if value != '' else GIVEN}")
    for name, endpoint in info["endpoints"].items():
        error = f" ({endpoint['error']})" if endpoint["error"] else ""
        print(f"endpoint {name}: {endpoint['health']} {endpoint['role']} {endpoint['verdict']}{error}")
    return 0
