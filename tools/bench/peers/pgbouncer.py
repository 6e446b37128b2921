"""A PgBouncer in transaction mode in front of a throw-away server."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg2.extensions import make_dsn

from tools.pg_cluster import HOST, Server
from tools.stage import free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
START_S = 10.0

# Trust on both sides, as for everybody here; nothing is logged for a connection or a minute.
CONFIG = """
[databases]
{databases}
[pgbouncer]
pool_mode = transaction
default_pool_size = {connections}
max_client_conn = 2000
auth_type = any
listen_addr = {host}
listen_port = {port}
unix_socket_dir = {folder}
log_connections = 0
log_disconnections = 0
log_stats = 0
"""


def version() -> str | None:
    """Return what PgBouncer says it is, or None where there is none."""
    if PROGRAM is None:
        return None
    return subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@dataclass(frozen=True, slots=True)
class PgBouncer:
    """A running one."""

    pid: int
    port: int
    folder: Path

    def conninfo(self, database: str, *, is_unix: bool) -> str:
        """Return how a client reaches one of its databases."""
        host = str(self.folder) if is_unix else HOST
        return make_dsn(None, host=host, port=self.port, dbname=database, user=database)


@contextmanager
def running(server: Server, roles: Mapping[str, str], connections: int) -> Iterator[PgBouncer]:
    """Run one with a pool of so many connections for each role of the server; a database is named like its role.

    It refuses to run as root: then it runs as `nobody`.

    Args:
        roles: by database, the role at the server.
    """
    assert PROGRAM is not None
    port = free_port()
    surroundings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shmpool-pgbouncer-") as name:
        folder = Path(name)
        config = folder / "pgbouncer.ini"
        databases = "".join(
            f"{database} = host={HOST} port={server.port} dbname=postgres user={role}\n"
            for database, role in roles.items()
        )
        config.write_text(
            CONFIG.format(databases=databases, connections=connections, host=HOST, port=port, folder=folder)
        )
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (folder, config):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            surroundings = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([PROGRAM, str(config)], stdout=log, stderr=log, cwd="/", **surroundings)
        try:
            _wait(process, port, folder / "log")
            yield PgBouncer(process.pid, port, folder)
        finally:
            process.terminate()
            process.wait(START_S)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"PgBouncer did not start: {log.read_text(errors='replace')}")
