"""Gunicorn's threads and Gunicorn's workers, as docs/deployments.md has them; tests/integration/gunicorn has more."""

from __future__ import annotations

import signal

import pytest

from tests.support.deployments import (
    CAP,
    NON_THREADED,
    POOL,
    SHARED,
    THREADED,
    THREADS,
    Site,
    end,
    end_private,
    kill_one,
    only_block,
    serve,
)
from tests.support.gunicorn import Clients
from tests.support.serving import Sampler, WebServer, running
from tests.support.waiting import wait_until

NO_CONTROL_SOCKET = "--no-control-socket"


THREADS_OF_ONE = ("Gunicorn threads", 1)
WORKERS = ("Gunicorn workers", 4)


def gunicorn(site: Site, heading: str, interface: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of a section of the page, on a port of its own, and its environment."""
    command, environment = site.command(only_block(heading, "sh"), interface)
    site.write("gunicorn.conf.py", only_block("Gunicorn", "python"))
    return [*command, "--bind", "127.0.0.1:{port}", NO_CONTROL_SOCKET], environment


@pytest.mark.parametrize(("heading", "processes", "interface"), [(*THREADS_OF_ONE, SHARED), (*WORKERS, POOL)])
def test_a_budget(site: Site, heading: str, processes: int, interface: str) -> None:
    """Threads of one process, and single-threaded processes, keep one cap, also when one is killed or all reload."""
    command, environment = gunicorn(site, heading, interface)
    with running(command, site.directory, environment, site.names) as server:
        assert serve(server, site.role, processes=processes) == CAP
        kill_one(server, site.budget)
        reload(server, site)
        assert serve(server, site.role, processes=processes) == CAP
        end(server, site)


def reload(server: WebServer, site: Site) -> None:
    """SIGHUP under load: return when all workers are new ones."""
    old = server.workers()
    with Sampler(site.role) as sampler, Clients(server, "/?ms=5", THREADS) as clients:
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.workers() and not server.workers() & old, within=20, what=lambda: server.log)
        seen = clients.served
        wait_until(lambda: clients.served > seen + 50, within=10)
    assert clients.failures == []
    assert sampler.most <= CAP


@pytest.mark.parametrize(
    ("heading", "processes", "interface", "options", "pools"),
    [
        (*THREADS_OF_ONE, THREADED, [], 1),
        (*WORKERS, NON_THREADED, [], 4),
        (*WORKERS, NON_THREADED, ["--preload"], 1 + 4),
    ],
    ids=["threads", "workers", "preload"],
)
def test_private_pools(
    site: Site, heading: str, processes: int, interface: str, options: list[str], pools: int
) -> None:
    """pgdbpool's own types: every process that loads the application has a pool, and the server sees the sum."""
    command, environment = gunicorn(site, heading, interface)
    with running([*command, *options], site.directory, environment) as server:
        assert serve(server, site.role, processes=processes) == pools * CAP
        end_private(server, site)
