"""The development servers of Flask and Django: a watcher process and a serving one, whose requests have threads."""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

import pytest

from tests.support.deployments import (
    APPS,
    CAP,
    POOL,
    SHARED,
    THREADED,
    THREADS,
    Site,
    end,
    end_private,
    only_block,
    serve,
)
from tests.support.gunicorn import Clients
from tests.support.serving import Sampler, running
from tests.support.waiting import wait_until

FLASK = ("Flask", "app.py", f"from {APPS}.flask_app import app\n", ["--port", "{port}"])
DJANGO = ("Django", "manage.py", f"from {APPS}.django_site import main\nmain()\n", ["{port}"])


class Development(NamedTuple):
    """A development server: its section of the page, the file that it watches, and how it is given a port."""

    heading: str
    script: str
    text: str
    port: list[str]

    def command(self, site: Site, interface: str) -> tuple[list[str], dict[str, str]]:
        """Return the command of the page, on a port of its own, and its environment."""
        site.write(self.script, self.text)
        command, environment = site.command(only_block(self.heading, "sh"), interface)
        return [*command, *self.port], environment


@pytest.fixture(params=[FLASK, DJANGO], ids=["flask", "django"])
def development(request: pytest.FixtureRequest) -> Development:
    """One of the two."""
    return Development(*request.param)


def test_a_reload(site: Site, development: Development) -> None:
    """Only the serving process takes part; its replacement under load, and Ctrl-C, leave nothing behind."""
    command, environment = development.command(site, POOL)
    with running(command, site.directory, environment, site.names) as server:
        assert serve(server, site.role) == CAP
        assert site.budget.holders() == server.workers(), "the watcher holds nothing"
        (old,) = server.workers()
        with Sampler(site.role) as sampler, Clients(server, "/?ms=5", THREADS):
            os.utime(site.directory / development.script)
            wait_until(lambda: old not in server.workers() and server.is_ready(), within=15, what=lambda: server.log)
            wait_until(lambda: site.budget.holders() == server.workers(), within=10)
        assert sampler.most <= CAP
        wait_until(site.budget.is_whole, within=10)
        end(server, site, signal.SIGINT)


def test_a_kill(site: Site, development: Development) -> None:
    """The serving process is killed: the watcher ends, too, and nothing is left."""
    command, environment = development.command(site, SHARED)
    with running(command, site.directory, environment, site.names) as server:
        assert serve(server, site.role) == CAP
        assert site.budget.holders() == server.workers(), "the watcher holds nothing"
        os.kill(min(server.workers()), signal.SIGKILL)
        server.process.wait(10)
        end(server, site)


def test_private_pools(site: Site, development: Development) -> None:
    """pgdbpool's 'threaded', made at import: Flask's watcher imports the application too, and has a pool of its own."""
    command, environment = development.command(site, THREADED)
    with running(command, site.directory, environment) as server:
        importing = 2 if development.heading == "Flask" else 1
        assert serve(server, site.role) == importing * CAP
        end_private(server, site, signal.SIGINT)
