"""Messages on the control socket: a 4-byte little-endian length, then one msgpack map.

Both sides use this module.  Every message has the keys `v` (version of the messages) and `type`.  Bounded: a longer
frame, or anything that is not such a map, is a FrameError and never more than that.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgpack

from shmpool.errors import MechanismError

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 64 * 1024
_LENGTH: Final = struct.Struct("<I")

Message = dict[str, Any]


class FrameError(MechanismError):
    """The bytes are no message; the connection they came over is of no further use."""


def encode(kind: str, **fields: Any) -> bytes:
    """Return one message as it goes over the socket.

    Raises:
        FrameError: it is too long.
    """
    body: bytes = msgpack.packb({"v": VERSION, "type": kind, **fields})
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"message {kind!r} takes {len(body)} bytes, expected at most {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """What has arrived of a stream of messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes in and return the messages that are whole now.

        Raises:
            FrameError: what arrived is no message.
        """
        self._pending += data
        messages = []
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"frame of {length} bytes, expected at most {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._pending) < end:
                break
            body = bytes(self._pending[_LENGTH.size : end])
            del self._pending[:end]
            messages.append(_decode(body))
        return messages


def _decode(body: bytes) -> Message:
    try:
        message = msgpack.unpackb(body)
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen unrelated classes for bad bytes
        raise FrameError(f"not msgpack ({type(error).__name__})") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("not a message, expected a map with the keys `v` and `type`")
    if message.get("v") != VERSION:
        raise FrameError(f"message version {message.get('v')!r}, expected {VERSION}")
    return message
