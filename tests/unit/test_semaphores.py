"""Semaphores that are not where glibc would have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from shmpool import semaphores
from shmpool.errors import SegmentMismatchError
from tests.support.pools import remove_all, unique_names


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a semaphore that there is not."""
    names = unique_names()
    yield names.semaphore(1, "g", 0)
    remove_all(names)


def test_library_that_keeps_them_elsewhere_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made, but not under glibc's name for it (as musl does): a clear error, and it is removed again."""
    monkeypatch.setattr(semaphores, "SHM_DIR", tmp_path)
    with pytest.raises(SegmentMismatchError, match=r"not glibc \(Alpine's is musl\)"):
        semaphores.create(name, mode=0o600)
    monkeypatch.undo()
    assert not semaphores.inode_of(name)


def test_library_that_does_not_find_glibcs_is_told_from_a_lost_semaphore(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on musl beside a coordinator on glibc is told so; a semaphore that is gone is another error."""
    with pytest.raises(SegmentMismatchError, match="gone, though the segment names it"):
        semaphores.open_existing(name, 1)
    semaphores.create(name, mode=0o600).close()
    monkeypatch.setattr(semaphores, "Semaphore", Mock(side_effect=semaphores.ExistentialError))
    with pytest.raises(SegmentMismatchError, match=r"not glibc \(Alpine's is musl\)"):
        semaphores.open_existing(name, semaphores.inode_of(name))
