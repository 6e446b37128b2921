"""uWSGI with the coordinator as its mule: real masters, workers, mules, servers; test_reload.py has its reloads."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool import Pool
from shmpool.names import Names
from shmpool.rows import start_time
from shmpool.states import Health, ServerKind, Use
from shmpool.status import RowState
from shmpool_coordinator import mule as mule_module
from shmpool_coordinator.mule import PAUSE_S
from tests.support.coordinator import running_coordinator
from tests.support.gunicorn import Clients, Sampler, example_config, guest_book, stop_coordinator
from tests.support.uwsgi import (
    HOOKS,
    MULE_FILE,
    MULE_FUNCTION,
    UWSGI,
    UwsgiServer,
    requires_uwsgi,
    running_uwsgi,
    running_vassals,
)
from tests.support.waiting import wait_until
from tools.pg_cluster import Cluster

CAP = 3
STUCK = """
SELECT pid FROM pg_stat_activity
WHERE application_name LIKE '%%shmpool:%s:%%' AND state = 'active' AND query LIKE 'SELECT pg_sleep(60%%'
"""
# A uWSGI that runs no threads, as older ones did without `enable-threads`: what its module says then.
THREADLESS = "import uwsgi\nuwsgi.has_threads = 0\nimport shmpool.hooks.uwsgi\n"
# An application that queries while it is loaded.
EAGER = "from app import application, read_entries\nread_entries()\nread_entries()\n"
# It takes `uwsgi.post_fork_hook` over.
DECORATED = """
from uwsgidecorators import postfork
@postfork
def note():
    print("decorated hook", flush=True)
"""
HASTY = """
import app
app.pool.connection = lambda group, connection=app.pool.connection: connection(group, timeout=0.5)
from app import application
"""

pytestmark = requires_uwsgi


@pytest.fixture(scope="module")
def servers(cluster: Cluster) -> Iterator[Cluster]:
    """A primary and a standby with the guest book's table."""
    with guest_book(cluster):
        yield cluster


def generations(server: UwsgiServer) -> set[int]:
    """Return the server generations of the workers that live."""
    return {generation for pid, generation in server.rows().items() if pid in server.workers()}


def wait_for_more(clients: Clients, count: int = 50) -> None:
    """Return when so many further requests were answered."""
    seen = clients.served
    wait_until(lambda: clients.served > seen + count, within=15, what=lambda: f"{clients.served} {clients.failures}")


@pytest.mark.parametrize(
    "options",
    [["--processes", "2"], ["--processes", "2", "--threads", "4", "--lazy-apps"]],
    ids=["processes", "threads, lazy-apps"],
)
def test_reads_reach_the_replica_and_writes_the_primary(
    servers: Cluster, pool_name: str, tmp_path: Path, options: list[str]
) -> None:
    """One import and one mule serve all shapes; the end of uWSGI leaves nothing of the pool."""
    with running_uwsgi(tmp_path, pool_name, example_config(pool_name, servers), *options) as server:
        written = server.request("/entries", form="name=Ann&said=<hello>")
        assert (written[0], written[1]["role"]) == (201, "primary")
        wait_until(lambda: {"name": "Ann", "said": "<hello>"} in server.request("/")[1]["entries"])
        assert server.request("/")[1]["role"] == "replica"
        server.use_all_workers()
        assert len(generations(server)) == 1, "workers of one start have one server generation"
        held = [w for w in server.status().workers if w.state is RowState.HELD]
        assert {(w.server, w.server_pid) for w in held} == {(ServerKind.UWSGI, server.pid)}
        assert {w.pid for w in held} == server.workers()
        assert server.is_whole()
        assert server.status().violations == ()
        server.stop()
        assert server.names.leftovers() == []
    assert "Traceback" not in server.log


@pytest.mark.parametrize("options", [[], ["--lazy-apps"]], ids=["plain", "lazy-apps"])
def test_a_single_process_without_a_master(
    servers: Cluster, pool_name: str, tmp_path: Path, options: list[str]
) -> None:
    """There is no master and so no mule: the process starts a coordinator, and is the server itself."""
    config = example_config(pool_name, servers)
    with running_uwsgi(tmp_path, pool_name, config, *options, mule=None, is_mastered=False) as server:

        def keeps_its_connection() -> bool:
            """Whether it does after a request: one that fell back on the primary leaves once the replica is seen."""
            assert server.request("/")[0] == 200
            (held,) = [w for w in server.status().workers if w.state is RowState.HELD]
            assert (held.pid, held.server, held.server_pid) == (server.pid, ServerKind.UWSGI, server.pid)
            return held.idle == 1

        wait_until(keeps_its_connection, within=10, what=lambda: server.log)
        server.stop()
        wait_until(lambda: server.rows() == {} and server.is_whole())


def test_the_cap_of_a_group_holds_across_workers_and_threads(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Eight threads in two workers never have more sessions at the servers than the group's cap."""
    config = example_config(pool_name, servers, read=CAP)
    with running_uwsgi(tmp_path, pool_name, config, "--processes", "2", "--threads", "4") as server:
        with Sampler(servers, pool_name) as sampler, Clients(server, "/slow?ms=10", 16) as clients:
            wait_until(lambda: clients.served > 200 and sampler.samples > 50, within=30)
        assert clients.failures == []
        assert sampler.most == CAP


# -- the mule


@pytest.mark.parametrize(
    ("mule", "kills", "options"),
    [
        (MULE_FILE, 3, ["--lazy-apps"]),
        (MULE_FUNCTION, 1, []),
        (mule_module.__file__, 1, []),
    ],
    ids=["file", "function", "module's own file"],
)
def test_a_killed_mule_is_replaced_under_load(
    servers: Cluster, pool_name: str, tmp_path: Path, mule: str | Path, kills: int, options: list[str]
) -> None:
    """Whatever the mule was started by, uWSGI starts another, which adopts the pool; no request fails."""
    config = example_config(pool_name, servers, read=CAP)
    with running_uwsgi(tmp_path, pool_name, config, "--processes", "2", *options, mule=mule) as server:
        server.use_all_workers()
        rows = server.rows()
        with Sampler(servers, pool_name) as sampler, Clients(server, "/slow?ms=5", 4) as clients:
            for _ in range(kills):
                server.replace_mule()
                wait_for_more(clients)
        assert clients.failures == []
        assert sampler.most <= CAP
        assert server.rows() == rows, "no worker noticed"
        wait_until(server.is_whole)
        coordinator = server.status().coordinator
        assert coordinator is not None
        assert coordinator.adoptions == 1 + kills
        command = Path(f"/proc/{server.mules()[-1]}/cmdline").read_bytes().split(b"\0")
        assert command[-4:-1] == [b"shmpool_coordinator", b"run", b"--mule"]
        assert descriptors(server.mules()[-1]).isdisjoint(listening(server)), "the mule keeps no listening socket"


def descriptors(pid: int) -> set[str]:
    """Return what a process has open."""
    return {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}


def listening(server: UwsgiServer) -> set[str]:
    """Return the server's listening sockets, as /proc names them."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].endswith(f":{server.port:04X}") and words[3] == "0A":
            found.add(f"socket:[{words[9]}]")
    assert found
    assert found & descriptors(server.pid)
    return found


def test_requests_that_come_before_the_mule_is_ready_wait_for_it(
    servers: Cluster, pool_name: str, tmp_path: Path
) -> None:
    """uWSGI starts workers and mule together: the first requests find the mule, and start no coordinator beside it."""
    server = UwsgiServer(tmp_path, pool_name, example_config(pool_name, servers))
    server.start([*UWSGI, f"--mule={MULE_FILE}", "--processes", "2"])
    try:
        wait_until(lambda: "spawned uWSGI worker 2" in server.log, within=10, every=0.001)
        with Clients(server, "/", 4, often=False) as clients:
            pass
        assert clients.failures == []
        assert server.is_coordinated()
        assert "standing by" not in server.log
        server.stop()
        assert server.names.leftovers() == []
    finally:
        server.stop()
        stop_coordinator(server.names)


def test_a_mule_without_a_usable_configuration_says_so_and_pauses(
    servers: Cluster, pool_name: str, tmp_path: Path
) -> None:
    """Its log says what is wrong; requests say it, too; it does not spin, and holds up nobody's end."""
    config = example_config(pool_name, servers).replace("max_connections", "max_connection", 1)
    (tmp_path / "hasty.py").write_text(HASTY)
    server = UwsgiServer(tmp_path, pool_name, config)
    try:
        server.start([*UWSGI, f"--mule={MULE_FILE}", "--pythonpath", str(tmp_path), "--module", "hasty:application"])
        wait_until(server.is_ready, within=10, what=lambda: server.log)
        wait_until(lambda: "max_connection: " in server.log, within=10, what=lambda: server.log)
        status, answer = server.request("/")  # it waits for the mule
        assert (status, "is just being started" in answer["error"]) == (503, True)
        assert len(server.mules()) == 1
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < PAUSE_S - 1
        assert server.names.leftovers() == []
    finally:
        server.stop()
        stop_coordinator(server.names)


# -- ends of workers


def test_cheaper_workers_give_back_everything(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Workers are added under load and ended after it: no request fails, and none of them needs the reaper."""
    config = example_config(pool_name, servers, read=CAP)
    options = ("--processes", "2", "--cheaper", "1", "--cheaper-overload", "1")
    with running_uwsgi(tmp_path, pool_name, config, *options) as server:
        with Clients(server, "/slow?ms=20", 6) as clients:
            wait_until(lambda: len(set(server.rows()) & server.workers()) == 2, within=20, what=lambda: server.log)
            wait_for_more(clients)
        assert clients.failures == []
        wait_until(lambda: len(server.workers()) == 1, within=20, what=lambda: server.log)
        wait_until(lambda: set(server.rows()) <= server.workers() and server.is_whole(), what=lambda: server.log)
        assert reaped_rows(server) == 0


def test_max_requests_replaces_workers_without_a_trace(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Workers come and go under load: no request fails, the cap holds, none needs the reaper."""
    config = example_config(pool_name, servers, read=CAP)
    options = ("--processes", "2", "--max-requests", "20", "--min-worker-lifetime", "0")
    with running_uwsgi(tmp_path, pool_name, config, *options) as server:
        server.use_all_workers()
        first, before = server.workers(), generations(server)
        with Sampler(servers, pool_name) as sampler, Clients(server, "/slow?ms=5", 4) as clients:
            wait_until(lambda: not server.workers() & first and generations(server), within=20, what=lambda: server.log)
            after = generations(server)
        assert clients.failures == []
        assert sampler.most <= CAP
        assert after == before, "the master loaded the application once"
        wait_until(server.is_whole)
        assert reaped_rows(server) == 0


def reaped_rows(server: UwsgiServer) -> int:
    """Return how many worker rows were left to the coordinator."""
    coordinator = server.status().coordinator
    assert coordinator is not None
    return coordinator.reaped_rows


def test_a_harakiri_in_mid_query_leaves_no_session(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """The stuck worker is killed: its session ends within a second, its permits return, others go on."""

    def stuck_sessions() -> set[int]:
        return {pid for server in servers.servers for (pid,) in server.execute(STUCK % pool_name)}

    config = example_config(pool_name, servers, read=CAP)
    with (
        running_uwsgi(tmp_path, pool_name, config, "--processes", "2", "--harakiri", "1") as server,
        Sampler(servers, pool_name) as sampler,
        Clients(server, "/slow?ms=60000", 1, often=False) as stuck,
        Clients(server, "/slow?ms=5", 2) as others,
    ):
        wait_until(stuck_sessions, within=10, what=lambda: server.log)
        holders = {s.backend_pid: w.pid for w in server.status().workers for s in w.slots if s.use is Use.ACTIVE}
        (victim,) = (holders[pid] for pid in stuck_sessions())
        wait_until(lambda: start_time(victim) is None, within=10, every=0.005, what=lambda: server.log)
        died = time.monotonic()
        wait_until(lambda: not stuck_sessions(), every=0.005)
        ended_s = time.monotonic() - died
        wait_until(lambda: victim not in server.rows() and server.has_no_orphans(), every=0.005)
        back_s = time.monotonic() - died
        assert max(ended_s, back_s) < 1, f"session gone after {ended_s:.3f} s, permits back after {back_s:.3f} s"
        wait_for_more(others)
    print(f"\nharakiri: session gone after {ended_s * 1000:.0f} ms, permits back after {back_s * 1000:.0f} ms")
    assert len(stuck.failures) == 1
    assert others.failures == []
    assert sampler.most <= CAP
    assert "HARAKIRI" in server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_in_the_middle_of_requests_leaves_nothing(
    servers: Cluster, pool_name: str, tmp_path: Path, number: signal.Signals
) -> None:
    """Workers end without a word in the middle of queries: the mule settles what they held, then removes all."""
    with running_uwsgi(tmp_path, pool_name, example_config(pool_name, servers), "--processes", "2") as server:
        with Clients(server, "/slow?ms=60000", 2, often=False):
            wait_until(lambda: sum(w.active for w in server.status().workers) == 2)
            os.kill(server.pid, number)
            assert server.process.wait(10) == 0, server.log
        # uWSGI does not wait for its mules.
        wait_until(lambda: server.names.leftovers() == [], within=10, what=lambda: server.log)
    wait_until(lambda: "nothing is left" in server.log)


def test_a_graceful_stop_leaves_the_segment_for_the_next_start(
    servers: Cluster, pool_name: str, tmp_path: Path
) -> None:
    """A mule is told the same as for a reload; whoever starts next adopts a whole pool."""
    fifo = tmp_path / "fifo"
    config = example_config(pool_name, servers)
    options = ("--processes", "2", "--master-fifo", str(fifo))
    with running_uwsgi(tmp_path, pool_name, config, *options) as server:
        server.use_all_workers()
        fifo.write_text("q")
        assert server.process.wait(15) == 0, server.log
        assert "the segment stays" in server.log
        with running_coordinator(config, pool_name) as coordinator:
            assert "segment adopted" in coordinator.log
            wait_until(server.is_whole)


# -- what the application does


def has_mapped_segment(pid: int) -> bool:
    """Whether a process has a pool's segment mapped: a new worker may, until its hooks have run."""
    return "shmpool" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("app", "options"),
    [(EAGER, []), (EAGER + DECORATED, ["--py-call-uwsgi-fork-hooks"]), (EAGER + DECORATED, [])],
    ids=["plain", "fork-hooks", "decorated"],
)
def test_an_application_that_queries_while_it_is_loaded_leaves_nothing_with_the_master(
    servers: Cluster, pool_name: str, tmp_path: Path, app: str, options: list[str]
) -> None:
    """uWSGI forks after loading, without at-fork handlers: the master keeps no connection, no row; the log says who."""
    (tmp_path / "eager.py").write_text(app)
    config = example_config(pool_name, servers)
    with running_coordinator(config, pool_name):
        extra = ("--processes", "2", *options)
        with running_uwsgi(tmp_path, pool_name, config, *extra, app="eager:application", mule=None) as server:
            if app == EAGER:
                wait_until(lambda: not any(has_mapped_segment(pid) for pid in server.workers()))
            server.use_all_workers()
            assert set(server.rows()) == server.workers(), "the master has no row"
            assert server.is_whole()
            assert server.log.count("in read_entries") == 1, "the log says once who made it attach"
            assert server.log.count(f"used in pid {server.pid} before it forks") == 1
            assert server.log.count("decorated hook") == 2 * (DECORATED in app)
            held = [w for w in server.status().workers if w.state is RowState.HELD]
            assert {(w.server, w.server_pid) for w in held} == {(ServerKind.UWSGI, server.pid)}
            if app == EAGER:
                server.reload()
                assert set(server.rows()) == server.workers()
            assert server.status().violations == ()
            wait_until(server.is_whole)
        assert "Traceback" not in server.log


def test_hooks_chain_with_the_users_own(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """What the application registered before keeps working."""
    (tmp_path / "own.py").write_text(
        "import uwsgi\nuwsgi.post_fork_hook = lambda: print('own hook', uwsgi.worker_id(), flush=True)\n"
        "uwsgi.atexit = lambda: print('own exit', uwsgi.worker_id(), flush=True)\n"
    )
    config = example_config(pool_name, servers)
    options = ("--processes", "1", "--pythonpath", str(tmp_path), "--skip-atexit-teardown")
    hooks = ("--import", "own", *HOOKS)
    with running_uwsgi(tmp_path, pool_name, config, *options, hooks=hooks) as server:
        server.use_all_workers()
        server.reload()
        assert reaped_rows(server) == 0, "without Python's own exit functions, too"
    assert server.log.count("own hook 1") == 2
    assert "own exit 1" in server.log


def test_without_threads_the_work_is_done_after_requests(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """An idle connection that another process waits for is given back after a request; the log says it once."""
    (tmp_path / "threadless.py").write_text(THREADLESS)
    config = example_config(pool_name, servers, read=1)
    options = ("--processes", "1", "--pythonpath", str(tmp_path))
    with (
        running_uwsgi(tmp_path, pool_name, config, *options, hooks=("--import", "threadless")) as server,
        Pool(pool_name) as pool,
    ):
        wait_until(lambda: all(endpoint.health is Health.UP for endpoint in server.status().endpoints))
        assert server.request("/")[1]["role"] == "replica"  # by a connection that is to stay
        (worker,) = server.workers()
        assert len(list(Path(f"/proc/{worker}/task").iterdir())) == 1, "it has started no thread"
        got = threading.Event()

        def take() -> None:
            with pool.connection("read", timeout=10):
                got.set()

        waiting = threading.Thread(target=take)
        waiting.start()
        wait_until(lambda: any(slot.is_recalled for row in server.status().workers for slot in row.slots))
        assert not got.is_set()
        wait_until(lambda: server.request("/health") and got.is_set())  # these requests use no connection
        waiting.join()
        assert server.log.count("shmpool: Python threads do not run") == 1


# -- several


def test_vassals_share_one_pool(servers: Cluster, pool_name: str, tmp_path: Path) -> None:
    """Two instances under an emperor: one mule serves, the other stands by and takes over; the cap holds for both."""
    config = example_config(pool_name, servers, read=CAP)
    with running_vassals(tmp_path, pool_name, config, 2) as (emperor, vassals):
        names = Names.of(pool_name)
        wait_until(lambda: len(re.findall("standing by", emperor.log)) == 1, within=10, what=lambda: emperor.log)
        serving = next(v for v in vassals if v.coordinates())
        other = next(v for v in vassals if v is not serving)
        with Sampler(servers, pool_name) as sampler, Clients(other, "/slow?ms=5", 3) as clients:
            with Clients(serving, "/slow?ms=5", 3) as theirs:
                wait_for_more(theirs)
            assert theirs.failures == []
            serving.remove()
            wait_until(other.coordinates, within=20, what=lambda: emperor.log)
            wait_for_more(clients)
        assert clients.failures == []
        assert sampler.most <= CAP
        emperor.stop()
        assert names.leftovers() == []
