"""docs/deployments.md as tests use it: its blocks, run on a directory of their own, and what must hold of each."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from shmpool.names import Names
from shmpool.pgdbpool.configuration import parse
from shmpool.pgdbpool.shared import translate
from tests.support.gunicorn import Clients
from tests.support.serving import CONNECT_S, LINGER_S, Budget, Role, Sampler, WebServer, budget_of
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "deployments.md"
SITE: Final = "/srv/web"  # where the page lets an application live
APPS: Final = "tests.integration.deployments.apps"
CAP: Final = 3
POOL, SHARED, THREADED, NON_THREADED = "Pool", "shared", "threaded", "non-threaded"  # interfaces of applications
THREADS: Final = 8  # of the load


def blocks(heading: str, language: str) -> list[str]:
    """Return the code blocks in a language below a heading of the page, up to the next heading."""
    part = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert part is not None, f"{PAGE} has no heading {heading!r}"
    return re.findall(rf"^```{language}\n(.*?)^```$", part[1], re.MULTILINE | re.DOTALL)


def only_block(heading: str, language: str) -> str:
    """Return the one block in a language below a heading."""
    (block,) = blocks(heading, language)
    return block


class Site:
    """A directory in the place of SITE with an application, and the budget that the application uses."""

    def __init__(self, directory: Path, pool: str, role: Role) -> None:
        self.directory = directory
        self.role = role
        self.names = Names.of(pool)
        self.config = directory / "shmpool.toml"
        self.config.write_text(budget_of(pool, role, CAP))
        self.write("app.py", f"from {APPS}.wsgi_app import application\n")

    @property
    def budget(self) -> Budget:
        """The pool as it is seen from outside."""
        return Budget(self.names)

    def of_user(self, uid: int) -> Self:
        """Let the pool be another user's."""
        self.names = self.names._replace(uid=uid)
        return self

    def write(self, name: str, text: str) -> Path:
        """Write a file into the directory."""
        path = self.directory / name
        path.write_text(text)
        return path

    def filled(self, text: str) -> str:
        """Return a block of the page with this directory in the place of the page's."""
        return text.replace(SITE, str(self.directory))

    def command(self, block: str, interface: str = POOL) -> tuple[list[str], dict[str, str]]:
        """Return program and arguments of a block's command line, and its environment with that of an interface."""
        words = shlex.split(self.filled(block))
        count = next(at for at, word in enumerate(words) if not re.match(r"\w+=", word))
        program, *arguments = words[count:]
        given = dict(word.split("=", 1) for word in words[:count])
        if interface != POOL:
            given.pop("SHMPOOL_CONFIG")  # the application carries its configuration itself
        return [str(Path(sys.prefix, "bin", program)), *arguments], given | self.environment(interface)

    def environment(self, interface: str = POOL) -> dict[str, str]:
        """Return the environment of an application: it uses `shmpool.Pool`, or pgdbpool's interface with a `type`."""
        common = {"PYTHONPATH": os.pathsep.join((str(self.directory), str(ROOT))), "PYTHONUNBUFFERED": "1"}
        if interface == POOL:
            return common | {"HOLD": "with_pool", "SHMPOOL_NAME": self.names.pool}
        if interface == SHARED:
            self.share(self.dictionary(SHARED))
        return common | {"HOLD": "with_dbpool", "DBPOOL": json.dumps(self.dictionary(interface))}

    def share(self, dictionary: Mapping[str, Any]) -> None:
        """Let the budget be that of a dictionary of type 'shared'."""
        config, _, _ = translate(parse(dictionary))
        self.names = self.names._replace(pool=config["name"])

    def dictionary(self, kind: str) -> dict[str, Any]:
        """Return pgdbpool's configuration."""
        port = self.role.server.port
        return {
            "type": kind,
            "db": {
                "host": HOST,
                "port": port,
                "name": "postgres",
                "user": self.role.name,
                "pass": "unused",
                "connect_timeout": CONNECT_S,
            },
            "groups": {"default": {"connection_count": CAP, "autocommit": True}},
        } | ({"linger": LINGER_S} if kind == SHARED else {})


def serve(server: WebServer, role: Role, *, path: str = "/?ms=5", processes: int = 1, requests: int = 100) -> int:
    """Load a server until so many of its processes have answered; return the most sessions that there were."""
    workers: set[int] = set()

    def is_enough() -> bool:
        status, answer = server.request(path)
        assert status == 200, answer
        workers.add(answer["worker"])
        return len(workers) >= processes and clients.served >= requests and sampler.samples >= 30

    with Sampler(role) as sampler, Clients(server, path, THREADS) as clients:
        wait_until(is_enough, within=20, what=lambda: f"answers of {workers}, {clients.served} requests; {server.log}")
    assert clients.failures == [], server.log
    return sampler.most


def end(server: WebServer, site: Site, number: signal.Signals = signal.SIGTERM) -> None:
    """End a server in order, and wait until nothing is left by itself: sessions, coordinator, what pools share."""
    server.stop(number)
    wait_until(site.budget.is_gone, within=LINGER_S + 10, what=lambda: f"{site.names.leftovers()} {server.log}")
    assert site.role.sessions() == 0


def end_private(server: WebServer, site: Site, number: signal.Signals = signal.SIGTERM) -> None:
    """End a server without a budget in order, and wait until its sessions have ended."""
    server.stop(number)
    wait_until(lambda: site.role.sessions() == 0)


def kill_one(server: WebServer, budget: Budget) -> None:
    """SIGKILL a worker that the server started, under load; return when everything it held is back."""
    with Clients(server, "/?ms=5", 1) as clients:
        wait_until(lambda: clients.served > 20, within=15)
        victim = min(budget.holders() & server.workers())
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in budget.holders(), within=15, what=lambda: server.log)
    wait_until(budget.is_whole, within=15, what=lambda: server.log)
