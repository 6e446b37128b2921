"""The example application on one raw psycopg2 connection per worker and group: what shmpool is measured against."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2

from examples.gunicorn import app
from examples.gunicorn.app import application

__all__ = ["application"]


class RawPool:
    """One connection per group, for ever; reads in autocommit, writes committed at the end of a block."""

    def __init__(self) -> None:
        self._connections: dict[str, psycopg2.extensions.connection] = {}

    def _open(self, group: str) -> psycopg2.extensions.connection:
        conn = psycopg2.connect(os.environ[f"BENCH_{group.upper()}"])
        conn.autocommit = group == "read"
        self._connections[group] = conn
        return conn

    @contextmanager
    def connection(self, group: str) -> Iterator[psycopg2.extensions.connection]:
        """Lend the connection of a group."""
        conn = self._connections.get(group) or self._open(group)
        yield conn
        if not conn.autocommit:
            conn.commit()


app.pool = RawPool()  # type: ignore[assignment]  # the same two calls
