"""The inventory: the semaphores of groups and endpoints, each made, recorded by its inode, opened and removed.

Writers.  The sole writer of the group rows' and the permits' inodes; clears the rows that nobody names any more.
Stale reads.  None of its own words: nobody else writes them.
If a process dies.  What it made for names that were not published yet, or no longer are, the next coordinator removes.
"""

from __future__ import annotations

from shmpool import semaphores
from shmpool.layout import ENDPOINTS, GROUPS, PERMITS, Table
from shmpool.segment import Segment
from shmpool.settings import PoolSettings
from shmpool_coordinator.permits import Permits


class Inventory:
    """The semaphores of one segment; those that are open are handed to its permits."""

    def __init__(self, segment: Segment, permits: Permits, *, mode: int, gid: int) -> None:
        """Have nothing open yet; `mode` and `gid` are for what is made (-1: no group)."""
        self._segment = segment
        self._permits = permits
        self._mode = mode
        self._gid = gid

    def open(self, settings: PoolSettings) -> None:
        """Open what an adopted segment records for these settings, and remove what it records beside.

        Raises:
            SegmentMismatchError: a name leads elsewhere.
        """
        self._clear_unpublished(settings)
        for group in settings.groups:
            self._open_group(group.index)
        for endpoint in settings.endpoints:
            self._open_permit(self._segment.layout.groups + endpoint.index)

    def make(self, settings: PoolSettings) -> None:
        """Make the semaphores of groups and endpoints that have none yet.

        Raises:
            OSError, SegmentMismatchError: one cannot be made; says why.
        """
        words, shape = self._segment.words, self._segment.layout
        for group in settings.groups:
            if not words[shape.at(GROUPS, group.index, "in_use")]:
                bells = [self._make(kind, group.index) for kind in "bw"]
                self._permits.add_bells(group.index, *bells)
                for kind, column in (("b", "bell_inode"), ("w", "endpoint_bell_inode")):
                    inode = semaphores.inode_of(self._name(kind, group.index))
                    words[shape.at(GROUPS, group.index, column)] = inode
                self._make_permit(group.index)
                words[shape.at(GROUPS, group.index, "in_use")] = 1
        for endpoint in settings.endpoints:
            number = shape.groups + endpoint.index
            if not words[shape.at(PERMITS, number, "semaphore_inode")]:
                self._make_permit(number)

    def drop_group(self, index: int) -> None:
        """Remove what nothing circulates in any more: its semaphores, and its rows for another name."""
        self._free_permit(index)
        self._clear_group(index)

    def drop_endpoint(self, index: int) -> None:
        """Remove what nothing circulates in any more: its semaphore, and its rows for another name."""
        self._free_permit(self._segment.layout.groups + index)
        self._clear(ENDPOINTS, index)

    def unlink(self) -> None:
        """Remove every semaphore that the segment records."""
        for name, _ in recorded_semaphores(self._segment):
            semaphores.unlink(name)

    def _clear_unpublished(self, settings: PoolSettings) -> None:
        """Finish what a coordinator that died while it added or dropped a row had begun: nobody knows these rows."""
        shape, words = self._segment.layout, self._segment.words
        groups = {g.index for g in settings.groups}
        known = groups | {shape.groups + e.index for e in settings.endpoints}
        for number in set(range(shape.semaphores)) - known:
            if words[shape.at(PERMITS, number, "semaphore_inode")]:
                semaphores.unlink(self._permit_name(number))
                self._clear(PERMITS, number)
        for index in set(range(shape.groups)) - groups:
            if self._group_word(index, "bell_inode"):
                self._clear_group(index)
        for index in range(shape.endpoints):
            if shape.groups + index not in known:
                self._clear(ENDPOINTS, index)

    def _clear_group(self, index: int) -> None:
        for kind in "bw":
            semaphores.unlink(self._name(kind, index))
        self._clear(GROUPS, index)

    def _open_group(self, index: int) -> None:
        self._open_permit(index)
        self._permits.add_bells(
            index,
            semaphores.open_existing(self._name("b", index), self._group_word(index, "bell_inode")),
            semaphores.open_existing(self._name("w", index), self._group_word(index, "endpoint_bell_inode")),
        )

    def _open_permit(self, number: int) -> None:
        inode = self._segment.words[self._segment.layout.at(PERMITS, number, "semaphore_inode")]
        self._permits.add(number, semaphores.open_existing(self._permit_name(number), inode))

    def _make(self, kind: str, index: int) -> semaphores.Semaphore:
        name = self._name(kind, index)
        semaphores.unlink(name)  # of a coordinator that died before it recorded the inode
        return semaphores.create(name, mode=self._mode, gid=self._gid)

    def _make_permit(self, number: int) -> None:
        words, at = self._segment.words, self._segment.layout.at(PERMITS, number)
        kind, index = _kind_and_index(self._segment, number)
        self._permits.add(number, self._make(kind, index))
        for column in ("control", "last_target"):
            words[at + PERMITS.column(column)] = 0
        words[at + PERMITS.column("semaphore_inode")] = semaphores.inode_of(self._permit_name(number))

    def _free_permit(self, number: int) -> None:
        semaphores.unlink(self._permit_name(number))
        self._clear(PERMITS, number)
        self._permits.remove(number)

    def _clear(self, table: Table, row: int) -> None:
        at = self._segment.layout.at(table, row)
        for position in range(len(table.columns)):
            self._segment.words[at + position] = 0

    def _name(self, kind: str, index: int) -> str:
        return self._segment.names.semaphore(self._segment.token, kind, index)

    def _permit_name(self, number: int) -> str:
        return _permit_name(self._segment, number)

    def _group_word(self, index: int, column: str) -> int:
        return self._segment.words[self._segment.layout.at(GROUPS, index, column)]


def _kind_and_index(found: Segment, number: int) -> tuple[str, int]:
    groups = found.layout.groups
    return ("g", number) if number < groups else ("e", number - groups)


def _permit_name(found: Segment, number: int) -> str:
    return found.names.semaphore(found.token, *_kind_and_index(found, number))


def recorded_semaphores(found: Segment) -> list[tuple[str, int]]:
    """Return name and inode of every semaphore that a segment records."""
    shape, words = found.layout, found.words
    recorded = [
        (_permit_name(found, number), words[shape.at(PERMITS, number, "semaphore_inode")])
        for number in range(shape.semaphores)
    ]
    for index in range(shape.groups):
        for kind, column in (("b", "bell_inode"), ("w", "endpoint_bell_inode")):
            recorded.append((found.names.semaphore(found.token, kind, index), words[shape.at(GROUPS, index, column)]))
    return [(name, inode) for name, inode in recorded if inode]
