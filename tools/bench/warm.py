"""Warm checkout and checkin, beside psycopg2's ThreadedConnectionPool."""

from __future__ import annotations

import timeit

from psycopg2.pool import ThreadedConnectionPool

import shmpool
from tools.bench.rounds import ROUNDS, Quartiles, alternate, noise, ratio

CALLS = 20_000
_NS = 1e9


def warm(pool_name: str, conninfo: str, rounds: int = ROUNDS) -> None:
    """Print nanoseconds of a warm pair of calls, and the ratio."""
    pool = shmpool.Pool(pool_name)
    theirs = ThreadedConnectionPool(1, 4, conninfo)

    def ours_once() -> None:
        pool.checkin(pool.checkout("bench"))

    def theirs_once() -> None:
        theirs.putconn(theirs.getconn())

    def with_cursor() -> None:
        with pool.connection("bench") as conn, conn.cursor():
            pass

    def theirs_with_cursor() -> None:
        conn = theirs.getconn()
        with conn.cursor():
            pass
        theirs.putconn(conn)

    ours_once()
    calls = {
        "shmpool": ours_once,
        "ThreadedConnectionPool": theirs_once,
        "shmpool, with block and cursor": with_cursor,
        "ThreadedConnectionPool, with cursor": theirs_with_cursor,
    }
    found = alternate(
        {name: lambda call=call: timeit.timeit(call, number=CALLS) / CALLS * _NS for name, call in calls.items()},  # type: ignore[misc]
        rounds,
    )
    for name, values in found.items():
        print(f"  {name:40} {Quartiles.of(values):.0f} ns")
    print(f"  ratio, bare pair of calls                {ratio(found, 'shmpool', 'ThreadedConnectionPool'):.3f}")
    both = ratio(found, "shmpool, with block and cursor", "ThreadedConnectionPool, with cursor")
    print(f"  ratio, with a cursor                     {both:.3f}")
    print(f"  noise of the peer                        {noise(found['ThreadedConnectionPool'])}")
    theirs.closeall()
    pool.close()
