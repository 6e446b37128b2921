"""What a copy of all slot words says, counted anew only where it differs from the copy before.

Pure: works on copies.  A thousand workers have 16,000 words, of which a tick finds a few changed.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from shmpool.words import (
    E_FIELD_SHIFT,
    E_INDEX_SHIFT,
    FIELDS_MASK,
    G_FIELD_SHIFT,
    G_INDEX_SHIFT,
    MAYBE,
    ORPHAN,
    YES,
)

CHUNK_BYTES: Final = 512


class Tally:
    """The counts of one copy.

    A semaphore's number is its row in the PERMITS table: groups first, then endpoints.
    """

    def __init__(self, slots: int, groups: int) -> None:
        """Begin with all words FREE."""
        self.raw = bytes(8 * slots)
        self.certain: Counter[int] = Counter()  # by semaphore: slots that hold one of its permits
        self.open: dict[int, int] = {}  # by slot: the words of orphans, and those with a field in doubt
        self._groups = groups
        chunks = -(-len(self.raw) // CHUNK_BYTES)
        self._certain_of: list[Counter[int]] = [Counter() for _ in range(chunks)]
        self._open_of: list[tuple[int, ...]] = [()] * chunks

    def update(self, raw: bytes) -> None:
        """Count another copy, of the same length."""
        old = self.raw
        if raw == old:
            return
        for chunk, at in enumerate(range(0, len(raw), CHUNK_BYTES)):
            piece = raw[at : at + CHUNK_BYTES]
            if piece != old[at : at + CHUNK_BYTES]:
                self._recount(chunk, piece)
        self.raw = raw

    def orphans(self) -> list[tuple[int, int]]:
        """Return slot and word of every orphan, in the order of slots."""
        return sorted((slot, word) for slot, word in self.open.items() if word & ORPHAN)

    def _recount(self, chunk: int, piece: bytes) -> None:
        self.certain.subtract(self._certain_of[chunk])
        for slot in self._open_of[chunk]:
            del self.open[slot]
        certain: Counter[int] = Counter()
        found = {}
        for slot, word in enumerate(memoryview(piece).cast("Q"), chunk * CHUNK_BYTES // 8):
            if not word & FIELDS_MASK:
                continue
            group_field, endpoint_field = word >> G_FIELD_SHIFT & 3, word >> E_FIELD_SHIFT & 3
            if group_field == YES:
                certain[word >> G_INDEX_SHIFT & 0xFF] += 1
            if endpoint_field == YES:
                certain[self._groups + (word >> E_INDEX_SHIFT & 0xFF)] += 1
            if word & ORPHAN or MAYBE in (group_field, endpoint_field):
                found[slot] = word
        self.certain.update(certain)
        self.open.update(found)
        self._certain_of[chunk], self._open_of[chunk] = certain, tuple(found)
