"""Who may use a pool: the user it belongs to, a configured group, nobody else; and servers that root starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmpool.control_client import ControlError, request
from shmpool.launch import serving_pid
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.status import RowState
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import stop_coordinator
from tests.support.users import User, Users
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST, Server
from tools.stage import free_port, gunicorn_command

NOBODY = User(65534)
GROUP = 54100
OWNER, MEMBER, STRANGER = User(54001, (GROUP,)), User(54002, (GROUP,)), User(54003)
PROBE = '[probe]\ninter = "0.2s"\nfastinter = "0.1s"'
WORK = 'connections = 4\ntarget = "primary"\nautocommit = true'
END_S = 15.0

WORKER = """
import json, os, sys
from shmpool import Pool

try:
    pool = Pool(sys.argv[1], uid=int(sys.argv[2]))
    with pool.connection("work", timeout=3.0) as conn, conn.cursor() as cur:
        cur.execute("SELECT 1")
        print(json.dumps({"uid": os.geteuid()}), flush=True)
        sys.stdin.readline()
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
"""

APPLICATION = """
import json, os, shmpool

pool = shmpool.Pool()

def application(environ, start_response):
    with pool.connection("work", timeout=10.0) as conn, conn.cursor() as cur:
        cur.execute("SELECT 1")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"uid": os.getuid(), "groups": os.getgroups(), "pid": os.getpid()}).encode()]
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may read."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def write_config(place: Path, pool: str, server: Server, access: str) -> Path:
    """Write a configuration of one endpoint and one group."""
    path = place / f"{pool}.toml"
    extra = f"{PROBE}\n[access]\n{access}"
    path.write_text(pool_config(pool, {"pg1": endpoint_keys(server.conninfo())}, {"work": WORK}, extra))
    return path


@contextmanager
def program(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that has ended afterwards; what it says goes to a file, unless asked for."""
    with log.open("ab") as said:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said} | options
        process = subprocess.Popen(command, cwd="/", text=True, **streams)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            process.kill()
            process.communicate()


@contextmanager
def coordinator(users: Users, user: User, config: Path, names: Names) -> Iterator[subprocess.Popen[str]]:
    """A coordinator that runs as a user; nothing of the pool is left."""
    log = config.with_suffix(".log")
    command = users.python(user, "-m", "shmpool_coordinator", "run", "--config", str(config))
    try:
        with program(command, log) as process:
            wait_until(lambda: _serves(names) or process.poll() is not None, within=10)
            assert process.poll() is None, log.read_text()
            yield process
    finally:
        for path in names.leftovers():
            path.unlink(missing_ok=True)


def _serves(names: Names) -> bool:
    try:
        return any(group.free == group.target for group in observe(names).groups) and bool(request(names, "info"))
    except ControlError:
        return False


@contextmanager
def worker(users: Users, user: User, names: Names) -> Iterator[dict[str, Any]]:
    """A worker of a user that holds a connection, or what kept it from that."""
    command = users.python(user, "-c", WORKER, names.pool, str(names.uid))
    with program(command, Path(os.devnull), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline()) | {"worker": process}


def refused(users: Users, user: User, names: Names) -> str:
    """Return the error that a user's worker ends with."""
    with worker(users, user, names) as told:
        return str(told["error"])


@pytest.fixture
def shared(users: Users, place: Path, pool_name: str, primary: Server) -> Iterator[Names]:
    """A pool of OWNER that GROUP may use."""
    names = Names.of(pool_name, OWNER.uid)
    config = write_config(place, pool_name, primary, f'group = "{GROUP}"')
    with coordinator(users, OWNER, config, names):
        yield names


# -- a group


def test_member_of_the_group_works_in_the_pool(users: Users, shared: Names) -> None:
    """All names are the owner's and the group's; a member attaches, is heard, and is missed when killed."""
    for path in shared.leftovers():
        info = path.lstat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (OWNER.uid, GROUP, 0o660), path
    with worker(users, MEMBER, shared) as told:
        assert told["uid"] == MEMBER.uid, told
        wait_until(lambda: request(shared, "info")["workers"] == 1)
        (row,) = [row for row in observe(shared).workers if row.state is RowState.HELD]
        assert row.pid == told["worker"].pid
        told["worker"].kill()
        told["worker"].wait()
        wait_until(lambda: all(group.free == group.target for group in observe(shared).groups), within=5)


def test_group_by_its_supplement_alone(users: Users, shared: Names) -> None:
    """Membership that only the process has (containers, systemd) counts on the control socket too."""
    command = users.python(MEMBER, "-m", "shmpool_coordinator", "info", shared.pool, "--user", str(OWNER.uid))
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert f"pool: {shared.pool}" in done.stdout, done.stderr


def test_stranger_is_refused_and_told_why(users: Users, shared: Names) -> None:
    """A user without the group learns whose the pool is, whom it lets in, and what to do."""
    error = refused(users, STRANGER, shared)
    assert f"segment {shared.segment}: cannot be opened (Permission denied)" in error
    assert f"mode 0660 of uid {OWNER.uid} and gid {GROUP}" in error
    assert f"this process is uid {STRANGER.uid} with groups {STRANGER.uid}; run it as that user" in error
    assert "[access] group" in error


def test_private_pool_lets_no_member_in(users: Users, place: Path, pool_name: str, primary: Server) -> None:
    """Without a configured group a pool is its owner's alone."""
    names = Names.of(pool_name, OWNER.uid)
    with coordinator(users, OWNER, write_config(place, pool_name, primary, "mode = 0o600"), names):
        assert "mode 0600 of uid 54001" in refused(users, MEMBER, names)
        with worker(users, OWNER, names) as told:
            assert told["uid"] == OWNER.uid, told


@pytest.mark.parametrize("user", [User(0), MEMBER], ids=["root", "member"])
def test_tools_show_the_pool_of_another_user(users: Users, shared: Names, user: User) -> None:
    """`--user` names whose pool is meant; without it, it is that of who asks."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = users.python(user, "-m", "shmpool.cli", *arguments)
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)

    wait_until(lambda: observe(shared).level == 0)
    whole = run("status", shared.pool, "--user", str(OWNER.uid), "--json")
    assert whole.returncode == 0, whole.stdout
    assert json.loads(whole.stdout)["name"] == shared.pool
    assert shared.pool in run("list", "--user", str(OWNER.uid)).stdout
    own = run("status", shared.pool)
    assert own.returncode == 2
    assert f"no segment {Names.of(shared.pool, user.uid).segment}" in own.stdout


def test_group_that_the_coordinator_is_not_in(users: Users, place: Path, pool_name: str, primary: Server) -> None:
    """A group that the coordinator cannot give anything to is told before anything is made."""
    config = write_config(place, pool_name, primary, f'group = "{GROUP}"')
    command = users.python(STRANGER, "-m", "shmpool_coordinator", "run", "--config", str(config))
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert f'access.group: found "{GROUP}" (gid {GROUP}), of which uid {STRANGER.uid} is no member' in done.stderr
    assert Names.of(pool_name, STRANGER.uid).leftovers() == []


# -- wrong owners and modes


def semaphore_of(names: Names) -> Path:
    """Return a semaphore of a pool."""
    return next(path for path in names.leftovers() if path.name.startswith("sem."))


def given_away(path: Path) -> None:
    """Let a file belong to somebody else, as if that one had made it."""
    os.chown(path, STRANGER.uid, GROUP)


def opened_up(path: Path) -> None:
    """Let everybody write to a file."""
    path.chmod(0o666)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (given_away, f"belongs to uid {STRANGER.uid}, expected uid {OWNER.uid}; remove it as its owner, or as root"),
        (opened_up, "mode 0666 lets everybody in, expected 0600 or 0660"),
    ],
)
@pytest.mark.parametrize(
    "which",
    [lambda names: names.segment, lambda names: names.lock, semaphore_of],
    ids=["segment", "lock", "semaphore"],
)
def test_wrong_owner_or_mode_is_refused(
    users: Users, shared: Names, which: Callable[[Names], Path], change: Callable[[Path], None], told: str
) -> None:
    """Whatever a pool has under its names is its owner's and closed to others, or nobody attaches."""
    path = which(shared)
    change(path)
    error = refused(users, MEMBER, shared)
    assert told in error
    assert path.name.removeprefix("sem.") in error
    os.chown(path, OWNER.uid, GROUP)
    path.chmod(0o660)
    with worker(users, MEMBER, shared) as served:
        assert "uid" in served, served


LISTENING = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_socket_of_somebody_else_is_not_spoken_to(users: Users, place: Path, pool_name: str) -> None:
    """Who listens in the coordinator's place is told by uid, and gets nothing said; a coordinator refuses to start."""
    names = Names.of(pool_name, OWNER.uid)
    command = users.python(STRANGER, "-c", LISTENING, str(names.socket))
    try:
        with program(command, Path(os.devnull), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.chmod(names.socket, 0o666)
            with pytest.raises(
                ControlError, match=rf"uid {STRANGER.uid} \(pid \d+\) listens, expected uid {OWNER.uid}"
            ):
                request(names, "info")
            done = _started(users, place, pool_name)
            assert done.returncode == 1
            assert f"control socket: belongs to uid {STRANGER.uid}, expected uid {OWNER.uid}" in done.stderr
    finally:
        for path in names.leftovers():
            path.unlink()


@pytest.mark.parametrize("which", ["segment", "lock"])
def test_coordinator_takes_no_name_that_somebody_else_made(
    users: Users, place: Path, pool_name: str, which: str
) -> None:
    """A segment or lock file that another user put there keeps a coordinator from starting, and stays as it is."""
    names = Names.of(pool_name, OWNER.uid)
    path: Path = getattr(names, which)
    path.write_bytes(b"not ours")
    try:
        path.chmod(0o666)
        os.chown(path, STRANGER.uid, STRANGER.uid)
        done = _started(users, place, pool_name)
        assert done.returncode == 1
        assert f"{path}: belongs to uid {STRANGER.uid}, expected uid {OWNER.uid}; remove it as its owner" in done.stderr
        assert path.read_bytes() == b"not ours"
    finally:
        for left in names.leftovers():
            left.unlink()


def _started(users: Users, place: Path, pool: str) -> subprocess.CompletedProcess[str]:
    """Run OWNER's coordinator, which cannot start, to its end."""
    config = place / "pool.toml"
    endpoints = {"pg1": endpoint_keys("host=127.0.0.1 port=1")}
    config.write_text(pool_config(pool, endpoints, {"work": WORK}))
    command = users.python(OWNER, "-m", "shmpool_coordinator", "run", "--config", str(config))
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=30, check=False)


# -- servers that root starts


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_gunicorn_started_by_root(
    users: Users, place: Path, pool_name: str, primary: Server, preload: list[str]
) -> None:
    """With `--user` the coordinator runs as the workers' user, and they attach after they became that user."""
    names, log, port = Names.of(pool_name, NOBODY.uid), place / "gunicorn.log", free_port()
    config = write_config(place, pool_name, primary, "mode = 0o600")
    (place / "conf.py").write_text("from shmpool.hooks.gunicorn import *\n")
    (place / "site_of_nobody.py").write_text(APPLICATION)
    options = ["--config", str(place / "conf.py"), "--pythonpath", str(place), "--workers", "2", *preload]
    who = ["--user", str(NOBODY.uid), "--group", str(NOBODY.uid)]
    command = users.as_root(*gunicorn_command(port, *options, *who, app="site_of_nobody:application"))
    environment = os.environ | {"SHMPOOL_NAME": pool_name, "SHMPOOL_CONFIG": str(config)}
    try:
        with program(command, log, env=environment) as process:
            wait_until(lambda: _answers(port) or process.poll() is not None, within=END_S)
            assert process.poll() is None, log.read_text()
            assert os.stat(f"/proc/{process.pid}").st_uid == 0
            served = [_get(port) for _ in range(10)]
            assert {answer["uid"] for answer in served} == {NOBODY.uid}
            assert {gid for answer in served for gid in answer["groups"]} <= {NOBODY.uid}
            pid = serving_pid(names)
            assert pid
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(NOBODY.uid)}
            assert "0" not in status["Groups"].split()
            assert {path.lstat().st_uid for path in names.leftovers()} == {NOBODY.uid}
            rows = {row.pid for row in observe(names).workers if row.state is RowState.HELD}
            assert rows == {answer["pid"] for answer in served}
            assert Names.of(pool_name).leftovers() == [], "root has no part in it"
            kill_one(names, rows)
    finally:
        stop_coordinator(names)


def kill_one(names: Names, rows: set[int]) -> None:
    """Kill a worker: its permits come back, as root's master tells its coordinator or that one finds out."""
    os.kill(min(rows), signal.SIGKILL)
    wait_until(lambda: not any(row.orphans for row in observe(names).workers), within=5)
    report = observe(names)
    assert all(group.free is not None and group.free + group.held == group.target for group in report.groups)


def _get(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=20) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def _answers(port: int) -> bool:
    try:
        _get(port)
    except OSError:
        return False
    return True
