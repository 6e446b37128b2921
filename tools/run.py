"""`make run`, `make run-uwsgi`, `make demo`: the example on throw-away servers, with a coordinator.

Ctrl-C, SIGTERM or a program that ends by itself end everything, in order; what is left is looked for and told.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from tools.demo import run_demo
from tools.pg_cluster import HOST, PostgresNotFoundError, ServerError
from tools.stage import Signals, Stage, StageError, StoppedError, say

FOREVER_S: Final = 10 * 365 * 86400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code: 0 if all was as expected and nothing is left."""
    options = _parser().parse_args(arguments)
    signals = Signals()
    signals.install()
    kind = "demo" if options.demo else "run"
    stage = Stage(
        signals,
        pool=options.name or f"{kind}-{os.getpid()}",
        workers=options.workers,
        port=options.port,
        keep_logs=options.keep_logs,
        server=options.server,
    )
    code = 0
    try:
        with stage:
            if options.demo:
                code = run_demo(stage)
            else:
                _serve(stage)
    except StoppedError:
        say("ended as asked")
    except (StageError, ServerError, PostgresNotFoundError) as error:
        say(f"failed: {error}")
        code = 1
    left = stage.left()
    if left:
        say(f"left behind: {', '.join(left)}")
        return 1
    say("nothing is left: no process, no shared memory, no socket, no directory")
    return code


def _serve(stage: Stage) -> None:
    stage.show_status()
    address, pool = f"http://{HOST}:{stage.port}", stage.names.pool
    print(
        f"""\
  open    {address}/
  read    curl {address}/
  write   curl -d name=Ann -d said=hello {address}/entries
  hold    curl '{address}/slow?ms=2000'
  status  .venv/bin/shmpool status {pool} --watch
  stop    Ctrl-C
""",
        flush=True,
    )
    stage.wait(lambda: False, FOREVER_S, "somebody stops it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.run",
        description="Run the example on throw-away PostgreSQL servers until Ctrl-C.",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--demo", action="store_true", help="drive it: load, faults, and what became of them (20 s)")
    how.add_argument("--server", choices=["gunicorn", "uwsgi"], default="gunicorn", help="default: gunicorn")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="worker processes (default 4)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of the server (default: any free one)")
    parser.add_argument("--name", metavar="POOL", help="the pool's name (default: run-PID or demo-PID)")
    parser.add_argument("--keep-logs", action="store_true", help="keep the directory with configuration and logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
