"""`shmpool-coordinator`: run a coordinator, check a configuration, talk to a running one."""

from __future__ import annotations

import argparse
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
from shmpool.layout import Layout
from shmpool.names import Names
from shmpool.rows import start_time
from shmpool_coordinator.config import Config, ConfigError, DurationOrZero, find, load
from shmpool_coordinator.daemon import Daemon

NAME_VARIABLE: Final = "SHMPOOL_NAME"
STOP_S: Final = 10.0

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
    run.add_argument("--config", metavar="FILE", help="configuration file (default: $SHMPOOL_CONFIG)")
    run.add_argument(
        "--linger",
        metavar="DURATION",
        type=_duration,
        help="end so long after the last worker has gone, such as 30s (default: never)",
    )
    run.add_argument("--detach", action="store_true", help="go to the background once the pool is ready")
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
        sub.set_defaults(command=command)
    return parser


def _duration(text: str) -> float:
    try:
        return TypeAdapter[float](DurationOrZero).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg']}") from None


def _names(options: argparse.Namespace) -> Names:
    name = options.name or os.environ.get(NAME_VARIABLE, "")
    if not name:
        raise ConfigError("pool", (f"found no name, expected one as argument or in {NAME_VARIABLE}",))
    return Names.of(name)


def _run(options: argparse.Namespace) -> int:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until the daemon can take it for a reload
    try:
        return _be_coordinator(options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_coordinator(options: argparse.Namespace) -> int:
    config = load(find(options.config))
    log_file = Path(options.log_file).absolute() if options.log_file else None
    ready = _detach() if options.detach else None
    if ready is None:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what a master left open is not ours to keep
    try:
        _begin_logging(options.log_level, log_file, is_detached=ready is not None)
        for warning in config.warnings():
            logging.getLogger(__name__).warning("config: %s", warning)
        daemon = _started(config, options.linger)
    except (MechanismError, OSError, ValueError) as error:
        _report(ready, _exit_code(error), str(error))
        raise
    _report(ready, 0)
    return daemon.run()


def _started(config: Config, linger_s: float | None) -> Daemon:
    try:
        return Daemon(config, linger_s=linger_s)
    except KeyError as error:
        raise ConfigError(config.source, (f"access.group: {error.args[0]}, expected a unix group",)) from None


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
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    return 3


def _report(ready: int | None, code: int, text: str = "") -> None:
    """Tell the waiting first process that the pool is ready, or why not."""
    if ready is not None:
        os.write(ready, f"{code} {text}".encode())
        os.close(ready)


def _check_config(options: argparse.Namespace) -> int:
    config = load(find(options.file))
    limits = config.limits
    shape = Layout(limits.workers, limits.slots_per_worker, limits.endpoints, limits.groups)
    print(config.describe())
    print(f"segment: {shape.size_bytes} bytes in {Names.of(config.name).segment.parent}")
    for warning in config.warnings():
        print(f"warning: {warning}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    names = _names(options)
    pid = int(request(names, "stop")["pid"])
    deadline = time.monotonic() + STOP_S
    while start_time(pid) is not None:
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
            print(f"{key}: {value}")
    for name, endpoint in info["endpoints"].items():
        error = f" ({endpoint['error']})" if endpoint["error"] else ""
        print(f"endpoint {name}: {endpoint['health']} {endpoint['role']} {endpoint['verdict']}{error}")
    return 0
