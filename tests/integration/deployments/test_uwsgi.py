"""uWSGI's workers, as docs/deployments.md has them; tests/integration/uwsgi has more."""

from __future__ import annotations

import re

import pytest

from tests.support.deployments import (
    CAP,
    NON_THREADED,
    POOL,
    SHARED,
    Site,
    end,
    end_private,
    kill_one,
    only_block,
    serve,
)
from tests.support.serving import running
from tests.support.uwsgi import BINARY, requires_uwsgi

HEADING = "uWSGI workers"
PROCESSES = 4

pytestmark = requires_uwsgi


def uwsgi(site: Site, interface: str) -> list[str]:
    """Write the section's files and return the command."""
    lines = site.filled(only_block(HEADING, "ini"))
    if interface != POOL:  # the application carries its configuration itself: nothing to start beside it
        lines = re.sub(r"^(mule|env) = .*\n", "", lines, flags=re.MULTILINE)
    ini = site.write("uwsgi.ini", lines)
    site.write("shmpool_mule.py", only_block(HEADING, "python"))
    return [str(BINARY), "--ini", str(ini), "--http-socket", "127.0.0.1:{port}"]


@pytest.mark.parametrize("interface", [POOL, SHARED])
def test_a_budget(site: Site, interface: str) -> None:
    """Four workers keep one cap, also when one is killed; the end leaves nothing."""
    command = uwsgi(site, interface)
    with running(command, site.directory, site.environment(interface), site.names) as server:
        assert serve(server, site.role, processes=PROCESSES) == CAP
        kill_one(server, site.budget)
        assert serve(server, site.role, processes=PROCESSES) == CAP
        end(server, site)


@pytest.mark.parametrize(
    ("options", "pools"), [([], 1 + PROCESSES), (["--lazy-apps"], PROCESSES)], ids=["forked", "lazy-apps"]
)
def test_private_pools(site: Site, options: list[str], pools: int) -> None:
    """pgdbpool's 'non-threaded': every process that loads the application has a pool, and the server sees the sum."""
    command = uwsgi(site, NON_THREADED)
    with running([*command, *options], site.directory, site.environment(NON_THREADED)) as server:
        assert serve(server, site.role, processes=PROCESSES) == pools * CAP
        end_private(server, site)
