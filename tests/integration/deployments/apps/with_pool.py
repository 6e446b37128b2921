"""The pool that environment variable SHMPOOL_NAME names."""

from __future__ import annotations

import shmpool

pool = shmpool.Pool()


def hold(seconds: float) -> int:
    """Keep a connection busy, and return its server process."""
    with pool.connection("default") as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid() FROM pg_sleep(%s)", (seconds,))
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])
