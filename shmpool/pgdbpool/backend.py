"""What stands behind pgdbpool's classes: one implementation for each kind of `type`.

The classes of pool.py know nothing of where connections come from.  A connection is named by its group and a number,
counted from 0 within the process.
"""

from __future__ import annotations

from typing import Any, Protocol

from shmpool.pgdbpool.configuration import Settings


class Backend(Protocol):
    """A process's connections, by group and number.

    Every method that takes a group raises UnconfiguredGroupError if there is none of that name.
    In a child of the process that made it, nothing but `is_inherited` and `renewed` may be used.
    """

    settings: Settings

    @property
    def is_inherited(self) -> bool:
        """Whether this is a child of the process that made it.  Cheap: asked at every use."""

    def renewed(self) -> Backend:
        """Return one with the same settings for this process, without a connection yet."""

    def open(self) -> None:
        """Connect as far as that is done ahead of use.

        Raises:
            DBConnectionError: no endpoint can be reached; handlers try again nevertheless.
        """

    def close(self) -> None:
        """Close what is not in use, and the rest when it comes back."""

    def checkout(self, group: str, holder: object | None = None, *, waits: bool = True) -> int | None:
        """Take a connection that is ready for use and return its number.

        Args:
            holder: whose death gives it back; None: only a checkin does.
            waits: whether to wait if all are in use; otherwise None is returned.

        Raises:
            DBTimeoutError: all stayed in use.
            DBOfflineError: no endpoint can be reached.
        """

    def checkin(self, group: str, number: int, *, commits: bool) -> None:
        """Commit or roll back what is open and let go, even if that fails.

        Raises:
            DBQueryError: it was to be committed, and was not.
        """

    def mark(self, group: str, number: int, *, is_occupied: bool) -> None:
        """Take or let go of one particular connection, as it is."""

    def look(self, group: str, number: int) -> tuple[Any, bool]:
        """Return the connection as it is (None: none yet), and whether it is occupied."""

    def occupied(self, group: str) -> int:
        """Return how many are occupied."""

    def ready(self, group: str, number: int) -> Any:
        """Return the connection for a statement; one that ended outside a transaction is replaced.

        Raises:
            DBOfflineError: no endpoint can be reached, or a transaction was lost with the connection.
        """

    def commit(self, group: str, number: int) -> None:
        """Commit; whatever comes of it, the transaction is over.

        Raises:
            psycopg2.Error: the driver's, as it is.
        """

    def reopen(self, group: str, number: int, *, tries: int = 1) -> None:
        """Replace the connection by a new one; whether it is occupied does not change.

        Raises:
            DBOfflineError: no endpoint could be reached in so many tries.
        """
