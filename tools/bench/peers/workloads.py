"""What a request does in the database, the same for every peer."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.bench.peers.pools import Ask

ACCOUNTS = 1000
READ = "SELECT id, balance FROM accounts WHERE id = %s"
PAY = "UPDATE accounts SET balance = balance + 1 WHERE id = %s RETURNING balance"
READ_LAST = "SELECT balance FROM accounts WHERE id = %s"


def one(ask: Ask) -> None:
    """Read one row."""
    ask(READ, (random.randrange(ACCOUNTS),))


def _ten(ask: Ask) -> None:
    for _ in range(10):
        ask(READ, (random.randrange(ACCOUNTS),))


def _transaction(ask: Ask) -> None:
    number = random.randrange(ACCOUNTS)
    for sql in (READ, PAY, READ_LAST):
        ask(sql, (number,))


WORKLOADS: dict[str, Callable[[Ask], None]] = {"one": one, "ten": _ten, "transaction": _transaction}
