"""A coordinator that the tests of one module share, and a pool of the test's own process on it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from shmpool import Pool
from tests.support.coordinator import CoordinatorProcess, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import is_ready, pool_of, shared_config
from tools.pg_cluster import Cluster

_numbers = itertools.count()


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[CoordinatorProcess]:
    """A coordinator on `tests.support.workers.GROUPS` that knows its endpoints."""
    name = f"s{os.getpid()}-{next(_numbers)}"
    with running_coordinator(shared_config(name, cluster), name) as coordinator:
        wait_until(lambda: is_ready(name), within=10, what=lambda: coordinator.log)
        yield coordinator


@pytest.fixture
def pool(shared: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process; every permit is back afterwards."""
    with pool_of(shared.names.pool) as pool:
        yield pool
