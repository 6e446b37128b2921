"""The load: a fixed number of clients, each of which sends its next request when the last one is answered.

One thread over epoll, so that it costs little beside the servers; its own CPU time is part of what it tells.  A
request has a connection of its own, and ends when the server closes it.  Begun requests are waited for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

HOST = "127.0.0.1"
REQUEST = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
GOOD = b" 200 "
DRAIN_S = 20.0  # for requests that were begun in time


@dataclass(frozen=True, slots=True)
class Told:
    """What one round of load found.  Times in seconds.

    Args:
        rate: requests per second, of those that ended in the measured time.
        requests: all, those of the warm-up included.
        errors: other answers than 200, broken connections, no answer; warm-up included.
        cpu: of this process.
    """

    rate: float
    p50: float
    p99: float
    longest: float
    requests: int
    errors: int
    cpu: float
    first_error: str = ""


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Load:
    """The clients of one round.

    Args:
        warm_up, seconds: not measured, then measured.
    """

    def __init__(self, port: int, clients: int, warm_up: float, seconds: float) -> None:
        self._address = (HOST, port)
        self._clients = clients
        self._warm_up, self._seconds = warm_up, seconds
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, float, bytearray]] = {}
        self._errors = 0
        self._first_error = ""

    def run(self) -> Told:
        """Send until the time is over."""
        began = time.perf_counter()
        measured_from = began + self._warm_up
        until = measured_from + self._seconds
        requests = completed = 0
        latencies: list[float] = []
        for _ in range(self._clients):
            self._begin()
        while self._open and time.perf_counter() < until + DRAIN_S:
            for number, _ in self._poll.poll(0.1):
                sent = self._read(number)
                if sent is None:
                    continue
                now = time.perf_counter()
                requests += 1
                if measured_from <= sent < until:
                    latencies.append(now - sent)
                completed += measured_from <= now < until
                if now < until:
                    self._begin()
        if self._open:
            self._fail(f"{len(self._open)} requests without an answer", len(self._open))
        ordered = sorted(latencies) or [math.nan]
        return Told(
            rate=completed / self._seconds,
            p50=percentile(ordered, 0.5),
            p99=percentile(ordered, 0.99),
            longest=ordered[-1],
            requests=requests,
            errors=self._errors,
            cpu=sum(os.times()[:2]),
            first_error=self._first_error,
        )

    def _begin(self) -> None:
        connection = socket.socket()
        sent = time.perf_counter()
        connection.connect(self._address)  # over loopback at once
        connection.send(REQUEST)
        connection.setblocking(False)
        self._open[connection.fileno()] = (connection, sent, bytearray())
        self._poll.register(connection, select.EPOLLIN)

    def _read(self, number: int) -> float | None:
        """Read what came; return when the request was sent once its answer is whole."""
        connection, sent, answer = self._open[number]
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return None
        except OSError as error:
            data = b""
            answer[:] = repr(error).encode()
        if data:
            answer += data
            return None
        del self._open[number]
        connection.close()
        if GOOD not in answer[:16]:
            self._fail(answer.rpartition(b"\r\n")[2].decode(errors="replace") or "closed without an answer")
        return sent

    def _fail(self, what: str, count: int = 1) -> None:
        self._errors += count
        self._first_error = self._first_error or what


def main() -> None:
    """Send one round of load and print what it found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int)
    parser.add_argument("warm_up", type=float)
    parser.add_argument("seconds", type=float)
    print(json.dumps(asdict(Load(**vars(parser.parse_args())).run())))


if __name__ == "__main__":
    main()
