"""One endpoint's probe in a thread of its own, and the address that it goes to.

Guarantees: the event loop only asks and takes results; whatever blocks, a name's resolution too, is in the thread.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

from shmpool.clock import monotonic
from shmpool.states import Verdict
from shmpool_coordinator.health import ProbeResult
from shmpool_coordinator.probe import Probe, parse_conninfo


class Resolver:
    """The address of a conninfo's host, resolved anew from time to time (blocks: not for the event loop)."""

    def __init__(self, conninfo: str, every_s: float) -> None:
        keywords = parse_conninfo(conninfo)
        host = keywords.get("host", "")
        self._host = "" if keywords.get("hostaddr") or host.startswith(("/", "@")) else host
        self._port = keywords.get("port", "5432")
        self._every_s = every_s
        self._addresses: list[str] = []  # the one in use first
        self._due = 0.0

    def turn(self) -> None:
        """Look the name up anew before the next check, and try another of its addresses then if there is one."""
        self._due = 0.0
        self._addresses = self._addresses[1:] + self._addresses[:1]

    def address(self) -> str:
        """Return the address, "" where libpq is to find it; one that is still valid is kept.

        Raises:
            OSError: the name cannot be resolved, and never could.
        """
        if self._host and monotonic() >= self._due:
            self._due = monotonic() + self._every_s
            try:
                found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            except OSError:
                if not self._addresses:
                    self._due = 0.0
                    raise
                return self._addresses[0]
            now = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            kept = [address for address in self._addresses if address in now]
            self._addresses = kept + [address for address in now if address not in kept]
        return self._addresses[0] if self._addresses else ""


class Prober:
    """One endpoint's probe in a thread of its own: `go` asks for one check, its result is handed in."""

    def __init__(self, probe: Probe, resolver: Resolver, hand_in: Callable[[Prober, ProbeResult], None]) -> None:
        self._probe = probe
        self._resolver = resolver
        self._hand_in = hand_in
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.is_busy = False
        self.began = float("-inf")  # the last check
        self._thread = threading.Thread(target=self._run, name=repr(probe), daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Check once; the caller waits for the result before it asks again."""
        self.is_busy = True
        self.began = monotonic()
        self._requests.put(True)

    def end(self) -> None:
        """End the thread after the check it may be in."""
        self._requests.put(False)

    def _run(self) -> None:
        while self._requests.get():
            try:
                result = self._probe.check(self._resolver.address())
            except OSError as error:
                result = ProbeResult(verdict=Verdict.REFUSED, error=f"name not resolved: {error.strerror or error}")
            if result.verdict in (Verdict.REFUSED, Verdict.TIMEOUT):
                self._resolver.turn()
            self._hand_in(self, result)
        self._probe.close()
