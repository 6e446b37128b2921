"""The description of the segment: its tables, their columns, who writes each, and where they lie.

Everything is made of aligned 64-bit words, so that one store or load is atomic.  A column is either a word (an
unsigned integer) or a time (a double: seconds of CLOCK_MONOTONIC; durations are seconds as well).  Two cells are
bytes: the configuration areas.  The digest covers every name, position and size, so that two builds with
different layouts never share a segment by accident.

Writers.  Each table names its writer; a column with another writer says so.  Owner means the process that holds
the record lock of the worker row (rows.py).
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Final, Literal, NamedTuple

FORMAT: Final = 1  # grows only with a major release; a golden test pins it and the digest
MAGIC: Final = int.from_bytes(b"SHMPOOL\x00", "little")
WORD_BYTES: Final = 8
PAGE_BYTES: Final = 4096
CONFIG_AREA_BYTES: Final = 64 * 1024
CONFIG_AREAS: Final = 2

Writer = Literal["coordinator", "owner"]


class Column(NamedTuple):
    """One word of a row.  `kind` tells how its 8 bytes are read."""

    name: str
    doc: str
    kind: Literal["word", "time"] = "word"
    writer: Writer | None = None  # None: the table's writer


class Table(NamedTuple):
    """A table of equal rows: `row_words` words each, of which the columns use the first ones."""

    name: str
    writer: Writer
    row_words: int
    columns: tuple[Column, ...]

    def column(self, name: str) -> int:
        """Return the position of a column in the row."""
        for position, column in enumerate(self.columns):
            if column.name == name:
                return position
        raise KeyError(f"table {self.name} has no column {name!r}")


def _time(name: str, doc: str) -> Column:
    return Column(name, doc, "time")


HEADER: Final = Table(
    "header",
    "coordinator",
    64,
    (
        Column("magic", "SHMPOOL and a zero byte"),
        Column("format", "version of the format"),
        Column("digest", "of this description"),
        Column("size_bytes", "of the whole segment"),
        Column("workers", "rows of the worker table"),
        Column("slots_per_worker", "slots of each worker row"),
        Column("endpoints", "rows of the endpoint table"),
        Column("groups", "rows of the group table"),
        Column("state", "states.SegmentState; stored last when a segment is created"),
        Column("token", "random; part of the semaphores' names"),
        Column("segment_inode", "of the segment itself"),
        Column("lock_inode", "of the lock file"),
        Column("created_wall", "seconds since 1970, for people"),
        Column("coordinator_pid", "0: none yet"),
        Column("coordinator_pid_namespace", "inode of its pid namespace"),
        Column("coordinator_start", "start time in clock ticks since boot"),
        Column("coordinator_adoptions", "coordinators that this segment has seen"),
        _time("heartbeat", "last tick of the coordinator"),
        Column("config_generation", "which configuration is current; its parity names the area"),
        Column("config_length_0", "bytes used in area 0"),
        Column("config_crc_0", "CRC-32 of them"),
        Column("config_length_1", "bytes used in area 1"),
        Column("config_crc_1", "CRC-32 of them"),
        Column("ticks", "ticks of the present coordinator"),
        Column("reaped_rows", "rows of dead workers that were reaped"),
        Column("reloads", "configurations published after the first"),
    ),
)

ENDPOINTS: Final = Table(
    "endpoints",
    "coordinator",
    32,
    (
        Column("status", "words.Status; 0: row not in use"),
        _time("probed_at", "when the last probe asked; 0 while it is being recorded"),
        _time("since", "last change of health, role or admin"),
        _time("latency", "of the last good probe"),
        _time("lag", "replay lag; negative: unknown"),
        Column("lag_bytes", "behind the primary's last known position"),
        Column("lsn", "write position of a primary, replay position of a replica"),
        Column("timeline", "0: unknown"),
        Column("system_identifier", "0: unknown"),
        Column("server_start_wall", "postmaster start, microseconds since 1970"),
        Column("server_version", "as in server_version_num"),
        Column("good", "consecutive good probes"),
        Column("bad", "consecutive bad probes"),
        Column("probes", "probes made"),
        Column("failures", "probes that failed"),
        Column("sessions", "server sessions of this pool at the last look"),
        _time("failing_since", "first of the failed probes in a row; 0: the last one was answered"),
    ),
)

GROUPS: Final = Table(
    "groups",
    "coordinator",
    16,
    (
        Column("in_use", "1: the row belongs to a configured or draining group"),
        Column("bell_inode", "of the semaphore that tells of a group permit"),
        Column("endpoint_bell_inode", "of the semaphore that tells of an endpoint permit"),
        Column("recalls", "connections recalled"),
    ),
)

PERMITS: Final = Table(
    "permits",
    "coordinator",
    8,
    (
        Column("control", "words.Control"),
        Column("semaphore_inode", "0: row not in use"),
        Column("audits", "audits that came to a result"),
        Column("lost_found", "lost permits that audits posted"),
        Column("out_of_bounds", "audits whose result was impossible"),
        Column("last_target", "target before the present resize"),
    ),
)

WORKERS: Final = Table(
    "workers",
    "owner",
    16,
    (
        Column("generation", "owners of this row so far; the reaper adds one as well"),
        Column("pid", "0: nobody yet; stays after the end"),
        Column("pid_namespace", "inode of the pid namespace in which pid counts"),
        Column("start", "start time in clock ticks since boot; with pid it names a process"),
        Column("server_generation", "which start or reload of the application server"),
        _time("attached_at", "when the row was taken"),
        Column("uid", "effective user of the owner"),
        Column("server", "states.ServerKind of the application server that the owner works for"),
        Column("server_pid", "its master process, in the same pid namespace; 0: none"),
    ),
)

SLOT_WORDS: Final = Table(
    "slot_words",
    "owner",
    1,
    (Column("word", "words.SlotWord; the coordinator writes it once ORPHAN is set"),),
)

USE_WORDS: Final = Table("use_words", "owner", 1, (Column("use", "words.UseWord"),))

RECALL_WORDS: Final = Table(
    "recall_words",
    "coordinator",
    1,
    (Column("recall", "slot word whose connection is wanted back, or with words.MOVE elsewhere; 0 or outdated: none"),),
)

SLOTS: Final = Table(
    "slots",
    "owner",
    16,
    (
        _time("since", "last checkout while IDLE or ACTIVE, else entry into the present use"),
        Column("backend_pid", "0 while OPENING"),
        _time("opened_at", "when the connection was claimed"),
        Column("endpoint_epoch", "epoch of the endpoint when it was opened"),
        Column("checkouts", "checkins counted"),
        Column("waits", "claims that had to wait"),
        _time("wait_total", "of all waits"),
        _time("wait_longest", "of all waits"),
        Column("timeouts", "waits that ended without a connection"),
        Column("opens", "connections opened"),
        _time("open_total", "time to open them"),
        Column("errors", "opens that failed"),
        Column("refused", "checkouts that were not let wait, as too many did"),
        Column("counted_group", "1 + group that the counters belong to; 0: none"),
        Column("queued", "threads of the process that wait behind this one"),
    ),
)

TABLES: Final = (
    HEADER,
    ENDPOINTS,
    GROUPS,
    PERMITS,
    WORKERS,
    SLOT_WORDS,
    USE_WORDS,
    RECALL_WORDS,
    SLOTS,
)


def _description() -> str:
    lines = [f"format {FORMAT}", f"config {CONFIG_AREAS} x {CONFIG_AREA_BYTES}"]
    for table in TABLES:
        lines.append(f"table {table.name} {table.row_words}")
        lines += [f"  {c.name} {c.kind}" for c in table.columns]
    return "\n".join(lines)


def _digest() -> int:
    """Return two checksums of the description in one word (zlib's: a worker need not load a hash library)."""
    described = _description().encode()
    return zlib.crc32(described) << 32 | zlib.adler32(described)


DIGEST: Final = _digest()

# The only columns that are read before the layout of a segment is known: their places never change.
MAGIC_AT, FORMAT_AT, DIGEST_AT, SIZE_AT = range(4)
DIMENSIONS_AT = range(4, 8)


def _rounded(words: int) -> int:
    page_words = PAGE_BYTES // WORD_BYTES
    return -(-words // page_words) * page_words


class Layout(NamedTuple):
    """Where each table of a segment with these dimensions lies.  All positions count words from the start."""

    workers: int
    slots_per_worker: int
    endpoints: int
    groups: int

    @property
    def slots(self) -> int:
        """Slots of all workers."""
        return self.workers * self.slots_per_worker

    @property
    def semaphores(self) -> int:
        """Permit semaphores that the segment has room for: groups first, then endpoints."""
        return self.groups + self.endpoints

    def rows(self, table: Table) -> int:
        """Return how many rows a table has."""
        if table is HEADER:
            return 1
        if table is ENDPOINTS:
            return self.endpoints
        if table is GROUPS:
            return self.groups
        if table is PERMITS:
            return self.semaphores
        if table is WORKERS:
            return self.workers
        return self.slots

    def at(self, table: Table, row: int = 0, column: str | int = 0) -> int:
        """Return the word position of a cell."""
        if not 0 <= row < self.rows(table):
            raise IndexError(f"{table.name} has {self.rows(table)} rows, not row {row}")
        offset = column if isinstance(column, int) else table.column(column)
        return _carved(self)[0][table.name] + row * table.row_words + offset

    def span(self, table: Table) -> tuple[int, int]:
        """Return the first word of a table and the word behind its last row."""
        start = _carved(self)[0][table.name]
        return start, start + self.rows(table) * table.row_words

    def config_area(self, area: int) -> tuple[int, int]:
        """Return the first byte of a configuration area and the byte behind it."""
        start = _carved(self)[1] * WORD_BYTES + area * CONFIG_AREA_BYTES
        return start, start + CONFIG_AREA_BYTES

    @property
    def size_bytes(self) -> int:
        """Size of the whole segment."""
        return _carved(self)[1] * WORD_BYTES + CONFIG_AREAS * CONFIG_AREA_BYTES

    def slot(self, row: int, slot: int) -> int:
        """Return the number of a slot among those of all workers."""
        return row * self.slots_per_worker + slot


@lru_cache(maxsize=8)
def _carved(shape: Layout) -> tuple[dict[str, int], int]:
    """Return the first word of each table, and the word behind the last one; each begins on a page of its own."""
    bases, end = {}, 0
    for table in TABLES:
        assert len(table.columns) <= table.row_words, table.name
        bases[table.name] = end
        end += _rounded(shape.rows(table) * table.row_words)
    return bases, end
