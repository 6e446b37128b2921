"""Owner and mode of what a pool has in the file system; other users are in integration/test_privileges.py."""

from __future__ import annotations

import grp
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmpool import access, attachment, semaphores
from shmpool.control_client import ControlError, request
from shmpool.errors import SegmentMismatchError
from shmpool.names import Names, uid_of
from shmpool.observation import observe
from shmpool.rows import Locks, create_lock_file
from shmpool_coordinator.adoption import Access
from shmpool_coordinator.config import Config, ConfigError, parse
from tests.support.pools import OfflinePool, offline_pool, remove_all, unique_names
from tests.support.workers import in_child


@pytest.fixture
def pool() -> Iterator[OfflinePool]:
    """A pool without a coordinator."""
    with offline_pool() as made:
        yield made


def lock_file(pool: OfflinePool) -> Path:
    """Return the lock file."""
    return pool.names.lock


def permit(pool: OfflinePool) -> Path:
    """Return a semaphore of permits."""
    return pool.names.semaphore_path(pool.segment.token, "g", 0)


def bell(pool: OfflinePool) -> Path:
    """Return a bell."""
    return pool.names.semaphore_path(pool.segment.token, "b", 0)


@pytest.mark.parametrize("which", [lock_file, permit, bell])
def test_what_lets_everybody_in_is_refused_and_reported(
    pool: OfflinePool, which: Callable[[OfflinePool], Path]
) -> None:
    """A name of the pool that others may write to keeps workers out, and `status` says which one it is."""
    path = which(pool)
    path.chmod(0o662)
    told = f"{path.name.removeprefix('sem.')}: mode 0662 lets everybody in, expected 0600 or 0660"
    assert told in in_child(lambda: refusal_of(pool.names))  # this process has the lock file open already
    assert told in in_child(lambda: next(f.found for f in observe(pool.names).findings if f.code == "name-refused"))
    path.chmod(0o660)
    assert "name-refused" not in {finding.code for finding in observe(pool.names).findings}


def refusal_of(names: Names) -> str:
    """Return the error that joining a pool ends with."""
    with pytest.raises(SegmentMismatchError) as caught:
        attachment.join(names)
    return str(caught.value)


def test_lock_file_of_another_owner_is_refused() -> None:
    """A lock file that belongs to another uid than its name says is not taken for the pool's."""
    names = unique_names()
    other = names._replace(uid=names.uid + 1)
    os.close(os.open(other.lock, os.O_CREAT | os.O_EXCL, 0o600))
    try:
        for take in (Locks, create_lock_file):
            with pytest.raises(SegmentMismatchError, match=f"belongs to uid {names.uid}, expected uid {other.uid}"):
                take(other)
    finally:
        remove_all(other)


def test_semaphore_of_another_owner_is_refused() -> None:
    """A semaphore that belongs to another uid than its name says is not opened for the pool."""
    other = Names("web", os.geteuid() + 1)
    name = other.semaphore(1, "g", 0)
    semaphores.create(name, mode=0o600).close()
    try:
        with pytest.raises(SegmentMismatchError, match=f"belongs to uid {os.geteuid()}, expected uid {other.uid}"):
            semaphores.open_existing(name, semaphores.inode_of(name))
    finally:
        semaphores.unlink(name)


def test_listener_of_another_owner_is_not_spoken_to() -> None:
    """A process of another uid that listens in the coordinator's place gets no message."""
    names = unique_names()
    other = names._replace(uid=names.uid + 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other.socket))
        try:
            listener.listen()
            listener.settimeout(5)
            with pytest.raises(ControlError, match=rf"uid {names.uid} \(pid {os.getpid()}\) listens, expected uid"):
                request(other, "info")
            with listener.accept()[0] as connection:
                assert connection.recv(100) == b""
        finally:
            remove_all(other)


def test_refusal_tells_whose_it_is(tmp_path: Path) -> None:
    """What may not be opened is told with owner, group and mode, and what this process is."""
    path = tmp_path / "segment"
    path.touch(0o600)
    told = str(access.refusal("segment X", path, "Permission denied"))
    me = os.geteuid()
    assert f"segment X: cannot be opened (Permission denied): mode 0600 of uid {me} and gid " in told
    assert f"this process is uid {me} with groups " in told
    assert str(access.refusal("X", tmp_path / "gone", "why")) == "X: cannot be opened (why)"


def test_users_by_name_and_number() -> None:
    """A user is given by name or uid; an unknown name is told."""
    assert (uid_of("root"), uid_of("54321")) == (0, 54321)
    with pytest.raises(ValueError, match="found no user 'no such one'"):
        uid_of("no such one")


def test_group_by_name_and_number() -> None:
    """A configured group is looked up by name; a number stands for itself, and an unknown name is told."""
    gid = os.getegid()
    for group in (grp.getgrgid(gid).gr_name, str(gid)):
        assert Access.of(config_with(group)) == Access(0o660, gid)
    assert Access.of(config_with("")) == Access(0o600, -1)
    with pytest.raises(ConfigError, match=r'access\.group: found "no such one", which is no group here, expected'):
        Access.of(config_with("no such one"))


def config_with(group: str) -> Config:
    """Return a configuration with a unix group."""
    endpoints = {"pg1": {"conninfo": "host=h", "max_connections": 1}}
    raw = {"name": "web", "access": {"group": group}, "endpoints": endpoints, "groups": {"read": {"connections": 1}}}
    return parse(raw, "web.toml")
