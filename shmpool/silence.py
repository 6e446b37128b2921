"""Cut connections in use whose server is DOWN and does not answer this process either.

The coordinator's verdict alone cuts nothing: one that is cut off says DOWN of a server that works on a long query.  So
the background thread asks the server itself, beside the connection, whether it would speak TLS: whatever speaks
its protocol answers that with one byte, before it looks at users or at the room it has ("SSLRequest" in PostgreSQL's
message formats).  No answer, and what waits for that server is cut: its call raises ConnectionLost.
A server whose host refuses has closed its connections; those end by themselves.

Guarantees: only the socket that the connection was opened with is shut down, whatever closes meanwhile.
Threads.  The background thread alone works here; transaction status and descriptor are read while another thread waits
    in libpq: both are single loads.
If the call ends meanwhile.  The mark comes first, so a connection that was just answered is closed at checkin.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any, Final

from psycopg2 import InterfaceError
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, connection

from shmpool.connection import Connection

ASK_S: Final = 1.0  # what a server has to answer: as a probe's timeout
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)


def cut_unanswered(connections: Iterable[Connection]) -> int:
    """Cut those that wait for a server which does not answer; return how many.  May take ASK_S for each address.

    Args:
        connections: in use, at endpoints that are DOWN.
    """
    waiting: dict[Any, list[Connection]] = {}
    for conn in connections:
        address = _address_of(conn) if _waits(conn) else None
        if address is not None:
            waiting.setdefault(address, []).append(conn)
    return sum(_cut(conn) for address, found in waiting.items() if not _answers(*address) for conn in found)


def _waits(conn: Connection) -> bool:
    with contextlib.suppress(InterfaceError):
        return connection.get_transaction_status(conn) == TRANSACTION_STATUS_ACTIVE
    return False


def _twin(conn: Connection) -> socket.socket | None:
    """Return a duplicate of a connection's socket; None: it is closed, and the number may be another file's."""
    try:
        fd = os.dup(conn.fileno())
    except (InterfaceError, OSError):
        return None
    if os.fstat(fd).st_ino != conn.socket_inode:
        os.close(fd)
        return None
    return socket.socket(fileno=fd)


def _address_of(conn: Connection) -> tuple[int, Any] | None:
    twin = _twin(conn)
    if twin is None:
        return None
    with twin, contextlib.suppress(OSError):
        return twin.family, twin.getpeername()
    return None


def _answers(family: int, address: Any) -> bool:
    """Whether anything at an address says a byte, or refuses, in time."""
    with socket.socket(family) as asking:
        asking.settimeout(ASK_S)
        try:
            asking.connect(address)
            asking.sendall(_SSL_REQUEST)
            asking.recv(1)
        except (ConnectionRefusedError, ConnectionResetError):
            return True
        except OSError:
            return False
    return True


def _cut(conn: Connection) -> bool:
    twin = _twin(conn)
    if twin is None:
        return False
    with twin:
        if not _waits(conn):
            return False
        conn.is_cut = True
        conn.marks.append(None)
        with contextlib.suppress(OSError):  # the other end has just gone
            twin.shutdown(socket.SHUT_RDWR)
    return True
