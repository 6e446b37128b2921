"""Creating, verifying and publishing the shared segment."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmpool import layout, segment
from shmpool.errors import MechanismError, SegmentMismatchError, SegmentMissingError
from shmpool.layout import HEADER, PAGE_BYTES, WORD_BYTES
from shmpool.names import Names
from shmpool.segment import Segment
from shmpool.states import SegmentState
from tests.support.pools import SHAPE, pool_settings, remove_all, unique_names


@pytest.fixture
def names() -> Iterator[Names]:
    """Names of a pool of this test alone; whatever it makes is removed."""
    names = unique_names()
    yield names
    remove_all(names)


@pytest.fixture
def made(names: Names) -> Iterator[Segment]:
    """An OPEN segment."""
    made = segment.create(names, SHAPE)
    made.set_header("state", SegmentState.OPEN)
    yield made
    made.release()


def test_create_and_attach_share_every_word(made: Segment, names: Names) -> None:
    """What one mapping stores, the other loads; the layout comes from the header."""
    other = segment.attach(names)
    made.words[made.layout.at(layout.SLOT_WORDS, 3)] = 2**64 - 1
    made.times[made.layout.at(layout.SLOTS, 0, "since")] = 1.5
    assert other.layout == SHAPE
    assert other.words[SHAPE.at(layout.SLOT_WORDS, 3)] == 2**64 - 1
    assert other.times[SHAPE.at(layout.SLOTS, 0, "since")] == 1.5
    assert other.token == made.token != 0
    other.release()


def test_create_never_takes_what_is_there(made: Segment, names: Names) -> None:
    """A name that is taken is an error, and stays as it is."""
    with pytest.raises(FileExistsError):
        segment.create(names, SHAPE)
    assert made.is_in_place()


def test_create_makes_it_private(names: Names) -> None:
    """The segment has the given mode whatever the umask says, and all its memory."""
    old = os.umask(0o777)
    try:
        made = segment.create(names, SHAPE, mode=0o660)
    finally:
        os.umask(old)
    info = names.segment.stat()
    assert info.st_mode & 0o7777 == 0o660
    assert info.st_size == SHAPE.size_bytes
    assert info.st_blocks * 512 >= SHAPE.size_bytes
    made.release()


def test_nothing_there_is_missing(names: Names) -> None:
    """Without a segment the error names it and asks for the coordinator."""
    with pytest.raises(SegmentMissingError, match="is a coordinator running"):
        segment.attach(names)


def test_creating_is_missing_but_for_repair(made: Segment, names: Names) -> None:
    """A segment in the making is not attached, except by who repairs it."""
    made.set_header("state", SegmentState.CREATING)
    with pytest.raises(SegmentMissingError, match="just creating"):
        segment.attach(names)
    segment.attach(names, to_repair=True).release()


def test_retired_can_be_read(made: Segment, names: Names) -> None:
    """A RETIRED segment is attached for status; it takes no rows (rows.py)."""
    made.set_header("state", SegmentState.RETIRED)
    other = segment.attach(names)
    assert other.state is SegmentState.RETIRED
    other.release()


def test_another_owner_is_refused(made: Segment, names: Names) -> None:
    """A segment that belongs to another uid than its name says is not touched."""
    other = names._replace(uid=names.uid + 1)
    os.rename(names.segment, other.segment)
    try:
        with pytest.raises(SegmentMismatchError, match=f"belongs to uid {names.uid}, expected uid"):
            segment.attach(other)
    finally:
        os.rename(other.segment, names.segment)


def test_a_mode_for_everybody_is_refused(made: Segment, names: Names) -> None:
    """A world-accessible segment is refused."""
    names.segment.chmod(0o666)
    with pytest.raises(SegmentMismatchError, match="mode 0666 lets everybody in"):
        segment.attach(names)


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_other_kinds_of_files_are_refused(names: Names, kind: str) -> None:
    """A symbolic link, a directory or a pipe under the name is refused, without waiting on it."""
    if kind == "symlink":
        names.segment.symlink_to("/dev/zero")
    elif kind == "directory":
        names.segment.mkdir()
    else:
        os.mkfifo(names.segment, 0o600)
    try:
        with pytest.raises(SegmentMismatchError, match=str(names.segment)):
            segment.attach(names)
    finally:
        if kind == "directory":
            names.segment.rmdir()
        else:
            names.segment.unlink()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("magic", 1, "magic is 0x1"),
        ("format", layout.FORMAT + 1, f"format is {layout.FORMAT + 1}, expected {layout.FORMAT}"),
        ("digest", 1, "layout digest is 0x1"),
        ("workers", 400, "size is"),
        ("workers", 0, "dimensions"),
        ("workers", 2**63, "dimensions"),
        ("endpoints", 257, "dimensions"),
        ("groups", 2**64 - 1, "dimensions"),
        ("size_bytes", 1, "size is 1, expected"),
        ("segment_inode", 1, "it is a copy"),
        ("state", 3, "state is 3"),
    ],
)
def test_a_wrong_header_is_refused(made: Segment, names: Names, column: str, value: int, message: str) -> None:
    """Each mismatch is a clear error: what was found, and what was expected."""
    made.set_header(column, value)
    with pytest.raises(SegmentMismatchError, match=message):
        segment.attach(names)


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, SHAPE.size_bytes - 1])
def test_a_truncated_segment_is_refused(names: Names, size: int) -> None:
    """A segment that lost its end is refused, never read past it."""
    made = segment.create(names, SHAPE)
    made.set_header("state", SegmentState.OPEN)
    made.release()
    os.truncate(names.segment, size)
    with pytest.raises((SegmentMismatchError, SegmentMissingError)):
        segment.attach(names)


def test_a_copy_is_refused(made: Segment, names: Names) -> None:
    """A byte-exact copy is not the segment: its inode is another one."""
    copy = unique_names()
    try:
        shutil.copy(names.segment, copy.segment)
        copy.segment.chmod(0o600)
        with pytest.raises(SegmentMismatchError, match="it is a copy"):
            segment.attach(copy)
    finally:
        remove_all(copy)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(HEADER.columns) - 1),
            st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_scribbled_header_gives_clear_errors_only(made: Segment, names: Names, stores: list[tuple[int, int]]) -> None:
    """Whatever is written into the header: attaching and reading work, or raise the family's errors."""
    saved = made.words[: HEADER.row_words].tolist()
    try:
        made.publish(pool_settings())
        for column, value in stores:
            made.words[column] = value
        message = str(names.segment)
        try:
            other = segment.attach(names)
            with contextlib.ExitStack() as stack:
                stack.callback(other.release)
                other.read_settings()
        except MechanismError as error:
            message = str(error)
        assert str(names.segment) in message
    finally:
        for at, value in enumerate(saved):
            made.words[at] = value


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3 * PAGE_BYTES))
def test_any_file_gives_clear_errors_only(names: Names, content: bytes) -> None:
    """Any file under the name gives the family's errors."""
    names.segment.write_bytes(content)
    names.segment.chmod(0o600)
    with pytest.raises(MechanismError, match=str(names.segment)):
        segment.attach(names)


def test_publish_and_read(made: Segment) -> None:
    """What is published is what is read; each publication is a new generation."""
    first, second = pool_settings("one"), pool_settings("two")
    made.publish(first)
    assert made.read_settings() == (1, first)
    made.publish(second)
    assert made.read_settings() == (2, second)


def test_unpublished_and_torn_configurations_are_clear_errors(made: Segment) -> None:
    """No configuration, or one whose CRC is wrong, is an error that says so, within bounded time."""
    with pytest.raises(SegmentMismatchError, match="no configuration was published"):
        made.read_settings()
    made.publish(pool_settings())
    start, _ = SHAPE.config_area(1)
    made.words[start // WORD_BYTES] ^= 1
    with pytest.raises(SegmentMismatchError, match="CRC of configuration 1 is wrong"):
        made.read_settings()


def test_a_publisher_that_dies_leaves_the_old_configuration(made: Segment) -> None:
    """Killed before the generation is stored, a publisher leaves the old configuration whole."""
    made.publish(pool_settings("old"))
    start, end = SHAPE.config_area(0)  # the next generation's area
    for at in range(start // WORD_BYTES, end // WORD_BYTES):
        made.words[at] = 0x5A5A5A5A5A5A5A5A
    made.set_header("config_length_0", 17)
    made.set_header("config_crc_0", 4)
    assert made.read_settings() == (1, pool_settings("old"))


def test_too_large_a_configuration_changes_nothing(made: Segment) -> None:
    """A configuration that does not fit is refused before anything is stored."""
    made.publish(pool_settings())
    large = pool_settings()._replace(config_file="x" * layout.CONFIG_AREA_BYTES)
    with pytest.raises(ValueError, match="65536 fit"):
        made.publish(large)
    assert made.read_settings() == (1, pool_settings())


def test_a_released_segment_fails_loudly(made: Segment, names: Names) -> None:
    """After release every access raises ValueError; releasing again does nothing."""
    other = segment.attach(names)
    other.release()
    other.release()
    with pytest.raises(ValueError, match="released"):
        other.header("state")


def test_unlink_leaves_a_successor_alone(made: Segment, names: Names) -> None:
    """unlink removes the name only while it leads to this very segment."""
    os.rename(names.segment, names.lock)  # keeps the inode in use
    successor = segment.create(names, SHAPE)
    assert not made.is_in_place()
    made.unlink()
    assert successor.is_in_place()
    successor.unlink()
    assert not names.segment.exists()
    successor.release()


def test_a_private_page_is_zero_in_a_child() -> None:
    """The page that tells of a fork keeps its words here and reads zero in a child."""
    page = segment.private_page()
    page[0] = 7
    pid = os.fork()
    if pid == 0:
        os._exit(page[0])
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert page[0] == 7


FULL = """
import sys
from pathlib import Path
from shmpool import segment
from shmpool.layout import Layout
from shmpool.names import Names
names = Names.of("full")
try:
    segment.create(names, Layout(128, 32, 16, 32))
except OSError as error:
    assert "needs 786432 bytes, 65536 are free; enlarge /dev/shm" in str(error), error
    assert not names.segment.exists()
    sys.exit(0)
sys.exit("created in spite of a full file system")
"""


def test_a_full_file_system_fails_at_creation() -> None:
    """With no room in /dev/shm creation fails with the size it needs, and leaves nothing."""
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*command, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no user and mount namespaces here")
    done = subprocess.run(
        [*command, "sh", "-c", script, "sh", sys.executable, "-c", FULL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_failed_creation_leaves_nothing(names: Names) -> None:
    """Whatever else keeps the memory from being allocated: the name is removed again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            segment.create(names, SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names.segment.exists()
