"""uWSGI's reloads under load, with as many connections as workers: none is left for old and new ones together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.reloads import TightRole, tight_config, under_load
from tests.support.uwsgi import UwsgiServer, requires_uwsgi, running_uwsgi
from tools.pg_cluster import Server

WORKERS = 4
COMPLETE = "chain reloading complete"
FEW = 2  # uWSGI takes a second for each worker of a chain

pytestmark = requires_uwsgi


@pytest.fixture
def role(request: pytest.FixtureRequest, primary: Server, pool_name: str) -> Iterator[TightRole]:
    """What the pool works as: with a connection for each worker."""
    with TightRole(primary, pool_name, request.param) as made:
        yield made


def ended_in_order(server: UwsgiServer) -> bool:
    """Whether no worker left anything to the coordinator."""
    coordinator = server.status().coordinator
    return coordinator is not None and coordinator.reaped_rows == 0


@pytest.mark.parametrize("role", [WORKERS], indirect=True, ids=str)
@pytest.mark.parametrize("options", [(), ("--lazy-apps", "--threads", "2")], ids=["plain", "lazy-apps, threads"])
def test_reload_in_place_fails_no_request_and_keeps_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """SIGHUP executes the master anew, with its pid: the next mule adopts the pool, the server generation grows."""
    config = tight_config(pool_name, role)
    with running_uwsgi(tmp_path, pool_name, config, "--processes", str(WORKERS), *options) as server:
        with under_load(server, role, " ".join(("uWSGI, SIGHUP", *options))) as reloads:
            for _ in range(2):
                reloads.watch.begin()
                server.reload()
                reloads.wait_for_more()
        assert reloads.clients.failures == []
        assert ended_in_order(server)
        assert len(set(server.rows().values())) == 1, "workers of one start have one server generation"
        assert server.log.count("segment created") == 1
        assert server.log.count("segment adopted") == 2
    assert "Traceback" not in server.log


@pytest.mark.parametrize("role", [FEW], indirect=True, ids=str)
@pytest.mark.parametrize("by", ["FIFO", "touched file"])
def test_chain_reload_fails_no_request_and_keeps_the_cap(
    role: TightRole, pool_name: str, tmp_path: Path, by: str
) -> None:
    """Workers are replaced one by one; each loads the application anew, and is newer; the mule stays."""
    fifo, touched = tmp_path / "fifo", tmp_path / "touched"
    touched.touch()
    options = ["--processes", str(FEW), "--lazy-apps", *["--threads", "2"] * (by == "FIFO")]
    options += ["--master-fifo", str(fifo), "--touch-chain-reload", str(touched)]
    with running_uwsgi(tmp_path, pool_name, tight_config(pool_name, role), *options) as server:
        mules = server.mules()
        with under_load(server, role, f"uWSGI, chain reload by {by}") as reloads:
            reloads.watch.begin()
            if by == "FIFO":
                fifo.write_text("c")
            else:
                later = time.time() + 5  # uWSGI compares whole seconds
                os.utime(touched, (later, later))
            reloads.wait_until(lambda: COMPLETE in server.log)
        assert reloads.clients.failures == []
        assert ended_in_order(server)
        assert server.mules() == mules
    assert "Traceback" not in server.log
