"""A cursor that outlives its turn: rows that nobody has read yet stay with it, the connection does not.

pgdbpool's users read rows after the block of a handler.  A pool closes all cursors of a connection that comes back, as
somebody else has it from then on.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any, Self

import psycopg2
from psycopg2.extras import DictCursor


class KeptCursor(DictCursor):
    """A DictCursor that can still be read once it was closed, and nothing else."""

    _kept: deque[Any] | None = None

    def close(self) -> None:
        """Take in the rows that are left, and close."""
        if self._kept is None and not self.closed and self.description is not None:
            with contextlib.suppress(psycopg2.Error):  # the connection is gone
                self._kept = deque(super().fetchall())
        super().close()

    def fetchone(self) -> Any:
        """As psycopg2's."""
        if self._kept is None:
            return super().fetchone()
        return self._kept.popleft() if self._kept else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """As psycopg2's."""
        if self._kept is None:
            return super().fetchmany(size)
        return [self._kept.popleft() for _ in range(min(size or self.arraysize, len(self._kept)))]

    def fetchall(self) -> list[Any]:
        """As psycopg2's."""
        if self._kept is None:
            return super().fetchall()
        rows = list(self._kept)
        self._kept.clear()
        return rows

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        row = self.fetchone()
        if row is None:
            raise StopIteration
        return row
