"""One PostgreSQL connection budget for all the worker processes of a host.

The public names are loaded on first use, so that tools which only read the segment do not import the driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shmpool.connection import Connection as Connection
    from shmpool.handle import Handle as Handle
    from shmpool.pool import Pool as Pool
    from shmpool.pool_errors import ConfigurationDiffers as ConfigurationDiffers
    from shmpool.pool_errors import ConnectionGivenBackError as ConnectionGivenBackError
    from shmpool.pool_errors import ConnectionLost as ConnectionLost
    from shmpool.pool_errors import CoordinatorNotRunning as CoordinatorNotRunning
    from shmpool.pool_errors import NoEligibleEndpoint as NoEligibleEndpoint
    from shmpool.pool_errors import PoolClosed as PoolClosed
    from shmpool.pool_errors import PoolError as PoolError
    from shmpool.pool_errors import PoolTimeout as PoolTimeout
    from shmpool.pool_errors import PositionNotReached as PositionNotReached
    from shmpool.pool_errors import QueryTimeout as QueryTimeout
    from shmpool.pool_errors import TooManyWaiting as TooManyWaiting
    from shmpool.pool_errors import TransactionOutcomeUnknown as TransactionOutcomeUnknown
    from shmpool.pool_errors import UnknownGroup as UnknownGroup
    from shmpool.pool_errors import WouldBlockEventLoop as WouldBlockEventLoop
    from shmpool.position import CommitPosition as CommitPosition

_HOMES: Final = {
    "CommitPosition": "shmpool.position",
    "ConfigurationDiffers": "shmpool.pool_errors",
    "Connection": "shmpool.connection",
    "ConnectionGivenBackError": "shmpool.pool_errors",
    "ConnectionLost": "shmpool.pool_errors",
    "CoordinatorNotRunning": "shmpool.pool_errors",
    "Handle": "shmpool.handle",
    "NoEligibleEndpoint": "shmpool.pool_errors",
    "Pool": "shmpool.pool",
    "PoolClosed": "shmpool.pool_errors",
    "PoolError": "shmpool.pool_errors",
    "PoolTimeout": "shmpool.pool_errors",
    "PositionNotReached": "shmpool.pool_errors",
    "QueryTimeout": "shmpool.pool_errors",
    "TooManyWaiting": "shmpool.pool_errors",
    "TransactionOutcomeUnknown": "shmpool.pool_errors",
    "UnknownGroup": "shmpool.pool_errors",
    "WouldBlockEventLoop": "shmpool.pool_errors",
}

__version__ = "0.1.0"
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'shmpool' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
