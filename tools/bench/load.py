"""A small load: a fixed number of requests over a few threads, each on a connection of its own."""

from __future__ import annotations

import argparse
import socket
import threading
import time

REQUEST = b"GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n"


def get(port: int, path: str = "/") -> bytes:
    """Return the answer to one request, headers included."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(REQUEST % path.encode())
        chunks = []
        while chunk := connection.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


def run(port: int, requests: int, threads: int) -> tuple[float, int]:
    """Send the requests; return the seconds they took together, and how many failed."""
    failed = 0
    lock = threading.Lock()

    def client(count: int) -> None:
        nonlocal failed
        for _ in range(count):
            try:
                is_good = get(port).split(b" ", 2)[1] == b"200"
            except OSError:
                is_good = False
            if not is_good:
                with lock:
                    failed += 1

    clients = [threading.Thread(target=client, args=(requests // threads,)) for _ in range(threads)]
    began = time.monotonic()
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return time.monotonic() - began, failed


def main() -> None:
    """Print seconds and failures: the load runs as a program of its own, so that it shares no interpreter."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=int)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    print(*run(options.port, options.requests, options.threads))


if __name__ == "__main__":
    main()
