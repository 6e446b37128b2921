"""The client's half of the control socket: connect, one request and its answer, or one message without.

Blocking, with a deadline.  A connection belongs to one process and one thread at a time.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, Final

from shmpool import access
from shmpool.errors import MechanismError
from shmpool.frames import Frames, Message, encode
from shmpool.names import Names

UNASKED: Final = frozenset({"recall", "config"})  # what the coordinator sends of its own accord
_CHUNK_BYTES: Final = 16 * 1024
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


class ControlError(MechanismError):
    """No coordinator answers on the control socket, or it refused the request."""


def connect(names: Names, timeout: float) -> socket.socket:
    """Open a connection to the pool's coordinator.

    Raises:
        ControlError: nobody listens, this process is not let in, or who listens is another user than the pool's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout)
    try:
        connection.connect(str(names.socket))
    except PermissionError as error:
        connection.close()
        raise ControlError(
            str(access.refusal(f"control socket {names.socket}", names.socket, error.strerror))
        ) from None
    except OSError as error:
        connection.close()
        raise ControlError(
            f"pool {names.pool!r}: no coordinator listens on {names.socket} ({error.strerror or error}); "
            f"is one running for uid {names.uid}?"
        ) from None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != names.uid:
        connection.close()
        raise ControlError(
            f"control socket {names.socket}: uid {uid} (pid {pid}) listens, expected uid {names.uid}; it is not the "
            "pool's coordinator: remove it as its owner, or as root"
        )
    return connection


def request(names: Names, kind: str, timeout: float = 5.0, **fields: Any) -> Message:
    """Send one message over a connection of its own and return the answer.

    Args:
        timeout: seconds, for everything together.

    Raises:
        ControlError: nobody listens, no answer in time, or the answer is an `error`.
    """
    deadline = time.monotonic() + timeout
    with connect(names, timeout) as connection:
        try:
            connection.sendall(encode(kind, **fields))
            answer = _answer(connection, deadline)
        except OSError as error:
            raise ControlError(f"pool {names.pool!r}: no answer to {kind!r} in {timeout:g} s ({error})") from None
    if answer["type"] == "error":
        raise ControlError(str(answer.get("reason", "the coordinator refused")))
    return answer


def tell(names: Names, kind: str, timeout: float, **fields: Any) -> None:
    """Send one message that has no answer.

    Args:
        timeout: seconds, to connect and to send.

    Raises:
        ControlError: nobody listens, or the message could not be sent in time.
    """
    with connect(names, timeout) as connection:
        try:
            connection.sendall(encode(kind, **fields))
        except OSError as error:
            raise ControlError(f"pool {names.pool!r}: {kind!r} could not be sent ({error})") from None


def _answer(connection: socket.socket, deadline: float) -> Message:
    frames = Frames()
    while True:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = connection.recv(_CHUNK_BYTES)
        if not data:
            raise ControlError("the coordinator closed the connection without an answer")
        for message in frames.feed(data):
            if message["type"] not in UNASKED:
                return message
