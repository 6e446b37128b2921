"""What Gunicorn's master does when one of its workers has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmpool.frames import Frames
from shmpool.hooks.gunicorn import child_exit
from shmpool.names import Names

SERVER = SimpleNamespace(cfg=SimpleNamespace(uid=os.geteuid(), gid=os.getegid()), log=None)
WORKER = SimpleNamespace(pid=4711)


@pytest.fixture
def listener(pool_name: str) -> Iterator[socket.socket]:
    """A socket in the place of a coordinator's, which nobody serves."""
    path = Names.of(pool_name).socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(2)
        yield listener
    path.unlink()


@pytest.mark.parametrize("how", ["file", "name"])
def test_coordinator_is_told_to_look(
    listener: socket.socket, pool_name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is on its way when the hook returns; no answer is waited for, nothing of the pool is opened."""
    config = tmp_path / "pool.toml"
    config.write_text(f'name = "{pool_name}"\n')
    monkeypatch.setenv("SHMPOOL_CONFIG", str(config) if how == "file" else "")
    monkeypatch.setenv("SHMPOOL_NAME", pool_name if how == "name" else "")
    child_exit(SERVER, WORKER)
    connection, _ = listener.accept()
    with connection:
        (message,) = Frames().feed(connection.recv(999))
        assert (message["type"], message["pid"]) == ("look", WORKER.pid)
    assert not Names.of(pool_name).lock.exists()


@pytest.mark.parametrize(
    ("config", "name"),
    [("", ""), ("/nowhere/pool.toml", "Not a Name!"), ("", "{pool}")],
    ids=["unknown", "unreadable", "nobody listens"],
)
def test_master_goes_on_without_a_coordinator(
    config: str, name: str, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing, the hook does nothing and says nothing."""
    monkeypatch.setenv("SHMPOOL_CONFIG", config)
    monkeypatch.setenv("SHMPOOL_NAME", name.format(pool=pool_name))
    child_exit(SERVER, WORKER)
    assert Names.of(pool_name).leftovers() == []


def test_coordinator_that_accepts_nobody_costs_little(
    listener: socket.socket, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped coordinator whose queue is full does not hold the master up."""
    monkeypatch.setenv("SHMPOOL_CONFIG", "")
    monkeypatch.setenv("SHMPOOL_NAME", pool_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shmpool.hooks.gunicorn.TELL_S", 0.01)
        for _ in range(8):  # more than the queue holds
            child_exit(SERVER, WORKER)
