"""Looks at a pool all the time from outside: invariants over clean copies, and sessions counted at the servers.

`python -m tools.chaos.sampler POOL CAPS NAME=CONNINFO...` writes one JSON object of figures per second, the last one
when its input ends.  `CAPS` is JSON: the largest cap of each endpoint that is ever configured.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any, Final

import psycopg2
from psycopg2.extensions import connection

from shmpool.invariants import check, check_sequence
from shmpool.layout import PERMITS
from shmpool.names import Names
from shmpool.segment import Segment, attach
from shmpool.semaphores import Semaphore, open_existing
from shmpool.views import Collect, collect, read_controls, read_pool

SAMPLE_EVERY_S: Final = 0.02
VIEW_EVERY_S: Final = 0.01
TELL_EVERY_S: Final = 1.0
KEPT: Final = 20  # texts of each kind

# Only sessions that had started when the query began, and live now: so many lived at one moment, for certain.
SESSIONS: Final = (
    "select count(*) from pg_stat_activity where application_name ~ %s and backend_start <= statement_timestamp()"
)


class Watcher:
    """The segment of one pool, and what was found in it."""

    def __init__(self, pool: str) -> None:
        self.segment: Segment = attach(Names.of(pool))
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []
        self._semaphores = [self._semaphore(number) for number in range(self.segment.layout.semaphores)]
        self._last: Collect | None = None

    def _semaphore(self, number: int) -> Semaphore | None:
        segment, groups = self.segment, self.segment.layout.groups
        inode = segment.words[segment.layout.at(PERMITS, number, "semaphore_inode")]
        kind, index = ("g", number) if number < groups else ("e", number - groups)
        return open_existing(segment.names.semaphore(segment.token, kind, index), inode) if inode else None

    def values(self) -> list[int | None]:
        """Return the value of every semaphore."""
        return [None if one is None else one.value for one in self._semaphores]

    def issued(self, endpoint: int) -> int:
        """Return how many permits of an endpoint circulate."""
        return read_controls(self.segment)[self.segment.layout.groups + endpoint].issued

    def look(self) -> None:
        """Judge one view, if it is clean."""
        self.counts["views"] += 1
        view = read_pool(self.segment, self.values)
        # The view's other tables are read after its controls: a resize in between would mix two moments.
        if view.is_clean and all(
            permit.control == control for permit, control in zip(view.permits, self._controls(), strict=True)
        ):
            self.counts["clean"] += 1
            for violation in check(view):
                self.report(str(violation))
        later = collect(self.segment, self.values, tries=1)
        if self._last is not None:
            for text in check_sequence(self._last, later):
                self.report(text)
        self._last = later

    def _controls(self) -> list[Any]:
        controls = read_controls(self.segment)
        return [controls[number] for number, one in enumerate(self._semaphores) if one is not None]

    def report(self, text: str) -> None:
        """Keep a violation."""
        self.counts["violations"] += 1
        if len(self.found) < KEPT:
            self.found.append(text)

    def figures(self) -> dict[str, Any]:
        """Return everything so far."""
        return {**self.counts, "found": self.found}


def count_sessions(watcher: Watcher, index: int, name: str, conninfo: str, most: int) -> None:
    """Count an endpoint's sessions again and again; a server that is away is asked again later.  Never returns."""
    pattern = rf"shmpool:{re.escape(watcher.segment.names.pool)}:[0-9]+\.[0-9]+:[0-9]+$"
    link: connection | None = None
    while True:
        time.sleep(SAMPLE_EVERY_S)
        try:
            if link is None:
                link = psycopg2.connect(conninfo, connect_timeout=2)
                link.autocommit = True
            before = watcher.issued(index)
            with link.cursor() as cur:
                cur.execute(SESSIONS, (pattern,))
                row = cur.fetchone()
            assert row is not None
            seen, allowed = row[0], min(most, max(before, watcher.issued(index)))
        except psycopg2.Error:
            with contextlib.suppress(psycopg2.Error):
                if link is not None:
                    link.close()
            link = None
            watcher.counts["servers away"] += 1
            continue
        watcher.counts["samples"] += 1
        watcher.counts[f"full {name}"] += seen == allowed
        watcher.counts[f"most {name}"] = max(watcher.counts[f"most {name}"], seen)
        if seen > allowed:
            watcher.report(f"{name}: {seen} sessions at the server, {allowed} allowed")


def main() -> None:
    """Sample until the input ends."""
    pool, caps, *servers = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watcher, most = Watcher(pool), json.loads(caps)
    for index, server in enumerate(servers):
        name, conninfo = server.split("=", 1)
        arguments = (watcher, index, name, conninfo, most[name])
        threading.Thread(target=count_sessions, args=arguments, daemon=True).start()
    tell_at = 0.0
    while not select.select([0], [], [], VIEW_EVERY_S)[0]:
        watcher.look()
        if time.monotonic() >= tell_at:
            tell_at = time.monotonic() + TELL_EVERY_S
            print(json.dumps(watcher.figures()), flush=True)
    print(json.dumps(watcher.figures()), flush=True)


if __name__ == "__main__":
    main()
