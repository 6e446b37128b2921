"""A service without requests, beside a web application: it does one job after another.

Run: `python jobs.py [COUNT]`: so many jobs, as cron would start it, or jobs until it is ended.
"""

from __future__ import annotations

import itertools
import sys

from tests.integration.deployments.apps.answers import chosen_hold

JOB_S = 0.005


def main() -> None:
    """Do jobs; a line for each."""
    hold = chosen_hold()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for number in itertools.count(1) if count is None else range(1, count + 1):
        print(number, hold(JOB_S), flush=True)
