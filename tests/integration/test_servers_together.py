"""Several application servers at the same time on one pool: Gunicorn sync and gthread, uWSGI processes and threads."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from shmpool.names import Names
from shmpool.observation import observe
from shmpool.states import ServerKind
from shmpool.status import RowState
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import guest_book
from tests.support.serving import EXTRA, WebServer, running
from tests.support.uwsgi import UWSGI, requires_uwsgi
from tools.pg_cluster import Cluster
from tools.stage import EXAMPLE

CAPS = {"pg1": 4, "pg2": 3}  # of the endpoints
GROUPS = {
    "read": 'connections = 5\ntarget = "prefer-replica"\ntimeout = "20s"',
    "write": 'connections = 3\ntarget = "primary"\ntimeout = "20s"',
}
MIX = (("/", None), ("/slow?ms=5", None), ("/entries", "name=Ann&said=hello"), ("/", None))
ROUNDS = 25
CLIENTS = 3  # of each server
GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--no-control-socket"]
GUNICORN += ["--config", str(EXAMPLE / "gunicorn.conf.py"), "--graceful-timeout", "5", "app:application"]
SERVERS = {
    "gunicorn sync": [*GUNICORN, "--workers", "3"],
    "gunicorn gthread": [*GUNICORN, "--workers", "2", "--worker-class", "gthread", "--threads", "4"],
    "uwsgi processes": [*UWSGI, "--processes", "3"],
    "uwsgi processes + threads": [*UWSGI, "--processes", "2", "--threads", "4", "--enable-threads"],
}
SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name LIKE %s AND application_name NOT LIKE '%%:coordinator'
"""

pytestmark = requires_uwsgi


@pytest.fixture
def tables(cluster: Cluster) -> Iterator[Cluster]:
    """A primary and a standby with the guest book's table."""
    with guest_book(cluster):
        yield cluster


class Load:
    """The same mix of requests to every server at once."""

    def __init__(self, servers: dict[str, WebServer]) -> None:
        self._answers: list[tuple[str, int]] = []
        self._threads = [threading.Thread(target=self._run, args=s) for s in servers.items() for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    @property
    def answers(self) -> Counter[tuple[str, int]]:
        """How many answers of each server had a status of each hundred."""
        return Counter(self._answers)

    def is_running(self) -> bool:
        """Whether requests are still sent."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self, name: str, server: WebServer) -> None:
        for _ in range(ROUNDS):
            for path, form in MIX:
                self._answers.append((name, server.request(path, form)[0] // 100))


def most_sessions(cluster: Cluster, pool: str, load: Load) -> Counter[str]:
    """Return the most sessions of the pool's workers that each server had while the load ran."""
    most: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        watched = {}
        for name, server in (("pg1", cluster.primary), ("pg2", cluster.standbys[0])):
            connection = stack.enter_context(contextlib.closing(psycopg2.connect(server.conninfo())))
            connection.autocommit = True
            watched[name] = stack.enter_context(connection.cursor())
        while load.is_running():
            for name, cursor in watched.items():
                cursor.execute(SESSIONS, (f"%shmpool:{pool}:%",))
                most[name] = max(most[name], (cursor.fetchone() or (0,))[0])
    return most


def test_four_kinds_of_servers_share_one_budget(tables: Cluster, pool_name: str, tmp_path: Path) -> None:
    """No request fails, the caps hold at the servers, and status tells which server each worker belongs to."""
    names = Names.of(pool_name)
    endpoints = {
        "pg1": endpoint_keys(tables.primary.conninfo(), CAPS["pg1"]),
        "pg2": endpoint_keys(tables.standbys[0].conninfo(), CAPS["pg2"]),
    }
    config = tmp_path / "shmpool.toml"
    config.write_text(pool_config(pool_name, endpoints, GROUPS, EXTRA))
    environment = {"SHMPOOL_NAME": pool_name, "SHMPOOL_CONFIG": str(config), "PYTHONPATH": str(EXAMPLE)}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, command in SERVERS.items():
            directory = tmp_path / name.replace(" ", "-")
            directory.mkdir()
            servers[name] = stack.enter_context(running(command, directory, environment, names))
        load = Load(servers)
        most = most_sessions(tables, pool_name, load)
        assert load.answers == {(name, 2): CLIENTS * ROUNDS * len(MIX) for name in SERVERS}
        assert all(most[name] <= cap for name, cap in CAPS.items()), most
        report = observe(names)
        held = {(w.server, w.server_pid) for w in report.workers if w.state is RowState.HELD}
        assert held == {
            (ServerKind.GUNICORN if "gunicorn" in name else ServerKind.UWSGI, server.pid)
            for name, server in servers.items()
        }
        assert not report.violations
        print(f"\nanswers {dict(load.answers)}; most sessions {dict(most)} of {CAPS}")
