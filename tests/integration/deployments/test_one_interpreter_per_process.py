"""Servers with one interpreter per process, as FalconAS: a stand-in of that shape, since none can be installed here."""

from __future__ import annotations

import sys

from tests.support.deployments import (
    APPS,
    CAP,
    NON_THREADED,
    SHARED,
    Site,
    end,
    end_private,
    kill_one,
    serve,
)
from tests.support.serving import running

PROCESSES = 4
COMMAND = [sys.executable, "-m", f"{APPS}.serial_server", "{port}", str(PROCESSES)]


def test_a_budget(site: Site) -> None:
    """Four processes that serve one request each keep the cap; none of them ends in order, and all comes back."""
    environment = site.environment(SHARED)
    with running(COMMAND, site.directory, environment, site.names) as server:
        assert serve(server, site.role, processes=PROCESSES) == CAP
        kill_one(server, site.budget)
        assert serve(server, site.role, processes=PROCESSES) == CAP
        end(server, site)


def test_private_pools(site: Site) -> None:
    """pgdbpool's 'non-threaded': every process has a pool of its own, and the server sees the sum."""
    with running(COMMAND, site.directory, site.environment(NON_THREADED)) as server:
        assert serve(server, site.role, processes=PROCESSES) == PROCESSES * CAP
        end_private(server, site)
