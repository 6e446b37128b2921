"""Load on a pool: a pre-fork server's shape, many processes with threads, each checking out, working, checking in.

Run: `python -m tests.support.load POOL GROUP --processes 16 --threads 4 --seconds 10`; prints a JSON summary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from typing import Any

from shmpool import Pool

QUERY = "SELECT pg_backend_pid() FROM pg_sleep(%s)"
TIMEOUT_S = 30.0


def run_thread(pool: Pool, group: str, until: float, hold_s: float, answer: dict[str, Any]) -> None:
    """Use connections until a time on the monotonic clock; note what was served and what went wrong."""
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            with pool.connection(group, timeout=TIMEOUT_S) as conn:
                answer["longest_wait"] = max(answer["longest_wait"], time.monotonic() - began)
                with conn.cursor() as cur:
                    cur.execute(QUERY, (hold_s,))
                    row = cur.fetchone()
                if row != (conn.get_backend_pid(),):
                    answer["errors"].append(f"answer {row} on {conn!r}")
            answer["served"] += 1
        except Exception as error:  # noqa: BLE001  the report names it
            answer["errors"].append(f"{type(error).__name__}: {error}")
            return


def run_process(pool: Pool, group: str, threads: int, until: float, hold_s: float) -> dict[str, Any]:
    """Run one worker process's threads and close its pool; return what they noted, summed up."""
    answers: list[dict[str, Any]] = [{"served": 0, "longest_wait": 0.0, "errors": []} for _ in range(threads)]
    running = [threading.Thread(target=run_thread, args=(pool, group, until, hold_s, answer)) for answer in answers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    pool.close()
    return {
        "pid": os.getpid(),
        "served": [answer["served"] for answer in answers],
        "longest_wait": max(answer["longest_wait"] for answer in answers),
        "errors": [error for answer in answers for error in answer["errors"]],
    }


def fork_worker(work: Any) -> tuple[int, int]:
    """Run a function in a child that writes its answer to a pipe; return the child's pid and the pipe's end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    status = 1
    try:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(work(), pipe)
        status = 0
    finally:
        os._exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Fork the workers, wait for them, print what they told."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.load", description=__doc__)
    parser.add_argument("pool")
    parser.add_argument("group")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--hold", type=float, default=0.002, help="seconds that each query takes at the server")
    options = parser.parse_args(arguments)
    pool = Pool(options.pool)  # made before the fork, as with --preload
    until = time.monotonic() + options.seconds
    children = [
        fork_worker(lambda: run_process(pool, options.group, options.threads, until, options.hold))
        for _ in range(options.processes)
    ]
    answers = []
    for pid, read in children:
        with os.fdopen(read) as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        answers.append(json.loads(told) if status == 0 and told else {"pid": pid, "errors": [f"status {status}"]})
    json.dump(answers, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
