"""A TCP relay in front of one server or several: holds bytes back, delays them, or resets connections.

Loopback only.  A black hole keeps what it is sent, in both directions, closing included, until it ends: as a network
that drops packets does, whose peers send them again.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from tests.support.tls import SecuredSocket

HOST: Final = "127.0.0.1"
CHUNK_BYTES: Final = 65536
PROTOCOL_3: Final = 3  # major version in a start-up message; other messages before it (TLS?) have large codes
RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


End = socket.socket | SecuredSocket


class Relay:
    """Relays connections of `port` to a server until the `with` block ends; to several in turn.

    `requests` counts by user what clients sent after their start-up message, a read at a time: with clients that
    wait for each answer, their queries.
    """

    def __init__(
        self, *target_ports: int, host: str = HOST, port: int = 0, context: ssl.SSLContext | None = None
    ) -> None:
        """Listen.

        Args:
            target_ports: the servers', on HOST.
            host, port: where to listen; default: a free port.
            context: clients must come over TLS; what it protects goes on in clear.
        """
        self._targets = itertools.cycle(target_ports)
        self.context = context
        self._listener = socket.create_server((host, port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.delay_s = 0.0  # before each chunk, in both directions
        self.requests: dict[str, int] = {}
        self.connects: dict[str, int] = {}
        self._hole: set[str] = set()  # users, "" is everybody
        self._changed = threading.Condition()
        self._sockets: set[End] = set()
        self._threads: list[threading.Thread] = []
        self._is_ending = False
        self._is_resetting = False
        self._is_hanging_up = False
        self._unanswered = b""  # a request whose answer is kept back, once
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End; harmless when it has."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def black_hole(self, user: str = "") -> Iterator[None]:
        """Hold back everything, or what belongs to connections of one database user."""
        self._hole.add(user)
        try:
            yield
        finally:
            with self._changed:
                self._hole.discard(user)
                self._changed.notify_all()

    @contextmanager
    def delay(self, seconds: float) -> Iterator[None]:
        """Hold back each chunk for a while."""
        self.delay_s = seconds
        try:
            yield
        finally:
            self.delay_s = 0.0

    @contextmanager
    def resets(self) -> Iterator[None]:
        """Reset every connection that is open, and each new one."""
        self._is_resetting = True
        self.cut()
        try:
            yield
        finally:
            self._is_resetting = False

    @contextmanager
    def hang_ups(self) -> Iterator[None]:
        """End every connection that is open, and each new one when its client has told its user."""
        self._is_hanging_up = True
        self.cut()
        try:
            yield
        finally:
            self._is_hanging_up = False

    def lose_answer_to(self, request: bytes) -> None:
        """Hang up in the place of the server's answer to the next request that contains this; it was carried out."""
        self._unanswered = request

    def cut(self) -> None:
        """Reset every connection that is open."""
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                end.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it

    def _start(self, work: object, *arguments: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_resetting or self._is_ending:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                client.close()
            else:
                self._start(self._serve, client, next(self._targets))

    def _serve(self, plain: socket.socket, target: int) -> None:
        """Relay one connection; this thread passes on what the client sends, another what the server answers."""
        self._sockets.add(plain)
        try:
            client = plain if self.context is None else SecuredSocket(plain, self.context)
            server = socket.create_connection((HOST, target))
        except OSError:
            plain.close()
            return
        finally:
            self._sockets.discard(plain)
        self._sockets |= {client, server}
        user: list[str] = []
        lost = threading.Event()
        answers = threading.Thread(target=self._pass, args=(server, client, user, lost), name="relay", daemon=True)
        answers.start()
        self._pass(client, server, user, lost, is_client=True)
        answers.join()
        self._sockets -= {client, server}
        client.close()
        server.close()

    def _pass(
        self, source: End, target: End, user: list[str], lost: threading.Event, *, is_client: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if is_client:
                    self._note(data, user)
                    if self._is_hanging_up and user:
                        break
                    if self._unanswered and self._unanswered in data:
                        self._unanswered = b""
                        lost.set()
                elif lost.is_set():
                    break
                self._hold(user)
                target.sendall(data)
        self._hold(user)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _note(self, data: bytes, user: list[str]) -> None:
        if user:
            self.requests[user[0]] = self.requests.get(user[0], 0) + 1
        elif len(data) > 8 and struct.unpack("!H", data[4:6])[0] == PROTOCOL_3:
            words = data[8:].split(b"\0")
            user.append(dict(zip(words[::2], words[1::2], strict=False))[b"user"].decode())
            self.connects[user[0]] = self.connects.get(user[0], 0) + 1

    def _hold(self, user: list[str]) -> None:
        """Wait until a chunk may go on."""
        with self._changed:
            if self.delay_s:
                self._changed.wait_for(lambda: self._is_ending, timeout=self.delay_s)
            self._changed.wait_for(lambda: self._is_ending or not self._hole & {"", *user})
