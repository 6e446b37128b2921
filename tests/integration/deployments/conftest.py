"""What each test of a deployment starts from: the directory that the documentation calls /srv/web, and a budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployments import Site
from tests.support.serving import Role
from tools.pg_cluster import Server


@pytest.fixture
def site(primary: Server, pool_name: str) -> Iterator[Site]:
    """A directory that every user may read, and a role at a running server."""
    with tempfile.TemporaryDirectory(prefix="shmpool-site-") as directory, Role(primary, pool_name) as role:
        os.chmod(directory, 0o755)
        yield Site(Path(directory), pool_name, role)
