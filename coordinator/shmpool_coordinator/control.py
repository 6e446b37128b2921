"""The control socket: workers and command lines talk to the coordinator.

Non-blocking and bounded in everything: number of connections, bytes that wait to be read or written.  Whatever is
malformed gets an `error` message and a closed connection; nothing that a peer sends is fatal.

Guarantees: only the pool's user, root and the configured group's members are listened to (SO_PEERCRED).
Assumptions: used by the event loop's thread only; whoever makes it holds the coordinator's lock, so that a socket
file that is already there is a dead coordinator's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from shmpool.frames import FrameError, Frames, Message, encode
from shmpool.names import Names

BACKLOG: Final = 128
READ_BYTES: Final = 64 * 1024
MAX_UNSENT_BYTES: Final = 256 * 1024
_SO_PEERPIDFD: Final = 77  # Linux 6.5; not named by the socket module
_SO_PEERGROUPS: Final = 59  # Linux 4.13; the same
_GROUPS_BYTES: Final = 1024  # as much as getsockopt() takes
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid

log = logging.getLogger(__name__)


class RequestError(Exception):
    """A message that cannot be served; its text is the answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a message."""

    kind: str
    fields: dict[str, Any]


class Peer:
    """One connection."""

    def __init__(self, connection: socket.socket, pid: int, uid: int) -> None:
        self.connection = connection
        self.pid = pid  # as the kernel tells; 0 where it cannot be seen
        self.uid = uid
        self.row: int | None = None  # the worker row it said hello for
        self.generation = 0
        self.process: int | None = None  # its pidfd, once `Control.watch` was told to look at the process too
        self.frames = Frames()
        self.unsent = bytearray()
        self.is_closing = False  # once all is sent

    def __repr__(self) -> str:
        return f"<Peer pid {self.pid} row {self.row}>"


class Control:
    """The listening socket and its connections."""

    def __init__(
        self,
        names: Names,
        selector: selectors.BaseSelector,
        serve: Callable[[Peer, Message], Reply | None],
        on_worker_end: Callable[[int], None],
        *,
        mode: int = 0o600,
        gid: int = -1,
        max_peers: int = 1024,
    ) -> None:
        """Listen.

        Args:
            serve: answers one message (None: no answer); raises RequestError.
            on_worker_end: told the row of a worker whose connection ended.

        Raises:
            OSError: the socket cannot be made.
        """
        self.names = names
        self._selector = selector
        self._serve = serve
        self._on_worker_end = on_worker_end
        self._gid = gid
        self.max_peers = max_peers
        self.peers: set[Peer] = set()
        self._lacks_pidfd = False  # that was told
        self._mode = mode
        self._listen()

    def _listen(self) -> None:
        """Make the socket anew under its name."""
        path = self.names.socket
        try:
            path.unlink(missing_ok=True)
        except PermissionError as error:
            owner = os.lstat(path).st_uid
            told = f"belongs to uid {owner}, expected uid {self.names.uid}; remove it as its owner, or as root"
            raise PermissionError(error.errno, f"control socket: {told}", str(path)) from None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        old = os.umask(0o077)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(old)
        if self._gid >= 0:
            os.chown(path, -1, self._gid)
        os.chmod(path, self._mode)
        self._inode = os.stat(path).st_ino
        self._listener.listen(BACKLOG)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def restore(self) -> bool:
        """Listen anew if something removed the socket's name; return whether that was so.

        Connections that are open stay open.

        Raises:
            OSError: the socket cannot be made.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.names.socket).st_ino == self._inode:
                return False
        self._close_listener()
        self._listen()
        return True

    def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            self._listener.close()

    def close(self) -> None:
        """Send what fits, close everything and remove the socket."""
        self._close_listener()
        for peer in list(self.peers):
            with contextlib.suppress(OSError):
                peer.connection.send(peer.unsent)
            self._end(peer, tell=False)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.names.socket).st_ino == self._inode:
                os.unlink(self.names.socket)

    def send_rows(self, rows: set[int], kind: str) -> None:
        """Send a message without fields to the workers that own these rows."""
        for peer in [p for p in self.peers if p.row in rows]:
            self._send(peer, encode(kind))

    def send_workers(self, kind: str) -> None:
        """Send a message without fields to every worker."""
        for peer in [p for p in self.peers if p.row is not None]:
            self._send(peer, encode(kind))

    def watch(self, peer: Peer) -> None:
        """Take the end of the peer's process for the end of its worker, even if others keep its connection open.

        Where the kernel offers no pidfd or a sandbox refuses one, the end of the connection has to do.
        """
        if peer.process is not None:
            return
        try:
            peer.process = _open_process(peer)
        except ProcessLookupError:
            return  # it has just ended, and its connection is about to
        except (OSError, AttributeError) as error:  # the latter: a Python built without it
            self._tell_lack_of_pidfd(error)
            return
        self._selector.register(peer.process, selectors.EVENT_READ, lambda _: self._process_ended(peer))

    def _tell_lack_of_pidfd(self, error: Exception) -> None:
        if self._lacks_pidfd:
            return
        self._lacks_pidfd = True
        log.info(
            "control socket: no pidfd of a worker (%s): its end is noticed by its control connection and record lock, "
            "a tick later where a child keeps the connection open; for a pidfd allow pidfd_open in the seccomp profile "
            "(Linux 5.3), or have Linux 6.5 for workers in other pid namespaces",
            getattr(error, "strerror", None) or error,
        )

    # -- events ------------------------------------------------------------------------------------

    def _process_ended(self, peer: Peer) -> None:
        if peer.process is None:
            return  # its connection, which is ready at the same time, was served first
        self._forget_process(peer)
        if peer.row is not None:
            self._on_worker_end(peer.row)

    def _forget_process(self, peer: Peer) -> None:
        if peer.process is not None:
            self._selector.unregister(peer.process)
            os.close(peer.process)
            peer.process = None

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return  # the peer gave up, or no descriptor is free: it tries again
        connection.setblocking(False)
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        peer = Peer(connection, pid, uid)
        self.peers.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda mask: self._ready(peer, mask))
        if not self._is_allowed(connection, uid, gid):
            log.warning("control socket: uid %d (pid %d) refused", uid, pid)
            self._refuse(peer, f"uid {uid} may not use pool {self.names.pool!r} of uid {self.names.uid}")
        elif len(self.peers) > self.max_peers:
            self._refuse(peer, f"{self.max_peers} connections are open already")

    def _is_allowed(self, connection: socket.socket, uid: int, gid: int) -> bool:
        if uid in (self.names.uid, 0):
            return True
        return self._gid >= 0 and self._gid in (gid, *_further_groups(connection, uid))

    def _ready(self, peer: Peer, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and peer in self.peers:  # it may have ended earlier in this turn
            self._flush(peer)
        if mask & selectors.EVENT_READ and peer in self.peers:
            self._read(peer)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(peer)
            return
        if peer.is_closing:
            return
        try:
            for message in peer.frames.feed(data):
                self._answer(peer, message)
        except FrameError as error:
            self._refuse(peer, str(error))

    def _answer(self, peer: Peer, message: Message) -> None:
        if peer not in self.peers:
            return
        try:
            reply = self._serve(peer, message)
        except RequestError as error:
            self._send(peer, encode("error", reason=str(error)))
            return
        if reply is not None:
            self._send(peer, encode(reply.kind, **reply.fields))

    def _refuse(self, peer: Peer, reason: str) -> None:
        peer.is_closing = True
        self._send(peer, encode("error", reason=reason))

    def _send(self, peer: Peer, frame: bytes) -> None:
        if len(peer.unsent) + len(frame) > MAX_UNSENT_BYTES:
            log.warning("control socket: pid %d does not read its messages, closed", peer.pid)
            self._end(peer)
            return
        peer.unsent += frame
        self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        try:
            while peer.unsent:
                del peer.unsent[: peer.connection.send(peer.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._end(peer)
            return
        if peer.is_closing and not peer.unsent:
            self._end(peer)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        key = self._selector.get_key(peer.connection)
        if key.events != wanted:
            self._selector.modify(peer.connection, wanted, key.data)

    def _end(self, peer: Peer, *, tell: bool = True) -> None:
        if peer not in self.peers:
            return
        self.peers.discard(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._forget_process(peer)
        if tell and peer.row is not None:
            self._on_worker_end(peer.row)


def _further_groups(connection: socket.socket, uid: int) -> list[int]:
    """Return the supplementary groups of the process that connected; if the kernel does not tell, its user's."""
    with contextlib.suppress(OSError):
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        return [gid for (gid,) in struct.iter_unpack("I", raw)]
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid)
        return os.getgrouplist(user.pw_name, user.pw_gid)
    return []


def _open_process(peer: Peer) -> int:
    """Return a pidfd of the process that connected, else of the one that has its pid now.

    Raises:
        OSError, AttributeError: there is none to be had, a sandbox refuses it, or the process is gone.
    """
    try:
        return peer.connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        if not peer.pid:  # of another pid namespace: no number leads to it
            raise
    return os.pidfd_open(peer.pid)
