"""`make chaos`: kill, stop and interrupt everything at random, and show that every permit is accounted for."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.chaos import scale
from tools.chaos.run import Chaos, ChaosError
from tools.chaos.schedule import SCENARIOS
from tools.pg_cluster import PostgresNotFoundError, ServerError
from tools.stage import Signals, StoppedError, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if nothing was violated, unaccounted for or failed."""
    options = _parser().parse_args(arguments)
    signals = Signals()
    signals.install()
    try:
        if options.what == "scale":
            return scale.run(options.seconds or scale.SECONDS, signals)
        codes = [_run(options, name, signals) for name in ([options.scenario] if options.scenario else SCENARIOS)]
    except StoppedError:
        say("ended as asked")
        return 130
    except (ChaosError, ServerError, PostgresNotFoundError) as error:
        say(f"failed: {error}")
        return 1
    return max(codes)


def _run(options: argparse.Namespace, name: str, signals: Signals) -> int:
    scenario = SCENARIOS[name]
    if options.server_faults:
        scenario = scenario.with_server_faults()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    seconds = options.seconds or 60.0
    with Chaos(scenario, seed=seed, seconds=seconds, workers=options.workers, signals=signals) as chaos:
        try:
            chaos.torment()
            chaos.finish()
        finally:
            if options.keep_logs:
                chaos.keep_logs(options.keep_logs)
    chaos.figures.show()
    return 0 if chaos.figures.is_good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=("run", "scale"), default="run", help="scale: what 1,000 workers cost a coordinator"
    )
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), help="default: each in turn")
    parser.add_argument("--seed", type=int, metavar="N", help="of the schedule of faults (default: any)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of faults (default 60; scale: of each measure)")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="at a time (default 8)")
    parser.add_argument("--server-faults", action="store_true", help="also end backends and restart the standby")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="copy the logs there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
