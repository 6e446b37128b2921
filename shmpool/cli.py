"""The command `shmpool`: look at pools, and see to their end.

It reads the segment itself and needs no coordinator for that; `drain`, `ready`, `maint`, `retire` and `repair` ask the
coordinator.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, NoReturn

from shmpool.attachment import is_coordinated
from shmpool.control_client import ControlError, request
from shmpool.errors import MechanismError
from shmpool.layout import Layout
from shmpool.names import Names, uid_of
from shmpool.observation import observe, pools_of
from shmpool.segment import attach
from shmpool.states import SegmentState
from shmpool.status import SCHEMA, Level, Report, as_json

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_USAGE: Final = 64
EXIT_REFUSED: Final = 1
WATCH_S: Final = 2.0
RETIRE_S: Final = 60.0
POLL_S: Final = 0.1
DEFAULT_LIMITS: Final = Layout(workers=128, slots_per_worker=32, endpoints=16, groups=32)

_EXIT_CODES = """\
exit codes:
  0   fine
  1   degraded: it works, but something needs a look
  2   not running: no segment, or no coordinator
  64  the command line is wrong
"""
_STATUS_EXAMPLES = f"""\
NAME defaults to $SHMPOOL_NAME, or to the only pool that the user has.

examples:
  shmpool status                 the only pool
  shmpool status web --watch     again every {WATCH_S:g} s, until Ctrl-C
  shmpool status web --json      for programs
  shmpool status web >/dev/null  for monitors: look at the exit code

{_EXIT_CODES}"""

_RETIRE_TEXT: Final = """\
The coordinator goes on serving what is held; workers close idle connections at once and
busy ones at checkin.  When nothing is held any more, a new segment takes the place of the
old one, made with the configuration file as it is then: the way to other [limits].
Checkouts wait for it within their timeout.  `shmpool status` shows for whom it waits.

exit codes:
  0   done, or under way with --no-wait
  1   refused, or not finished in time (it goes on)
  2   no coordinator answers
  64  the command line is wrong
"""
_ADMIN_SUMMARIES: Final = {
    "drain": "let an endpoint run empty: idle connections leave at once, busy ones at checkin",
    "maint": "as drain, and leave the endpoint unprobed",
    "ready": "let an endpoint take part again",
}
_ADMIN_TEXT: Final = """\
What the operator wants of an endpoint lasts until the next such command, through reloads,
other coordinators and `shmpool retire`.  The configuration has a wish of its own (what it
no longer names is drained): the stricter one counts, and neither cancels the other.
`shmpool status` shows both, and what is still held there.  The wish ends with the segment,
which a coordinator that is stopped removes if no worker is left.

exit codes:
  0   done; warnings go to standard error
  1   refused: no such endpoint
  2   no coordinator answers
  64  the command line is wrong
"""
_CLEANUP_TEXT: Final = """\
Segment, lock file, socket and semaphores of the pool.  Nothing is removed while a
coordinator or a worker lives.

exit codes:
  0   nothing is left; without --yes: nothing is in the way of removing it
  1   somebody lives, or something cannot be removed
  64  the command line is wrong
"""
_REPAIR_TEXT: Final = """\
For `audit-out-of-bounds` in `shmpool status`: something wrote to the slot words or the
semaphores past the protocol, which no crash of a worker or coordinator does.  The
coordinator brings the numbers in line such that never more permits circulate than the
cap.  It trusts the slot words as to who holds what, and leaves alone what is in doubt.

exit codes:
  0   nothing is out of bounds; with --yes: not any more
  1   something is out of bounds
  2   no coordinator answers
  64  the command line is wrong
"""


class UsageError(Exception):
    """The command line cannot be obeyed; the message says why."""


class NoPoolError(Exception):
    """The user has no pool."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except UsageError as error:
        print(f"shmpool: {error}", file=sys.stderr)
        return EXIT_USAGE
    except NoPoolError as error:
        print(f"shmpool: {error}", file=sys.stderr)
        return Level.NOT_RUNNING
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    def add(name: str, summary: str, epilog: str = _EXIT_CODES) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    parser = _Parser(
        prog="shmpool",
        description="Look at the connection pools that this host's workers share, and see to their end.",
        epilog=f"example:\n  shmpool status web\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shmpool {version('shmpool')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    status = add("status", "show a pool: endpoints, groups, workers, slots, and what is wrong", _STATUS_EXAMPLES)
    _add_reading(status)
    status.add_argument(
        "--slots",
        action=argparse.BooleanOptionalAction,
        help="the slot tables (default: shown, but not with --watch)",
    )
    status.set_defaults(run=_show, is_slots_only=False)

    slots = add("slots", "show the slot tables of a pool alone", _STATUS_EXAMPLES.replace("status", "slots"))
    _add_reading(slots)
    slots.set_defaults(run=_show, is_slots_only=True)

    listing = add("list", "list the user's pools")
    _add_user(listing)
    listing.set_defaults(run=_list)

    for wish, summary in _ADMIN_SUMMARIES.items():
        admin = add(wish, summary, _ADMIN_TEXT)
        admin.add_argument("endpoint", metavar="ENDPOINT", help="its name in the configuration")
        admin.add_argument(
            "--pool", metavar="NAME", help="the pool (default: $SHMPOOL_NAME, or the only one that the user has)"
        )
        admin.add_argument("--json", action="store_true", help="print the answer as JSON")
        _add_user(admin)
        admin.set_defaults(run=_set_admin, wish=wish)

    retire = add("retire", "replace a pool's segment by a new one, without stopping its workers", _RETIRE_TEXT)
    _add_name(retire)
    retire.add_argument(
        "--within",
        type=_seconds,
        default=RETIRE_S,
        metavar="SECONDS",
        help="wait so long for the successor (default: %(default)g)",
    )
    retire.add_argument("--no-wait", action="store_true", help="do not wait for the successor")
    retire.set_defaults(run=_retire)

    repair = add("repair", "say what audits find out of bounds and, with --yes, bring it in line", _REPAIR_TEXT)
    _add_name(repair)
    repair.add_argument("--yes", action="store_true", help="do it; without: only say what would be done")
    repair.set_defaults(run=_repair)

    cleanup = add("cleanup", "list and, with --yes, remove what is left of a pool that nobody uses", _CLEANUP_TEXT)
    _add_name(cleanup)
    cleanup.add_argument("--all", action="store_true", help="every pool of this user")
    cleanup.add_argument("--yes", action="store_true", help="remove it; without: only list it")
    cleanup.set_defaults(run=_cleanup)

    shape = add("layout", "show the tables of a segment with the given [limits], and their offsets")
    for limit in ("workers", "slots_per_worker", "endpoints", "groups"):
        shape.add_argument(
            f"--{limit.replace('_', '-')}",
            type=_positive,
            default=getattr(DEFAULT_LIMITS, limit),
            metavar="N",
            help="default: %(default)s",
        )
    shape.set_defaults(run=_layout)
    return parser


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the pool")
    _add_user(parser)


def _add_user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", type=_user, default=os.geteuid(), metavar="USER", help="whose: a name or uid (default: yours)"
    )


def _user(text: str) -> int:
    try:
        return uid_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_reading(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; names are stable within one `schema`")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=WATCH_S,
        metavar="SECONDS",
        help="show it again and again (default: every %(const)g s)",
    )
    parser.add_argument("--all", action="store_true", help="also rows and slots that hold nothing")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds from 0.1 to 86400 (NAME goes first)")
    return seconds


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _find_names(name: str | None, uid: int) -> Names:
    """Return the names of a user's pool that is meant.

    Raises:
        UsageError: the name is not allowed, or several pools could be meant.
        NoPoolError: no name was given, and there is none.
    """
    name = name or os.environ.get("SHMPOOL_NAME")
    if not name:
        pools = pools_of(uid)
        if not pools:
            raise NoPoolError(f"uid {uid} has no pool; start its coordinator: shmpool-coordinator run --config FILE")
        if len(pools) > 1:
            raise UsageError(f"uid {uid} has the pools {', '.join(pools)}: give a NAME or set SHMPOOL_NAME")
        name = pools[0]
    try:
        return Names.of(name, uid)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _show(options: argparse.Namespace) -> int:
    """Show a pool, again and again with `--watch`."""
    names = _find_names(options.name, options.user)
    if options.json:
        return _show_json(names, options.watch)

    from shmpool import tables

    if options.watch is not None:
        tables.watch(lambda: _drawing(observe(names), options), options.watch)
    report = observe(names)
    tables.console().print(_drawing(report, options))
    return report.level


def _show_json(names: Names, watch: float | None) -> int:
    """Print one document; with `--watch` one per line."""
    while True:
        report = observe(names)
        print(json.dumps(as_json(report), indent=2 if watch is None else None), flush=True)
        if watch is None:
            return report.level
        time.sleep(watch)


def _drawing(report: Report, options: argparse.Namespace) -> RenderableType:
    from shmpool import tables

    if options.is_slots_only:
        return tables.slots(report, with_all=options.all)
    with_slots = options.slots if options.slots is not None else options.watch is None
    return tables.whole(report, with_slots=with_slots, with_all=options.all)


def _list(options: argparse.Namespace) -> int:
    from shmpool import tables

    reports = [observe(Names.of(name, options.user)) for name in pools_of(options.user)]
    if reports:
        tables.print_pools(reports)
    else:
        print(f"uid {options.user} has no pool")
    return 0


def _set_admin(options: argparse.Namespace) -> int:
    """Tell the coordinator what the operator wants of an endpoint."""
    names = _find_names(options.pool, options.user)
    try:
        answer = request(names, "admin", endpoint=options.endpoint, admin=options.wish)
    except ControlError as error:
        return _refused(names, error)
    told = {key: answer[key] for key in ("endpoint", "admin", "operator", "configuration", "groups_left_alone")}
    if options.json:
        print(json.dumps({"schema": SCHEMA, **told}))
        return 0
    print(f"endpoint {options.endpoint}: {told['admin']} (operator: {told['operator']}, ", end="")
    print(f"configuration: {told['configuration']})")
    if told["admin"] != told["operator"]:
        print(
            f"endpoint {options.endpoint} stays {told['admin']}: the configuration no longer names it", file=sys.stderr
        )
    for group in told["groups_left_alone"]:
        print(f"group {group}: no endpoint is eligible now; checkouts wait and then fail", file=sys.stderr)
    return 0


def _retire(options: argparse.Namespace) -> int:
    """Have the segment retired, and wait for its successor."""
    names = _find_names(options.name, options.user)
    try:
        old = request(names, "retire")["token"]
    except ControlError as error:
        return _refused(names, error)
    if options.no_wait:
        print(f"pool {names.pool}: retired; its successor opens when nothing is held any more")
        return 0
    deadline = time.monotonic() + options.within
    while not _is_succeeded(names, old):
        if time.monotonic() >= deadline:
            findings = [f for f in observe(names).findings if f.code == "segment-retired"]
            waits = findings[0].found if findings else "the successor is not open"
            print(f"pool {names.pool}: after {options.within:g} s: {waits}; it goes on", file=sys.stderr)
            return EXIT_REFUSED
        time.sleep(POLL_S)
    print(f"pool {names.pool}: the successor is open")
    return 0


def _is_succeeded(names: Names, old: str) -> bool:
    """Whether another segment than the one with this token is open."""
    try:
        segment = attach(names)
    except MechanismError:
        return False
    try:
        return segment.state is SegmentState.OPEN and f"{segment.token:016x}" != old
    finally:
        segment.release()


def _repair(options: argparse.Namespace) -> int:
    """Have the coordinator say, or do, what brings impossible counts in line."""
    names = _find_names(options.name, options.user)
    try:
        repairs = request(names, "repair", apply=options.yes)["repairs"]
        for line in repairs:
            print(f"{'repaired' if options.yes else 'would repair'}: {line}")
        is_left = bool(request(names, "repair", apply=False)["repairs"]) if options.yes else bool(repairs)
    except ControlError as error:
        return _refused(names, error)
    if not repairs:
        print(f"pool {names.pool}: nothing is out of bounds")
    elif not options.yes:
        print("nothing was changed; with --yes it is")
    return EXIT_REFUSED if is_left else 0


def _refused(names: Names, error: ControlError) -> int:
    print(error, file=sys.stderr)
    return EXIT_REFUSED if is_coordinated(names) else Level.NOT_RUNNING


def _cleanup(options: argparse.Namespace) -> int:
    """List what is left of pools; with `--yes` remove it where nobody lives."""
    from shmpool import cleanup

    if options.all and options.name:
        raise UsageError("cleanup: give a NAME or --all, not both")
    uid = options.user
    remains = cleanup.pools_with_remains(uid) if options.all else []
    pools = [Names.of(name, uid) for name in remains] if options.all else [_find_names(options.name, uid)]
    code = 0
    for names in pools:
        before = cleanup.look(names)
        after = before
        if options.yes:
            try:
                after = cleanup.remove(names)
            except OSError as error:
                after = cleanup.look(names)._replace(obstacles=(f"cannot be removed: {error}",))
        for path in before.paths:
            print(f"{'removed' if path not in after.paths else 'not removed' if options.yes else 'is left'}: {path}")
        for obstacle in after.obstacles:
            print(f"pool {names.pool}: {obstacle}", file=sys.stderr)
            code = EXIT_REFUSED
        if not before.paths:
            print(f"pool {names.pool}: nothing is left")
        elif not options.yes and not after.obstacles:
            print(f"pool {names.pool}: nobody uses it; with --yes it is removed")
    return code


def _layout(options: argparse.Namespace) -> int:
    from shmpool import tables

    tables.print_layout(Layout(options.workers, options.slots_per_worker, options.endpoints, options.groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
