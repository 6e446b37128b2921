"""The control socket: messages, bounds, and what is malformed."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from shmpool.control_client import ControlError, request
from shmpool.frames import MAX_FRAME_BYTES, FrameError, Frames, Message, encode
from shmpool.names import Names
from shmpool_coordinator import control
from shmpool_coordinator.control import Control, Peer, Reply, RequestError
from tests.support.waiting import wait_until


class Desk:
    """A control socket and the loop that serves it."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.ended: list[int] = []
        self.selector = selectors.EpollSelector()
        self.control = Control(names, self.selector, self._serve, self.ended.append, max_peers=4)

    def _serve(self, peer: Peer, message: Message) -> Reply | None:
        if message["type"] == "hello":
            peer.row = message["row"]
            self.control.watch(peer)
            return Reply("welcome", {"pid": 1})
        if message["type"] == "quiet":
            return None
        raise RequestError(f"{message['type']} is not known")

    def turn(self) -> None:
        """Serve what is ready."""
        for _ in range(5):
            for key, mask in self.selector.select(0.01):
                key.data(mask)

    def turn_until(self, condition: Callable[[], object]) -> None:
        """Serve until something holds."""

        def holds() -> bool:
            self.turn()
            return bool(condition())

        wait_until(holds)

    def connect(self) -> socket.socket:
        """Open a connection."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(self.names.socket))
        connection.settimeout(2.0)
        return connection

    def exchange(self, connection: socket.socket, data: bytes) -> list[Message]:
        """Send bytes and return the messages that come back."""
        connection.sendall(data)
        self.turn()
        return Frames().feed(connection.recv(65536))


@pytest.fixture
def desk(pool_name: str) -> Iterator[Desk]:
    """A control socket."""
    made = Desk(Names.of(pool_name))
    yield made
    made.control.close()
    made.selector.close()


MALFORMED = {
    "too long": struct.pack("<I", MAX_FRAME_BYTES + 1),
    "not msgpack": struct.pack("<I", 1) + b"\xc1",
    "empty": struct.pack("<I", 0),
    "not a map": struct.pack("<I", 1) + b"\x01",
    "no type": struct.pack("<I", 4) + b"\x81\xa1v\x01",
    "unhashable keys": struct.pack("<I", 3) + b"\x81\x90\x01",
    "other version": encode("hello").replace(b"\xa1v\x01", b"\xa1v\x02"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_frame_gets_an_error_and_the_end(desk: Desk, data: bytes) -> None:
    """What is no message is answered with an error, its connection is closed, and others are served on."""
    with desk.connect() as bad, desk.connect() as good:
        (answer,) = desk.exchange(bad, data)
        assert answer["type"] == "error"
        assert bad.recv(1) == b""
        assert desk.exchange(good, encode("hello", row=1))[0]["type"] == "welcome"


def test_unknown_message_gets_an_error_and_may_go_on(desk: Desk) -> None:
    """A well-formed message that cannot be served is answered, and the connection stays."""
    with desk.connect() as connection:
        assert desk.exchange(connection, encode("what"))[0]["reason"] == "what is not known"
        assert desk.exchange(connection, encode("hello", row=1))[0]["type"] == "welcome"


def test_message_in_pieces(desk: Desk) -> None:
    """A message may arrive byte by byte, and several at once."""
    with desk.connect() as connection:
        whole = encode("hello", row=1)
        for byte in whole[:-1]:
            connection.sendall(bytes([byte]))
            desk.turn()
        answers = desk.exchange(connection, whole[-1:] + whole)
        assert [answer["type"] for answer in answers] == ["welcome", "welcome"]


def test_end_of_a_worker_is_told(desk: Desk) -> None:
    """The row of a worker whose connection ended is told once; of others nothing is."""
    with desk.connect() as worker, desk.connect():
        desk.exchange(worker, encode("hello", row=3))
    desk.turn()
    assert desk.ended == [3]
    assert not desk.control.peers


def connected_by_child(desk: Desk, connection: socket.socket, row: int) -> int:
    """Fork a worker that connects an inherited socket, says hello and stays; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            connection.connect(str(desk.names.socket))
            connection.sendall(encode("hello", row=row))
            signal.pause()
        finally:
            os._exit(1)
    desk.turn_until(lambda: any(peer.row == row for peer in desk.control.peers))
    return pid


def killed(pid: int) -> None:
    """Kill a child and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_end_of_a_process_is_told_though_its_connection_stays(desk: Desk) -> None:
    """A worker whose connection somebody else keeps open: the end of its process is told, once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kept:
        pid = connected_by_child(desk, kept, 5)
        assert desk.ended == []
        killed(pid)
        desk.turn_until(lambda: desk.ended)
        desk.turn()
        assert desk.ended == [5]
        assert len(desk.control.peers) == 1


@pytest.mark.parametrize(
    "refusal", [PermissionError(errno.EPERM, "no"), OSError(errno.ENOSYS, "no"), AttributeError("no")], ids=repr
)
def test_without_pidfd_the_connection_has_to_do(
    desk: Desk, refusal: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where pidfds are refused one line says so and what to do, and ends of connections are told as ever."""
    monkeypatch.setattr(control, "_SO_PEERPIDFD", 9999)
    monkeypatch.setattr(os, "pidfd_open", Mock(side_effect=refusal))
    with caplog.at_level(logging.DEBUG):
        for row in (3, 4):
            with desk.connect() as worker:
                assert desk.exchange(worker, encode("hello", row=row))[0]["type"] == "welcome"
            desk.turn()
    assert desk.ended == [3, 4]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "(no): " in record.getMessage()
    assert "allow pidfd_open in the seccomp profile" in record.getMessage()


def test_unasked_messages_go_to_their_rows(desk: Desk) -> None:
    """A recall goes to the worker that owns the row, a new configuration to all workers."""
    with desk.connect() as first, desk.connect() as second:
        desk.exchange(first, encode("hello", row=1))
        desk.exchange(second, encode("hello", row=2))
        desk.control.send_rows({2}, "recall")
        desk.control.send_workers("config")
        assert [m["type"] for m in Frames().feed(first.recv(999))] == ["config"]
        assert [m["type"] for m in Frames().feed(second.recv(999))] == ["recall", "config"]


def test_number_of_connections_is_bounded(desk: Desk) -> None:
    """One connection too many is told so and closed."""
    connections = [desk.connect() for _ in range(5)]
    desk.turn()
    assert Frames().feed(connections[4].recv(999))[0]["reason"] == "4 connections are open already"
    for connection in connections:
        connection.close()
    desk.turn()


def test_worker_that_does_not_read_is_dropped(desk: Desk) -> None:
    """What waits to be sent is bounded."""
    with desk.connect() as connection:
        desk.exchange(connection, encode("hello", row=1))
        for _ in range(100_000):
            desk.control.send_workers("config")
            if not desk.control.peers:
                break
        assert not desk.control.peers


def test_stale_socket_is_replaced_and_mode_is_private(desk: Desk) -> None:
    """A socket file that a dead coordinator left is replaced; ours is for the user alone."""
    names = Names.of(desk.names.pool)
    assert os.stat(names.socket).st_mode & 0o777 == 0o600
    again = Control(names, desk.selector, lambda peer, message: None, lambda row: None)
    again.close()
    assert not names.socket.exists()


def test_client_says_that_nobody_listens(pool_name: str) -> None:
    """A request without a coordinator is a clear error."""
    with pytest.raises(ControlError, match="no coordinator listens"):
        request(Names.of(pool_name), "info", 0.2)


def test_frame_that_is_too_long_is_not_sent() -> None:
    """A message that the other side would refuse is an error here."""
    with pytest.raises(FrameError, match="expected at most"):
        encode("hello", text="x" * MAX_FRAME_BYTES)
