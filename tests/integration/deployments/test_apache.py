"""Apache with mod_wsgi: real processes, started by a worker on demand, since there is no hook."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apache import Apache, require_apache, served_by
from tests.support.deployments import (
    CAP,
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
from tools.stage import free_port

DAEMONS = "Daemon processes"
EMBEDDED = "Embedded in Apache's own processes"
PREFORK = "StartServers 4\nMaxRequestWorkers 4\n"


@pytest.fixture(scope="module")
def apache() -> Apache:
    """The installed Apache."""
    return require_apache()


@pytest.fixture(scope="module")
def environment(apache: Apache) -> Iterator[Path]:
    """A virtual environment for mod_wsgi, which Apache's user may read."""
    with tempfile.TemporaryDirectory(prefix="shmpool-venv-") as directory:
        os.chmod(directory, 0o755)
        yield apache.make_environment(Path(directory))


@pytest.fixture
def served(environment: Path, site: Site) -> Site:
    """The directory as Apache's processes see it."""
    (site.directory / "venv").symlink_to(environment)
    uid, _ = served_by()
    return site.of_user(uid)


@contextlib.contextmanager
def running_apache(apache: Apache, site: Site, mpm: str, lines: str, interface: str = POOL) -> Iterator[WebServer]:
    """Run Apache on lines of the page."""
    port = free_port()
    conf = site.write("httpd.conf", apache.configuration(mpm, site.directory, port, site.filled(lines)))
    environment = site.environment(interface)
    environment.pop("PYTHONPATH")  # mod_wsgi's Python has packages of its own
    if interface == POOL:
        environment["SHMPOOL_CONFIG"] = str(site.config)
    command = [apache.program, "-f", str(conf), "-D", "FOREGROUND"]
    with running(command, site.directory, environment, site.names, port=port) as server:
        yield server


@pytest.mark.parametrize("interface", [POOL, SHARED])
def test_daemon_processes(apache: Apache, served: Site, interface: str) -> None:
    """The first request starts a coordinator; two processes with four threads each keep one cap; a kill costs none."""
    with running_apache(apache, served, "event", only_block(DAEMONS, "apache"), interface) as server:
        assert serve(server, served.role, processes=2) == CAP
        kill_one(server, served.budget)
        assert serve(server, served.role, processes=2) == CAP
        end(server, served)


def test_reload(apache: Apache, served: Site) -> None:
    """Touching the script fails no request; apachectl graceful may fail some, by Apache's 503.  The cap holds."""
    with running_apache(apache, served, "event", only_block(DAEMONS, "apache")) as server:
        serve(server, served.role, processes=2)
        with replacing(server, served) as failures:
            os.utime(served.directory / "app.py")
        assert failures == []
        with replacing(server, served) as failures:
            server.process.send_signal(signal.SIGUSR1)
        assert all(failure.startswith("503") and "maintenance downtime" in failure for failure in failures)
        wait_until(served.budget.is_whole, within=10)
        end(server, served)


def test_embedded(apache: Apache, served: Site) -> None:
    """Apache's own processes (prefork) keep the cap, also when all are replaced under load: no request fails."""
    with running_apache(apache, served, "prefork", only_block(EMBEDDED, "apache") + PREFORK) as server:
        assert serve(server, served.role, processes=CAP + 1) == CAP
        with replacing(server, served) as failures:
            server.process.send_signal(signal.SIGUSR1)
        assert failures == []
        end(server, served)


@contextlib.contextmanager
def replacing(server: WebServer, site: Site) -> Iterator[list[str]]:
    """Keep up a load until all processes with a row are new ones; yields what failed meanwhile."""
    old = site.budget.holders()
    with Sampler(site.role) as sampler, Clients(server, "/?ms=5", THREADS) as clients:
        yield clients.failures
        wait_until(lambda: len(new := site.budget.holders()) >= 2 and not new & old, within=15, what=lambda: server.log)
        seen = clients.served
        wait_until(lambda: clients.served > seen + 50, within=10)
    assert sampler.most <= CAP


def test_two_interpreters_in_one_process(apache: Apache, served: Site) -> None:
    """Without `%{GLOBAL}` each application has an interpreter of its own: one cap for both, and nothing is left.

    mod_wsgi cannot end these interpreters in order and kills the process: what it held comes back all the same.
    """
    shutil.copy(served.directory / "app.py", served.directory / "other.py")
    lines = only_block(DAEMONS, "apache").replace("processes=2", "processes=1")
    lines = lines.replace("WSGIApplicationGroup %{GLOBAL}", f"WSGIScriptAlias /other {served.directory}/other.py")
    with running_apache(apache, served, "event", lines) as server:
        with (
            Sampler(served.role) as sampler,
            Clients(server, "/?ms=5", THREADS) as one,
            Clients(server, "/other?ms=5", THREADS) as other,
        ):
            wait_until(lambda: min(one.served, other.served) > 100, within=15, what=lambda: server.log)
        assert one.failures + other.failures == [], server.log
        assert sampler.most == CAP
        assert len(served.budget.holders()) == 1
        end(server, served)


def test_private_pools(apache: Apache, served: Site) -> None:
    """pgdbpool's 'threaded': every process has a pool of its own, and the server sees the sum."""
    with running_apache(apache, served, "event", only_block(DAEMONS, "apache"), THREADED) as server:
        assert serve(server, served.role, processes=2) == 2 * CAP
        end_private(server, served)
