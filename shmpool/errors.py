"""What can go wrong with the segment and its tables, below the pool.

These know nothing of psycopg2; the pool turns them into its own family (pool_errors.py).
"""

from __future__ import annotations


class MechanismError(Exception):
    """Anything wrong with the shared tables."""


class SegmentMissingError(MechanismError):
    """There is no segment of this name, or it is not open yet: no coordinator made one."""


class SegmentMismatchError(MechanismError):
    """What lies under this name is not a segment that this version may use; nothing was touched."""


class SegmentRetiredError(MechanismError):
    """The segment takes nobody in any more; attach again to reach the successor."""


class TableFullError(MechanismError):
    """No worker row is free."""


class DisownedError(MechanismError):
    """The row is not this process's any more (fork, or taken away after its lock was lost)."""


class CoordinatorRunningError(MechanismError):
    """Another coordinator holds the pool."""
