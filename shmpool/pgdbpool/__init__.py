"""pgdbpool's interface: code written for pgdbpool 1.0 changes its import and nothing else.

    from shmpool import pgdbpool as dbpool      or      from shmpool.pgdbpool import pool as dbpool

docs/pgdbpool.md says what is configured how, and what is different.
"""

from __future__ import annotations

from shmpool.pgdbpool import pool
from shmpool.pgdbpool.pool import (
    Connection,
    DBConfigurationError,
    DBConnectionError,
    DBOfflineError,
    DBQueryError,
    DBTimeoutError,
    Handler,
    Query,
    UnconfiguredGroupError,
    conn_iter,
    conn_iter_locked,
)

__all__ = [
    "Connection",
    "DBConfigurationError",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "DBTimeoutError",
    "Handler",
    "Query",
    "UnconfiguredGroupError",
    "conn_iter",
    "conn_iter_locked",
    "pool",
]
