"""A stand-in for servers of FalconAS's kind: processes with one interpreter each that serve one request after another.

Run: `python -m tests.integration.deployments.apps.serial_server PORT PROCESSES`.  Nothing here knows of the pool: no
hook runs, the application is loaded in each process by itself, and processes are ended by SIGTERM alone, without exit
functions.  A process that dies is replaced.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

HOST = "127.0.0.1"


class Quiet(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def serve(listener: socket.socket) -> NoReturn:
    """Load the application and serve, one request at a time."""
    from tests.integration.deployments.apps.wsgi_app import application  # here: each process loads it by itself

    server = WSGIServer((HOST, 0), Quiet, bind_and_activate=False)
    server.socket = listener
    server.base_environ = {"SERVER_NAME": HOST, "SERVER_PORT": str(listener.getsockname()[1]), "SCRIPT_NAME": ""}
    server.set_app(application)
    server.serve_forever()
    os._exit(0)


def spawn(listener: socket.socket) -> int:
    """Fork a process that serves."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serve(listener)
    return pid


def main(port: int, processes: int) -> None:
    """Keep so many processes until SIGTERM."""
    with socket.create_server((HOST, port), backlog=128) as listener:
        workers: set[int] = set()

        def end(*_: object) -> NoReturn:
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        while True:
            while len(workers) < processes:
                workers.add(spawn(listener))
            workers.discard(os.wait()[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
