"""Reloads under load: what clients, the server and the shared memory show while old workers make room for new ones.

There are to be as many connections as workers: too few for old and new ones together.  The server enforces that, too:
it refuses the pool's role one session more, and its log says so, however short that session would have been.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Self

from shmpool.observation import observe
from shmpool.status import RowState
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import Clients, ExampleServer
from tests.support.serving import Role, Sampler
from tests.support.waiting import wait_until
from tools.pg_cluster import SUPERUSER, Server

CLIENTS: Final = 8
REQUEST: Final = "/slow?ms=5"
LOOK_EVERY_S: Final = 0.005
FURTHER: Final = 40  # requests after a reload
STEP_S: Final = 20.0
EXTRA: Final = f"""
[probe]
conninfo = "user={SUPERUSER}"
inter = "0.2s"
fastinter = "0.1s"
[coordinator]
linger = "60s"
"""


class TightRole(Role):
    """A role that the server allows so many sessions; its pools have as many connections."""

    def __init__(self, server: Server, name: str, sessions_max: int) -> None:
        super().__init__(server, name)
        self.sessions_max = sessions_max

    def __enter__(self) -> Self:
        super().__enter__()
        self.server.execute(f"ALTER ROLE {self.name} CONNECTION LIMIT {self.sessions_max}")
        return self

    @property
    def refusals(self) -> int:
        """How many sessions too many the server has refused."""
        return self.server.log.count(f'too many connections for role "{self.name}"')

    def queries(self, pattern: str) -> int:
        """Return how many of its sessions carry out a query now that is like a pattern."""
        found = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{self.name}' AND state = 'active'"
        return int(self.server.execute(f"{found} AND query LIKE '{pattern}'")[0][0])


def tight_config(pool: str, role: TightRole, *, per_worker_min: int = 0) -> str:
    """Return a configuration with as many connections as the role's sessions, in the group and at the endpoint."""
    group = f'connections = {role.sessions_max}\ntarget = "any"\nautocommit = true\ntimeout = "10s"\n'
    group += f"per_worker_min = {per_worker_min}"
    return pool_config(pool, {"pg1": endpoint_keys(role.conninfo, role.sessions_max)}, {"read": group}, EXTRA)


class Watch:
    """Looks at the segment again and again: what breaks an invariant, and how long old workers hold connections."""

    def __init__(self, server: ExampleServer) -> None:
        self.looks = 0
        self.violations: set[str] = set()
        self.waits: list[float] = []  # seconds from each reload until its old workers were last seen to hold one
        self._server = server
        self.old = 0  # server generations up to this one are
        self._began = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def begin(self) -> None:
        """Say that a reload begins: who serves now is old."""
        self.old = max(self._server.rows().values())
        self._began = time.monotonic()
        self.waits.append(0.0)

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_S):
            report = observe(self._server.names)
            self.violations.update(report.violations)
            self.looks += 1
            old = [w for w in report.workers if w.state is RowState.HELD and w.server_generation <= self.old]
            if self.waits and any(w.held for w in old):
                self.waits[-1] = time.monotonic() - self._began


class Reloads:
    """A server under load whose reloads are watched.

    Args:
        role: what its pool works as.
    """

    def __init__(self, server: ExampleServer, role: TightRole) -> None:
        self.server = server
        self.role = role
        self.clients = Clients(server, REQUEST, CLIENTS)
        self.sampler = Sampler(role)
        self.watch = Watch(server)

    def wait_for_more(self, count: int = FURTHER) -> None:
        """Return when so many further requests were answered."""
        seen = self.clients.served
        self.wait_until(lambda: self.clients.served >= seen + count)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for a step of a reload."""
        wait_until(condition, within=STEP_S, what=lambda: f"{self.clients.failures} {self.server.log}")

    def is_handed_over(self) -> bool:
        """Whether only workers of now have rows, newer ones than at the last `begin`, and no permit is missing."""
        rows = self.server.rows()
        return set(rows) <= self.server.workers() and min(rows.values()) > self.watch.old and self.server.is_whole()

    def check(self) -> None:
        """Fail unless the caps held at the server and in the segment, and new workers have everything now."""
        assert self.role.refusals == 0, "sessions above the cap, refused by the server"
        assert 0 < self.sampler.most <= self.role.sessions_max
        assert self.sampler.samples > 50
        assert self.watch.looks > 50
        assert self.watch.violations == set()
        wait_until(self.is_handed_over, what=lambda: f"{self.server.rows()} {self.server.log}")

    @property
    def figures(self) -> str:
        """What a reader wants to know."""
        times = sorted(self.clients.times)
        waits = ", ".join(f"{seconds:.2f}" for seconds in self.watch.waits)
        return (
            f"{self.clients.served} requests, {len(self.clients.failures)} failed, median "
            f"{statistics.median(times) * 1000:.0f} ms, longest {times[-1] * 1000:.0f} ms; at most {self.sampler.most} "
            f"sessions in {self.sampler.samples} samples, {self.role.refusals} refused; old workers held connections "
            f"for {waits} s"
        )


@contextmanager
def under_load(server: ExampleServer, role: TightRole, title: str) -> Iterator[Reloads]:
    """Load a server while the block reloads it; check, and print what was seen, afterwards."""
    reloads = Reloads(server, role)
    server.use_all_workers()
    with reloads.sampler, reloads.watch, reloads.clients:
        reloads.wait_for_more()
        yield reloads
        reloads.wait_for_more()
    print(f"\n{title}: {reloads.figures}")
    reloads.check()
