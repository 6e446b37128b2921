"""Explore the permit protocol: `python -m tools.model`, or `make model`.

Exit code: 0 as expected (also where MAX_STATES ended the search without a violation), 1 a violation, or a mistake that
was not found, 2 bad arguments, 3 no C compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tools.model.explorer import MISTAKES, ModelError, NoCompilerError, explore

# Every rule of the protocol plays a part in one of these.
QUICK = (
    "WORKERS=1",
    "WORKERS=2",
    "WORKERS=2 GROUPS=2",
    "WORKERS=2 ENDPOINTS=2",
    "WORKERS=2 GROUP_CAP2=2",
    "WORKERS=1 SLOTS=2 GROUPS=2 ENDPOINTS=2 GROUP_CAP=2",
    "WORKERS=1 SLOTS=2 GROUP_CAP=2 ENDPOINT_CAP2=2",
)
FULL = (
    *QUICK,
    "WORKERS=2 GROUP_CAP=2 ENDPOINT_CAP=2 ENDPOINT_CAP2=1",
    "WORKERS=2 GROUP_CAP2=2 OWED=1 AUDIT_ALWAYS=1",
    "WORKERS=2 GROUPS=2 ENDPOINTS=2 GROUP_CAP=2",
    "WORKERS=3",
    "WORKERS=2 SLOTS=2 ABANDON=0",
    "WORKERS=2 ENDPOINTS=2 GROUP_CAP=2 GROUP_CAP2=1",
    "WORKERS=2 ENDPOINTS=2 GROUP_CAP=2 ENDPOINT_CAP2=2",
)


def explore_all(configs: Sequence[str]) -> bool:
    """Explore configurations; return whether none has a violation."""
    is_ok = True
    for config in configs:
        result = explore(config)
        is_ok = is_ok and (result.is_ok or result.is_bounded)
        if not result.is_ok:
            print(result.output, end="")
        print(f"{config}: {result.verdict}: {result.states} states in {result.seconds:.1f} s", flush=True)
    return is_ok


def find_mistakes() -> bool:
    """Explore every deliberate mistake; return whether each ends in a violation."""
    missed = []
    for mistake, config in MISTAKES.items():
        result = explore(f"{config} MISTAKE={mistake}")
        if result.steps:
            print(f"{mistake} ({config}): found in {result.steps} steps: {result.verdict}", flush=True)
        else:
            missed.append(mistake)
            print(f"{mistake} ({config}): NOT FOUND in {result.states} states", flush=True)
    print(f"{len(MISTAKES) - len(missed)} of {len(MISTAKES)} mistakes found")
    return not missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.model",
        description="Explore every interleaving of the permit protocol in small pools (tools/model/README.md).",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="small configurations only: seconds instead of minutes")
    what.add_argument("--config", metavar="WORDS", help='one configuration, such as "WORKERS=2 GROUP_CAP2=2"')
    what.add_argument("--mistakes", action="store_true", help="find every deliberate mistake")
    options = parser.parse_args(arguments)
    try:
        if options.mistakes:
            is_ok = find_mistakes()
        else:
            is_ok = explore_all([options.config] if options.config is not None else QUICK if options.quick else FULL)
    except NoCompilerError as error:
        print(f"model: {error}", file=sys.stderr)
        return 3
    except ModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
