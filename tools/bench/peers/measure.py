"""What is measured beside the requests: CPU time of process trees, sessions and refusals at the server."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg2

from tools.pg_cluster import Server

SAMPLE_S = 0.02
_TICK = os.sysconf("SC_CLK_TCK")
SESSIONS = """
SELECT usename, count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND usename LIKE 'bench\\_%' GROUP BY usename
"""
REFUSAL = 'too many connections for role "{role}"'


def cpu_of_tree(pid: int) -> float:
    """Return the CPU seconds of a process, its descendants, and those of them that have ended."""
    try:
        children = [
            int(child)
            for thread in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        ]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it just ended; its parent has its time
    return sum(map(int, fields[11:15])) / _TICK + sum(map(cpu_of_tree, children))


class Sampler:
    """Counts each role's sessions at the server, again and again, on a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._most: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._connection = psycopg2.connect(server.conninfo(application_name="sampler"))
        self._connection.autocommit = True
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._connection.close()

    def most(self, role: str) -> int:
        """Return the most sessions of a role seen since `forget`."""
        with self._lock:
            return self._most[role]

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._most.clear()

    def _run(self) -> None:
        with self._connection.cursor() as cursor:
            while not self._is_over.wait(SAMPLE_S):
                cursor.execute(SESSIONS)
                with self._lock:
                    for role, count in cursor.fetchall():
                        self._most[role] = max(self._most[role], count)


def refusals(server: Server, role: str) -> int:
    """Return how often the server refused a session beyond a role's limit: each one is a violated cap."""
    log = (server.root / f"{server.name}.log").read_text(errors="replace")
    return log.count(REFUSAL.format(role=role))
