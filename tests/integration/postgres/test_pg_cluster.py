"""The throw-away servers do what other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tools.pg_cluster import Cluster, PostgresNotFoundError, Server, children_of, find_binaries

IN_RECOVERY = "SELECT pg_is_in_recovery()"


@pytest.fixture
def pair() -> Iterator[Cluster]:
    require_postgres()
    with Cluster(standbys=1) as cluster:
        yield cluster


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_shared_server_answers(primary: Server) -> None:
    """The session's server accepts connections over TCP and over its Unix socket."""
    assert primary.execute(IN_RECOVERY) == [(False,)]
    connection = psycopg2.connect(primary.conninfo(host=str(primary.root)))
    connection.close()


def test_standby_replicates(cluster: Cluster) -> None:
    """What the primary commits arrives at the standby."""
    cluster.primary.execute("CREATE TABLE replicated (n int)")
    try:
        standby = cluster.standbys[0]
        assert standby.execute(IN_RECOVERY) == [(True,)]
        wait_until(lambda: standby.execute("SELECT to_regclass('replicated')") != [(None,)])
    finally:
        cluster.primary.execute("DROP TABLE replicated")


def test_promoted_standby_accepts_writes(pair: Cluster) -> None:
    """After the primary's death a promoted standby is a primary."""
    pair.primary.kill()
    standby = pair.standbys[0]
    standby.promote()
    standby.execute("CREATE TABLE written ()")
    assert standby.execute(IN_RECOVERY) == [(False,)]


def test_killed_server_comes_back_with_its_data(pair: Cluster) -> None:
    """A kill ends every process; a start brings back what was committed, on the same port."""
    server = pair.primary
    assert server.pid is not None
    processes = [server.pid, *children_of(server.pid)]
    server.execute("CREATE TABLE kept ()")
    conninfo = server.conninfo()

    server.kill()

    assert not server.is_running
    assert not any(is_alive(pid) for pid in processes)
    with pytest.raises(psycopg2.OperationalError):
        server.execute("SELECT 1")
    server.start()
    assert server.conninfo() == conninfo
    assert server.execute("SELECT count(*) FROM kept") == [(0,)]


def test_paused_server_is_silent_until_resumed(pair: Cluster) -> None:
    """A paused server answers nothing and a resumed one goes on with the same processes."""
    server = pair.primary
    before = server.pid
    server.pause()
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(server.conninfo(connect_timeout=2))
    server.resume()
    assert server.execute("SELECT 1") == [(1,)]
    assert server.pid == before


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_the_port(pair: Cluster, mode: str) -> None:
    """A restart in any mode, even of a paused server, ends in a server that answers."""
    port = pair.primary.port
    pair.primary.pause()
    pair.primary.restart(mode)
    assert pair.primary.port == port
    assert pair.primary.execute("SELECT 1") == [(1,)]


def test_closed_cluster_leaves_nothing() -> None:
    """Leaving the block by an exception removes processes and directory, paused or not."""
    require_postgres()
    cluster = Cluster(standbys=1)

    def fail_inside() -> None:
        with cluster:
            processes.update(cluster.pids)
            cluster.standbys[0].pause()
            raise InterruptedError

    processes: set[int] = set()
    with pytest.raises(InterruptedError):
        fail_inside()
    assert len(processes) == 3  # the guard and two servers
    assert not cluster.root.exists()
    assert not any(is_alive(pid) for pid in processes)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_owner_leaves_nothing(ending: signal.Signals) -> None:
    """Servers of `python -m tools.pg_cluster` end with it, even when it is killed."""
    require_postgres()
    owner = subprocess.Popen(
        [sys.executable, "-m", "tools.pg_cluster", "--standbys", "1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    with owner:
        assert owner.stdout is not None
        while not owner.stdout.readline().startswith("Ctrl-C"):
            assert owner.poll() is None
        processes = children_of(owner.pid)
        assert len(processes) == 3  # the guard and two servers
        words = Path(f"/proc/{processes[0]}/cmdline").read_text().split("\0")
        root = Path(words[-2])
        assert root.is_dir()
        os.kill(owner.pid, ending)
    wait_until(lambda: not any(is_alive(pid) for pid in processes))
    wait_until(lambda: not root.exists())


def test_wrong_binaries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PG_BINDIR without a server is an error that names it, not a silent second choice."""
    monkeypatch.setenv("PG_BINDIR", str(tmp_path))
    with pytest.raises(PostgresNotFoundError, match=str(tmp_path)):
        find_binaries()
