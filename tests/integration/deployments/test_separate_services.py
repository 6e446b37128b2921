"""Several services on one host: a web application, and programs that answer no requests."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from tests.support.deployments import APPS, CAP, POOL, SHARED, THREADS, Site, blocks, end, serve
from tests.support.gunicorn import Clients
from tests.support.serving import EXTRA, Program, Role, Sampler, running
from tests.support.waiting import wait_until

ONE = "One budget for all"
EACH = "A budget for each"
WEB = ["--threads", "4", "--bind", "127.0.0.1:{port}", "--no-control-socket"]


def done(jobs: Program) -> int:
    """Return how many jobs a program has done."""
    return jobs.log.count("\n")


@pytest.fixture
def services(site: Site) -> Site:
    """A site with both services' programs."""
    site.write("gunicorn.conf.py", "from shmpool.hooks.gunicorn import *\n")
    site.write("jobs.py", f"from {APPS}.jobs import main\nmain()\n")
    return site


@pytest.mark.parametrize("interface", [POOL, SHARED])
def test_one_budget(services: Site, interface: str) -> None:
    """A web application, a program that never ends and one that cron starts: one cap, and each may end or die alone."""
    (web, web_has), (jobs, jobs_has) = (services.command(block, interface) for block in blocks(ONE, "sh"))
    with (
        running([*web, *WEB], services.directory, web_has, services.names) as server,
        Program(jobs, services.directory, jobs_has, "jobs") as forever,
    ):
        with Sampler(services.role) as sampler, Clients(server, "/?ms=5", THREADS) as clients:
            wait_until(lambda: clients.served > 100 and done(forever) > 50, within=20, what=lambda: forever.log)
            environment = os.environ | jobs_has
            cron = subprocess.run(
                [*jobs, "20"], cwd=services.directory, env=environment, capture_output=True, timeout=20
            )
            assert cron.stdout.count(b"\n") == 20, cron.stderr
            assert forever.pid in services.budget.holders()
            forever.process.kill()
            wait_until(lambda: forever.pid not in services.budget.holders(), within=10)
        assert clients.failures == []
        assert sampler.most == CAP
        wait_until(services.budget.is_whole, within=15)
        end(server, services)


def configured(block: str, name: str, site: Site) -> Site:
    """Give a site a configuration of the page, with its own pool and server in it."""
    text = block.replace(f'name = "{name}"', f'name = "{site.names.pool}"')
    text = text.replace(f"host=10.0.0.1 dbname=app user={name}", site.role.conninfo)
    site.config.write_text(text + EXTRA)
    return site


def test_a_budget_for_each(services: Site) -> None:
    """Two pools at one server: each has its own cap, which the other's load and end do not touch."""
    of_web, of_jobs = blocks(EACH, "toml")
    (web, web_has), (jobs, _) = (services.command(block) for block in blocks(ONE, "sh"))
    directory = services.directory / "jobs"
    directory.mkdir()
    with Role(services.role.server, f"{services.names.pool}_jobs") as role, contextlib.ExitStack() as programs:
        other = configured(of_jobs, "jobs", Site(directory, f"{services.names.pool}-jobs", role))
        jobs_has = other.environment() | {"SHMPOOL_CONFIG": str(other.config)}
        command = [jobs[0], str(services.directory / jobs[1])]
        configured(of_web, "web", services)
        with running([*web, *WEB], services.directory, web_has, services.names, other.names) as server:
            all_jobs = [
                programs.enter_context(Program(command, directory, jobs_has, f"jobs{number}")) for number in range(4)
            ]
            with Sampler(role) as jobs_sampler:
                assert serve(server, services.role) == 6
                wait_until(lambda: all(done(one) > 20 for one in all_jobs), within=20, what=lambda: all_jobs[0].log)
            assert jobs_sampler.most == 2
            end(server, services)
            seen = sum(map(done, all_jobs))
            wait_until(lambda: sum(map(done, all_jobs)) > seen + 50, within=10)
            programs.close()
            wait_until(other.budget.is_gone, within=10)
        assert role.sessions() == 0
