"""One worker process of the load: uses connections as told, and writes down each use.

Reads commands from standard input, a line each, and answers `done`:

    load    one thread uses a connection again and again, another one three at the same time every second
    burst   use all connections at the same time, once
    end     stop, write the uses to the file as JSON lines, exit
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tools.bench.failover.peers import CONNECTIONS, PEERS, Peer, Site, sqlstate

PAUSE_S: Final = 0.005
GROUP_EVERY_S: Final = 1.0
STATEMENTS: Final = {
    "read": "SELECT pg_sleep(0.002)",
    "write": "INSERT INTO failover_writes VALUES (now())",
}
END_S: Final = 3.0  # for uses that hang


class Load:
    """The uses of one process."""

    def __init__(self, peer: Peer, statement: str) -> None:
        self._peer = peer
        self._statement = statement
        self._uses: list[list[Any]] = []
        self._open: dict[int, list[Any]] = {}  # by thread
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin the steady load."""
        self._spawn(self._steadily)
        self._spawn(self._in_groups)

    def burst(self, count: int) -> None:
        """Use some connections at the same time: none goes back before each was taken, or could not be."""
        together = threading.Barrier(count)
        threads = [self._spawn(self._use, together) for _ in range(count)]
        for thread in threads:
            thread.join()

    def end(self) -> list[list[Any]]:
        """Stop, and return all uses; what hangs is given up."""
        self._is_over.set()
        deadline = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [[*use[:2], time.monotonic(), "hanging", *use[4:]] for use in list(self._open.values())]
        return [*self._uses, *hanging]

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _steadily(self) -> None:
        while not self._is_over.wait(PAUSE_S):
            self._use()

    def _in_groups(self) -> None:
        while not self._is_over.wait(GROUP_EVERY_S):
            self.burst(CONNECTIONS - 1)

    def _use(self, together: threading.Barrier | None = None) -> None:
        """Use a connection once; write down begin, checkout, end, outcome, host, session, SQLSTATE."""
        use: list[Any] = [time.monotonic(), None, None, "ok", "", 0, ""]
        self._open[threading.get_ident()] = use
        conn = after = None
        try:
            try:
                conn = self._peer.checkout()
                use[1] = time.monotonic()
                with suppress(Exception):  # a connection that is not there has no identity
                    use[4:6] = self._peer.identify(conn)
            finally:
                if together is not None:
                    _meet(together)
            use[1] = time.monotonic() if together is not None and use[1] else use[1]
            self._peer.execute(conn, self._statement)
            after = self._peer.identify(conn)
        except Exception as error:  # noqa: BLE001 - each pool has its own
            use[3], use[6] = type(error).__name__, sqlstate(error)
        use[2] = time.monotonic()
        if conn is not None:
            try:
                self._peer.checkin(conn)
            except Exception as error:  # noqa: BLE001
                use[3] = f"checkin: {type(error).__name__}"
        if use[3] == "ok" and after is not None:
            use[4:6] = after  # some pools replace a connection in the middle of a use
        self._uses.append(use)
        del self._open[threading.get_ident()]


def _meet(together: threading.Barrier) -> None:
    """Wait for the others, unless one of them is stuck."""
    with suppress(threading.BrokenBarrierError):
        together.wait(1.0)


def main() -> None:
    """Obey until `end`."""
    name, target, site = sys.argv[1], Path(sys.argv[2]), Site(**json.loads(sys.argv[3]))
    os.environ["PGAPPNAME"] = "bench"
    load = Load(PEERS[name](site), STATEMENTS[site.group])
    for line in sys.stdin:
        match line.strip():
            case "load":
                load.start()
            case "burst":
                load.burst(CONNECTIONS)
            case "end":
                target.write_text("".join(json.dumps(use) + "\n" for use in load.end()))
                break
        print("done", flush=True)
    print("done", flush=True)
    os._exit(0)  # a thread that hangs keeps nobody


if __name__ == "__main__":
    main()
