"""A PgBouncer in front of servers: a private configuration on a loopback port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.waiting import wait_until
from tools.pg_cluster import HOST
from tools.stage import free_port

NOBODY: Final = 65534
USER: Final = "postgres"
CONFIGURATION: Final = """
[databases]
{databases}
[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = {mode}
default_pool_size = {servers}
server_login_retry = 0.2
logfile =
pidfile =
"""


class Bouncer:
    """A running PgBouncer."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    @property
    def log(self) -> str:
        """What it logged."""
        return self._log.read_text(errors="replace")

    def conninfo(self, dbname: str = "postgres", user: str = USER) -> str:
        """Return how clients reach a database through it."""
        return f"host={HOST} port={self.port} user={user} dbname={dbname}"

    def listens(self) -> bool:
        """Whether it takes connections."""
        with socket.socket() as client:
            return client.connect_ex((HOST, self.port)) == 0


def require_pgbouncer() -> str:
    """Return the program; skip the test where there is none, and fail it in CI."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is not None:
        return program
    missing = "PgBouncer is not installed (Debian: pgbouncer)"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def running_pgbouncer(ports: Mapping[str, int], mode: str = "transaction", servers: int = 4) -> Iterator[Bouncer]:
    """Run one until the block is left.

    Args:
        ports: where each of its databases' server listens; the database there is `postgres`.
        mode: what it shares: `transaction` or `session`.
        servers: how many server connections it has for a database and user.
    """
    program = require_pgbouncer()
    root = os.geteuid() == 0  # which it refuses to run as
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        users, file, log = (directory / one for one in ("users", "pgbouncer.ini", "log"))
        users.write_text(f'"{USER}" ""\n')
        port = free_port()
        lines = [f"{one} = host={HOST} port={at} dbname=postgres" for one, at in ports.items()]
        file.write_text(
            CONFIGURATION.format(
                databases="\n".join(lines), host=HOST, port=port, users=users, mode=mode, servers=servers
            )
        )
        with log.open("ab") as output:
            process = subprocess.Popen(
                [program, "-q", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=NOBODY if root else None,
                group=NOBODY if root else None,
                extra_groups=[] if root else None,
            )
        try:
            bouncer = Bouncer(port, log)
            wait_until(bouncer.listens, within=10, what=lambda: bouncer.log)
            yield bouncer
        finally:
            process.terminate()
            process.wait(10)
