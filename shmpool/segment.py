"""The shared-memory object: create, attach, verify, publish the configuration, let go.  The only mmap.

Writers.  The header and the configuration areas belong to the coordinator.
Stale reads.  The configuration is read again until its generation and CRC agree with what was read.
If a process dies.  While it creates: `state` is still CREATING, nobody attaches, the next coordinator starts over.
    While it publishes: the old generation still names the old, whole area.
Fork.  The mapping is shared with a child; `release` makes every later access raise ValueError in this process.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
import zlib
from typing import Any, Final

import msgpack

from shmpool import access, layout
from shmpool.errors import SegmentMismatchError, SegmentMissingError
from shmpool.layout import HEADER, Layout
from shmpool.names import ROOM_CURE, SHM_DIR, Names
from shmpool.settings import PoolSettings
from shmpool.states import SegmentState

_READ_TRIES: Final = 100
_MADV_WIPEONFORK: Final = 18  # Linux 4.14; the mmap module has no name for it


class Segment:
    """An attached segment.

    `words` and `times` are two views of the same cells: unsigned 64-bit words, and doubles.
    `words[i] = v` and `words[i]` are one aligned 8-byte store and load.
    """

    def __init__(self, names: Names, memory: mmap.mmap, shape: Layout, inode: int) -> None:
        self.names = names
        self.layout = shape
        self.inode = inode
        self._memory = memory
        self._bytes = memoryview(memory)
        whole = self._bytes[: shape.size_bytes]
        self.words = whole.cast("Q")
        self.times = whole.cast("d")

    def __repr__(self) -> str:
        return f"<Segment {self.names.stem} {self.layout}>"

    def header(self, column: str) -> int:
        """Return a word of the header."""
        return self.words[self.layout.at(HEADER, 0, column)]

    def set_header(self, column: str, value: int) -> None:
        """Store a word of the header (coordinator only)."""
        self.words[self.layout.at(HEADER, 0, column)] = value

    @property
    def state(self) -> SegmentState:
        """Whether it may be attached."""
        return SegmentState(self.header("state"))

    @property
    def token(self) -> int:
        """The random part of the semaphores' names."""
        return self.header("token")

    def is_in_place(self) -> bool:
        """Whether the name still leads to this segment (cleaners remove files under a running pool)."""
        try:
            return os.stat(self.names.segment).st_ino == self.inode
        except FileNotFoundError:
            return False

    def publish(self, settings: PoolSettings) -> None:
        """Make `settings` the current configuration (coordinator only).

        Raises:
            ValueError: it does not fit into the configuration area.
        """
        raw: bytes = msgpack.packb(settings.as_dict())
        if len(raw) > layout.CONFIG_AREA_BYTES:
            raise ValueError(
                f"the configuration takes {len(raw)} bytes, {layout.CONFIG_AREA_BYTES} fit; "
                "shorten conninfo and settings"
            )
        generation = self.header("config_generation") + 1
        area = generation % layout.CONFIG_AREAS
        start, _ = self.layout.config_area(area)
        self._bytes[start : start + len(raw)] = raw
        self.set_header(f"config_length_{area}", len(raw))
        self.set_header(f"config_crc_{area}", zlib.crc32(raw))
        self.set_header("config_generation", generation)

    def read_settings(self) -> tuple[int, PoolSettings]:
        """Return the current configuration and its generation.

        Raises:
            SegmentMismatchError: no whole configuration can be read.
        """
        found = "no configuration was published"
        for _ in range(_READ_TRIES):
            generation = self.header("config_generation")
            if generation == 0:
                break
            area = generation % layout.CONFIG_AREAS
            start, end = self.layout.config_area(area)
            length = self.header(f"config_length_{area}")
            raw = bytes(self._bytes[start : min(start + length, end)])
            crc = self.header(f"config_crc_{area}")
            if self.header("config_generation") != generation:
                continue
            if zlib.crc32(raw) != crc:
                found = f"the CRC of configuration {generation} is wrong"
                time.sleep(0.001)
                continue
            try:
                return generation, PoolSettings.from_dict(msgpack.unpackb(raw))
            except (KeyError, TypeError, ValueError) as error:
                found = f"configuration {generation} cannot be read ({error!r})"
                break
        raise SegmentMismatchError(f"segment {self.names.segment}: {found}; restart the coordinator")

    def release(self) -> None:
        """Let go of the mapping: every later access through this object raises ValueError.  May be repeated."""
        self.words.release()
        self.times.release()
        self._bytes.release()
        with contextlib.suppress(BufferError):  # a slice that somebody still holds goes with its holder
            self._memory.close()

    def unlink(self) -> None:
        """Remove the name, if it still leads here (coordinator only)."""
        if self.is_in_place():
            os.unlink(self.names.segment)


def private_page() -> memoryview:
    """Return one private page of words that reads as zeros in any forked child.

    The kernel wipes it (MADV_WIPEONFORK), also where no at-fork handler runs; a load from it costs a tenth of getpid.
    """
    page = mmap.mmap(-1, layout.PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.madvise(_MADV_WIPEONFORK)
    return memoryview(page).cast("Q")


def create(names: Names, shape: Layout, *, mode: int = 0o600, gid: int = -1) -> Segment:
    """Make a new segment in state CREATING, with its memory allocated (a full /dev/shm fails here, not later).

    The caller holds the coordinator's lock, fills the tables and then stores OPEN.

    Raises:
        FileExistsError: something has this name already.
        OSError: no room in the shared-memory file system; nothing is left behind.
    """
    fd = os.open(names.segment, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, shape.size_bytes)
        if gid >= 0:
            os.fchown(fd, -1, gid)
        os.fchmod(fd, mode)
        inode = os.fstat(fd).st_ino
        segment = Segment(names, mmap.mmap(fd, shape.size_bytes), shape, inode)
    except OSError as error:
        os.unlink(names.segment)
        if error.errno == errno.ENOSPC:
            room = os.statvfs(SHM_DIR)
            told = f"the segment needs {shape.size_bytes} bytes, {room.f_bavail * room.f_frsize} are free; {ROOM_CURE}"
            raise OSError(error.errno, told, str(names.segment)) from None
        raise
    finally:
        os.close(fd)
    header: dict[str, int] = {
        "format": layout.FORMAT,
        "digest": layout.DIGEST,
        "size_bytes": shape.size_bytes,
        "workers": shape.workers,
        "slots_per_worker": shape.slots_per_worker,
        "endpoints": shape.endpoints,
        "groups": shape.groups,
        "token": int.from_bytes(os.urandom(8), "little") or 1,
        "segment_inode": inode,
        "created_wall": int(time.time()),
        "magic": layout.MAGIC,
    }
    for column, value in header.items():
        segment.set_header(column, value)
    return segment


def attach(names: Names, *, to_repair: bool = False) -> Segment:
    """Map an existing segment after checking that it is one, whole, of this layout and not somebody else's.

    Args:
        to_repair: also accept one that is not OPEN (coordinator and cleaners).

    Raises:
        SegmentMissingError: there is none, or it is not open yet.
        SegmentMismatchError: another owner, mode, format, layout or size; nothing was touched.
    """
    try:
        fd = os.open(names.segment, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SegmentMissingError(
            f"pool {names.pool!r}: no segment {names.segment}; is a coordinator running for uid {names.uid}?"
        ) from None
    except OSError as error:
        raise access.refusal(f"segment {names.segment}", names.segment, error.strerror) from None
    try:
        info = os.fstat(fd)
        access.check(f"segment {names.segment}", info, names.uid)
        if info.st_size < layout.PAGE_BYTES:
            raise SegmentMissingError(f"segment {names.segment}: being created, {info.st_size} bytes so far")
        memory = mmap.mmap(fd, info.st_size)
    finally:
        os.close(fd)
    try:
        shape = _verified(names, memory, info)
    except BaseException:
        memory.close()
        raise
    segment = Segment(names, memory, shape, info.st_ino)
    if segment.state is SegmentState.CREATING and not to_repair:
        segment.release()
        raise SegmentMissingError(f"segment {names.segment}: a coordinator is just creating it")
    return segment


def _verified(names: Names, memory: mmap.mmap, info: os.stat_result) -> Layout:
    """Check the bytes against this version's layout and return the segment's own dimensions."""
    with memoryview(memory) as raw, raw[: layout.PAGE_BYTES].cast("Q") as words:
        values: dict[str, Any] = {c.name: words[i] for i, c in enumerate(HEADER.columns)}

    def expect(what: str, found: object, expected: object, cure: str) -> None:
        if found != expected:
            raise SegmentMismatchError(f"segment {names.segment}: {what} is {found}, expected {expected}; {cure}")

    if values["magic"] == 0 and values["state"] == SegmentState.CREATING:
        raise SegmentMissingError(f"segment {names.segment}: a coordinator is just creating it")
    expect(
        "magic",
        f"{values['magic']:#x}",
        f"{layout.MAGIC:#x}",
        "remove the file, it is not a segment",
    )
    cure = "stop the coordinator and all workers of the other version, or give this pool another name"
    expect("format", values["format"], layout.FORMAT, cure)
    expect("layout digest", f"{values['digest']:#x}", f"{layout.DIGEST:#x}", cure)
    shape = Layout(values["workers"], values["slots_per_worker"], values["endpoints"], values["groups"])
    sane = 0 < shape.slots <= 1 << 20 and 0 < shape.endpoints <= 256 and 0 < shape.groups <= 256
    expect("dimensions", shape if not sane else "sane", "sane", "remove the file")
    expect("size", values["size_bytes"], shape.size_bytes, "remove the file")
    expect("file size", info.st_size, shape.size_bytes, "remove the file")
    expect("inode", values["segment_inode"], info.st_ino, "it is a copy: remove the file")
    state = values["state"]
    expect("state", state if state >= len(SegmentState) else "known", "known", "remove the file")
    return shape
