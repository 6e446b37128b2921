"""pgdbpool's interface, with the configuration that environment variable DBPOOL holds as JSON."""

from __future__ import annotations

import json
import os

from shmpool import pgdbpool as dbpool

dbpool.Connection.init(json.loads(os.environ["DBPOOL"]))


def hold(seconds: float) -> int:
    """Keep a connection busy, and return its server process."""
    with dbpool.Handler("default") as db:
        row = db.query("SELECT pg_backend_pid() FROM pg_sleep(%s)", (seconds,)).fetchone()
    return int(row[0])
