"""TLS in front of a server that has none: certificates of one's own, and the server's end of a connection.

libpq asks for TLS in clear and begins the handshake when the server agrees; so does `SecuredSocket`.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path
from typing import Final

import pytest

SSL_REQUEST: Final = struct.pack("!II", 8, 80877103)
GSS_REQUEST: Final = struct.pack("!II", 8, 80877104)
CHUNK_BYTES: Final = 65536


def require_openssl() -> None:
    """Skip the test where no certificate can be made; fail it in CI."""
    if shutil.which("openssl") is None:
        problem = "no certificate can be made: openssl is not installed"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)


class Certificate:
    """A certificate that vouches for itself, in `directory`/`name`.crt and .key."""

    def __init__(self, directory: Path, name: str, host: str) -> None:
        """Make it for one host name."""
        self.file = directory / f"{name}.crt"
        self._key = directory / f"{name}.key"
        made_of = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        names = ("-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}")
        files = ("-keyout", str(self._key), "-out", str(self.file))
        subprocess.run(["openssl", "req", "-x509", *made_of, *names, *files], check=True, capture_output=True)

    def context(self) -> ssl.SSLContext:
        """Return what a server with this certificate needs."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self._key)
        return context


class SecuredSocket:
    """The server's end of a connection over TLS, with those methods of a socket that a relay needs.

    One thread may receive while another one sends: what OpenSSL has to say goes through memory, under a lock.
    """

    def __init__(self, client: socket.socket, context: ssl.SSLContext) -> None:
        """Agree to TLS and shake hands.

        Raises:
            OSError: the client wants no TLS, or not with this certificate (ssl.SSLError).
        """
        self._socket = client
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()
        while (asked := client.recv(8, socket.MSG_WAITALL)) == GSS_REQUEST:
            client.sendall(b"N")
        if asked != SSL_REQUEST:
            raise ConnectionAbortedError("the client wants no TLS")
        client.sendall(b"S")
        is_done = False
        while not is_done:
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                self._flush()
                self._take()
        self._flush()

    def recv(self, count: int) -> bytes:
        """As a socket's."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(count)
                except ssl.SSLWantReadError:
                    self._flush()
                except ssl.SSLZeroReturnError:
                    return b""
            self._take()

    def sendall(self, data: bytes) -> None:
        """As a socket's."""
        with self._lock:
            self._tls.write(data)
            self._flush()

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """As a socket's."""
        self._socket.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """As a socket's, without a farewell: as a server that was killed."""
        self._socket.shutdown(how)

    def close(self) -> None:
        """As a socket's."""
        self._socket.close()

    def _take(self) -> None:
        """Wait for bytes of the client.  Raises ConnectionResetError at their end."""
        data = self._socket.recv(CHUNK_BYTES)
        if not data:
            raise ConnectionResetError("the client has gone")
        self._incoming.write(data)

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._socket.sendall(data)
