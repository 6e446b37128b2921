"""Real PostgreSQL servers, shared by the tests of a session.

Tests leave them running and as they found them; a test that kills or promotes makes a
`Cluster` of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tools.pg_cluster import Cluster, PostgresNotFoundError, Server, find_binaries


def require_postgres() -> None:
    """Skip the test where no server is installed; fail it in CI."""
    try:
        find_binaries()
    except PostgresNotFoundError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def primary() -> Iterator[Server]:
    """One running server without standbys."""
    require_postgres()
    with Cluster() as servers:
        yield servers.primary


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running primary with one streaming standby."""
    require_postgres()
    with Cluster(standbys=1, settings={"max_prepared_transactions": "4"}) as servers:
        yield servers


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Freeze every process of a server; the kernel goes on taking connections for it."""
    server.pause()
    try:
        yield
    finally:
        server.resume()
