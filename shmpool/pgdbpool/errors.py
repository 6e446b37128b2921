"""The exceptions of pgdbpool's interface.

What keeps a handler from having a connection belongs to the pool's family, and thereby to psycopg2's
OperationalError.  DBQueryError does not: code that runs statements both ways, through `query` and through `conn_ref`,
tells the two apart by class, in whatever order it names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shmpool.pool_errors import PoolError, PoolTimeout, UnknownGroup


class DBConnectionError(PoolError):
    """No connection could be made, or there is none to be used."""


class DBTimeoutError(DBConnectionError, PoolTimeout):
    """No connection of the group came free in time.  The message says who holds them."""


class DBOfflineError(PoolError):
    """The server of a connection is gone, and no other could be reached.  The message says why, for each."""


class DBQueryError(Exception):
    """A statement failed.  `__cause__` is the driver's exception."""

    @property
    def pgcode(self) -> str | None:
        """The server's SQLSTATE, if the server said one."""
        code: str | None = getattr(self.__cause__, "pgcode", None)
        return code


class UnconfiguredGroupError(UnknownGroup):
    """The configuration has no group of this name."""

    def __init__(self, group: str, known: Iterable[str]) -> None:
        super().__init__(group, "pgdbpool", list(known))


class DBConfigurationError(ValueError):
    """The configuration cannot be used.  `problems` has one entry for each thing that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))
