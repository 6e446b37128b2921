"""Positions in a server's write-ahead log: what was committed, and which servers show it.  Pure, no I/O.

A position belongs to a system (what `initdb` made, with all its copies) and a timeline (which grows with each
promotion).  A server shows a commit when it is of that system, on that timeline or one that follows, and its replay has
come that far; the primary shows everything.  A server whose timeline is older may have gone a way of its own since the
promotion: its position says nothing then.

Guarantees: what is not known counts as not reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple, Self

from shmpool.states import Role

SHORT_HEADER_BYTES: Final = 24  # of a page of the write-ahead log
LONG_HEADER_BYTES: Final = 40  # of the first page of a segment file
_TEXT: Final = re.compile(r"([0-9a-f]{1,16})\.([0-9a-f]{1,8})\.([0-9a-f]{1,16})")


class CommitPosition(NamedTuple):
    """Where a commit lies, for `Pool.connection(group, after=...)`.

    `str` gives a text of digits, letters and dots that fits into a cookie; `parse` reads it.  It is no secret; a forged
    one can only make the forger's own reads wait, or go to the primary.
    """

    system_identifier: int
    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{self.system_identifier:x}.{self.timeline:x}.{self.lsn:x}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the position that `str` gave as `text`.

        Raises:
            ValueError: it is no such text.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(
                f"commit position: found {text[:50]!r}, expected three hexadecimal numbers with dots between"
            )
        return cls(*(int(number, 16) for number in found.groups()))


class Standing(NamedTuple):
    """Where a server was when it was asked; 0: unknown."""

    role: Role
    system_identifier: int
    timeline: int  # of a replica: at least
    lsn: int  # the end of a primary's log, or how far a replica has replayed


def shows(standing: Standing, after: CommitPosition) -> bool:
    """Whether a server is known to show everything up to a position."""
    if standing.system_identifier != after.system_identifier or standing.timeline < after.timeline:
        return False
    return standing.role is Role.PRIMARY or standing.lsn >= after.lsn


def is_void(after: CommitPosition, standings: Iterable[Standing]) -> bool:
    """Whether every server is known to be of another system: the one of the position was replaced, and says nothing."""
    systems = {standing.system_identifier for standing in standings}
    return bool(systems) and not systems & {0, after.system_identifier}


def end_of_records(insert_lsn: int, page_bytes: int, segment_bytes: int) -> int:
    """Return where the last record before an insert position ends.

    At the end of a page the insert position has gone on behind the next page's header, where no replay arrives before
    there is another record.
    """
    offset = insert_lsn % page_bytes
    header = SHORT_HEADER_BYTES if (insert_lsn - offset) % segment_bytes else LONG_HEADER_BYTES
    return insert_lsn - offset if offset == header else insert_lsn
