"""A server that speaks another language: a proxy in front of a real one that rewrites its refusals.

Only until a connection is ready for queries; afterwards bytes pass as they are.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from psycopg2.extensions import make_dsn

HOST = "127.0.0.1"
RUSSIAN: Mapping[bytes, str] = {b"S": "ВАЖНО", b"M": 'пользователь "app" не прошёл проверку подлинности (по паролю)'}
_HEAD = struct.Struct("!cI")
_CHUNK_BYTES = 64 * 1024


def _read(source: socket.socket, count: int) -> bytes:
    """Read exactly so many bytes.  Raises EOFError."""
    data = b""
    while len(data) < count:
        chunk = source.recv(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def _translated(payload: bytes) -> bytes:
    """Return an ErrorResponse's fields with severity and message in Russian."""
    fields = [field for field in payload.split(b"\0") if field]
    told = [RUSSIAN[f[:1]].encode() if f[:1] in RUSSIAN else f[1:] for f in fields]
    return b"".join(f[:1] + text + b"\0" for f, text in zip(fields, told, strict=True)) + b"\0"


def _copy(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(_CHUNK_BYTES):
        target.sendall(data)


def _answer(server: socket.socket, client: socket.socket) -> None:
    """Pass a server's messages on, translated until it is ready for queries."""
    kind = b""
    while kind != b"Z":
        kind, length = _HEAD.unpack(_read(server, _HEAD.size))
        payload = _read(server, length - 4)
        if kind == b"E":
            payload = _translated(payload)
        client.sendall(_HEAD.pack(kind, len(payload) + 4) + payload)
    _copy(server, client)


class Translator:
    """Listens on a port of its own."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server((HOST, 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def conninfo(self, **keywords: str) -> str:
        """Return how to connect through it: in clear, so that it can read."""
        port = self._listener.getsockname()[1]
        return str(make_dsn(host=HOST, port=port, sslmode="disable", gssencmode="disable", **keywords))

    def close(self) -> None:
        """End every connection."""
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[..., None], *ends: socket.socket) -> None:
        thread = threading.Thread(target=self._run, args=(work, *ends))
        self._threads.append(thread)
        thread.start()

    def _run(self, work: Callable[..., None], *ends: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            work(*ends)
        for one in ends:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection((HOST, self._server_port))
            self._sockets += (client, server)
            self._start(_copy, client, server)
            self._start(_answer, server, client)


@contextmanager
def translating(port: int) -> Iterator[Translator]:
    """A proxy in front of the server on a port, for the length of a block."""
    translator = Translator(port)
    try:
        yield translator
    finally:
        translator.close()
