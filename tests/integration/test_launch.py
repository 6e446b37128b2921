"""Starting a coordinator as a program."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from shmpool import ConfigurationDiffers, Pool, attachment
from shmpool.cli import main
from shmpool.control_client import ControlError, request
from shmpool.document import Document
from shmpool.launch import LaunchError, ensure_coordinator, serving_pid, start_on_demand
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.segment import attach
from shmpool.status import RowState
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import stop_coordinator
from tests.support.users import Users
from tests.support.waiting import wait_until

NOBODY = 65534
SECRET = "not-to-be-seen"


@pytest.fixture
def config(pool_name: str) -> Iterator[Path]:
    """A configuration that everybody may read; its one endpoint refuses connections."""
    text = pool_config(
        pool_name,
        {"pg1": endpoint_keys("host=127.0.0.1 port=1 dbname=none")},
        {"read": 'connections = 2\ntarget = "any"'},
        extra='[coordinator]\nlinger = "30s"',
    )
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "pool.toml"
        path.write_text(text)
        yield path
    stop_coordinator(Names.of(pool_name))


@pytest.fixture
def names(pool_name: str) -> Iterator[Names]:
    """Names whose coordinator is ended afterwards."""
    names = Names.of(pool_name)
    yield names
    stop_coordinator(names)


def tables(pool: str, **more: Any) -> dict[str, Any]:
    """Return a configuration as a process carries it; its one endpoint refuses connections."""
    return {
        "name": pool,
        "endpoints": {"pg1": {"conninfo": "host=127.0.0.1 port=1 dbname=none", "max_connections": 2}},
        "groups": {"read": {"connections": 2, "target": "any"}},
    } | more


def test_many_starters_get_one_coordinator(config: Path, pool_name: str) -> None:
    """Whoever starts one at the same time finds the same one serving, in its own session."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ensure_coordinator(str(config)), range(4)))
    pid = serving_pid(Names.of(pool_name))
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    ensure_coordinator(str(config))
    assert serving_pid(Names.of(pool_name)) == pid


def test_it_inherits_no_descriptor(config: Path, pool_name: str) -> None:
    """An inheritable descriptor of the starter is closed in the coordinator."""
    with tempfile.TemporaryFile() as mine:
        os.set_inheritable(mine.fileno(), True)
        ensure_coordinator(str(config))
        pid = serving_pid(Names.of(pool_name))
        inode = os.fstat(mine.fileno()).st_ino
        assert inode not in {(fd.stat().st_ino if fd.exists() else 0) for fd in Path(f"/proc/{pid}/fd").iterdir()}


def test_a_failure_says_why(config: Path) -> None:
    """What the program printed is in the error."""
    config.write_text(config.read_text() + "[probe]\nrise = 0\n")
    with pytest.raises(LaunchError, match=r"probe\.rise"):
        ensure_coordinator(str(config))
    with pytest.raises(LaunchError, match="cannot be read"):
        ensure_coordinator("/nowhere/pool.toml")


def test_on_demand_only_where_the_file_allows_it(config: Path, pool_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, another pool's file, `autostart = false`: nothing is started."""
    names = Names.of(pool_name)
    monkeypatch.delenv("SHMPOOL_CONFIG", raising=False)
    assert not start_on_demand(names)
    monkeypatch.setenv("SHMPOOL_CONFIG", str(config))
    assert not start_on_demand(Names.of("another"))
    text = config.read_text()
    config.write_text(text.replace("[coordinator]", "[coordinator]\nautostart = false"))
    assert not start_on_demand(names)
    config.write_text(text)
    assert start_on_demand(names)


def test_a_number_is_a_linger_time_too(config: Path, pool_name: str) -> None:
    """What the file may say as a number of seconds reaches the program."""
    config.write_text(config.read_text().replace('linger = "30s"', "linger = 30"))
    ensure_coordinator(str(config))
    assert request(Names.of(pool_name), "info")["linger"] == 30.0


def test_a_process_starts_one_with_its_own_configuration(names: Names, capsys: pytest.CaptureFixture[str]) -> None:
    """It serves as with a file, and whoever looks is told that there is none."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ensure_coordinator, [Document(tables(names.pool), {"pg1": SECRET})] * 4))
    info = request(names, "info")
    assert info["pid"] == serving_pid(names)
    assert info["config_file"] == ""
    assert main(["status", names.pool]) in (0, 1)
    assert "given by a process" in capsys.readouterr().out
    with pytest.raises(ControlError, match="no file to read again"):
        request(names, "reload")


def test_more_than_a_pipe_holds_arrives(names: Names) -> None:
    """A large configuration is handed over as the program reads it."""
    groups = {f"g{n}": {"connections": 1, "target": "any", "settings": {"search_path": "x" * 2000}} for n in range(16)}
    document = Document(tables(names.pool, groups=groups), {"pg1": SECRET * 3000})
    assert len(document.encode()) > 65536
    ensure_coordinator(document)
    assert serving_pid(names) is not None


def test_a_wrong_configuration_of_a_process_says_all_that_is_wrong(names: Names) -> None:
    """As with a file, and without the password."""
    document = Document(tables(names.pool, probe={"rise": 0, "nonsense": 1}), {"pg1": SECRET, "pg2": SECRET})
    with pytest.raises(LaunchError, match=r"(?s)probe\.rise.*probe\.nonsense.*passwords") as caught:
        ensure_coordinator(document)
    assert SECRET not in str(caught.value)
    with pytest.raises(psycopg2.OperationalError, match=r"(?s)probe\.rise.*carries its own configuration"):
        Pool(config=document.config).checkout("read")


def test_on_demand_only_where_the_configuration_of_the_process_allows_it(names: Names) -> None:
    """Another pool's, `autostart = false`: nothing is started."""
    assert not start_on_demand(names, Document(tables("another")))
    assert not start_on_demand(names, Document(tables(names.pool, coordinator={"autostart": False})))
    assert start_on_demand(names, Document(tables(names.pool)))


def test_a_server_that_starts_coordinators_is_not_waited_for(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a mule has a coordinator, this pool's is still started by whoever carries its configuration."""
    monkeypatch.setattr(attachment, "_has_own_coordinator", True)
    with Pool(config=tables(names.pool)) as pool, pytest.raises(psycopg2.OperationalError, match="refused"):
        pool.checkout("read", timeout=2)
    assert serving_pid(names) is not None


def test_another_configuration_of_the_same_name_is_refused(names: Names) -> None:
    """While one with the name is in use: whether it came from a process or from a file."""
    ensure_coordinator(Document(tables(names.pool)))
    with Pool(config=tables(names.pool, probe={"rise": 5})) as other, Pool(config=tables(names.pool)) as same:
        with pytest.raises(ConfigurationDiffers, match="given by a process"):
            other.checkout("read")
        assert not any(worker.state is RowState.HELD for worker in observe(names).workers)
        with pytest.raises(psycopg2.OperationalError, match="refused"):  # by the endpoint
            same.checkout("read", timeout=0)


def test_what_another_configuration_has_left_is_taken_over(names: Names) -> None:
    """A coordinator that died under this name keeps nobody away."""
    ensure_coordinator(Document(tables(names.pool)))
    pid = serving_pid(names)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: serving_pid(names) is None)
    with (
        Pool(config=tables(names.pool, probe={"rise": 5})) as pool,
        pytest.raises(psycopg2.OperationalError, match="refused"),
    ):
        pool.checkout("read", timeout=2)
    assert serving_pid(names) not in (None, pid)


@pytest.mark.parametrize("passwords", [None, SECRET, {"pg9": SECRET}, {SECRET: "pg1"}, {"pg1": 5}, {"pg1": ""}])
def test_wrong_passwords_are_refused_and_not_shown(names: Names, passwords: object) -> None:
    """A message with something else than texts by endpoint gets a clear error."""
    ensure_coordinator(Document(tables(names.pool)))
    with pytest.raises(ControlError, match="passwords") as caught:
        request(names, "passwords", passwords=passwords)
    assert SECRET not in str(caught.value)
    assert request(names, "passwords", passwords={"pg1": SECRET})["type"] == "taken"


def test_a_coordinator_with_a_file_takes_no_passwords(config: Path, names: Names) -> None:
    """The file says where they are read."""
    ensure_coordinator(str(config))
    with pytest.raises(ControlError, match="says where passwords are read"):
        request(names, "passwords", passwords={"pg1": SECRET})


def test_a_retired_segment_has_a_successor_with_the_same_configuration(names: Names) -> None:
    """Although nothing can be read again."""
    document = Document(tables(names.pool))
    ensure_coordinator(document)
    token = request(names, "retire")["token"]
    wait_until(lambda: serving_pid(names) is not None)
    segment = attach(names)
    try:
        assert f"{segment.token:016x}" != token
        assert segment.read_settings()[1].document == document.digest
    finally:
        segment.release()


HIDDEN = """
import os, sys
from shmpool.control_client import request
from shmpool.document import Document
from shmpool.launch import ensure_coordinator, serving_pid
from shmpool.names import Names
from tests.integration.test_launch import tables

names = Names.of(sys.argv[1])
ensure_coordinator(Document(tables(names.pool), {"pg1": "any"}))
try:
    with open(f"/proc/{serving_pid(names)}/mem", "rb"):
        print("open to others")
except PermissionError:
    print("hidden")
finally:
    request(names, "stop")
"""


def test_nobody_reads_the_memory_that_passwords_are_in(pool_name: str) -> None:
    """Not even a process of the same user, which a core dump would be for as well."""
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"] if os.geteuid() == 0 else []
    if as_user and subprocess.run([*as_user, "true"], check=False, capture_output=True).returncode != 0:
        missing = "no user namespace can be made, and root reads everything"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    command = [*as_user, sys.executable, "-c", HIDDEN, pool_name]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    assert told == "hidden\n"


def test_root_starts_it_as_the_workers_user(users: Users, config: Path, pool_name: str) -> None:
    """The names carry that user's uid, the process runs as that user, and finds that user's home."""
    names = Names.of(pool_name, NOBODY)
    start = f"from shmpool.launch import ensure_coordinator; ensure_coordinator({str(config)!r}, uid={NOBODY})"
    try:
        subprocess.run(users.as_root(sys.executable, "-c", start), cwd="/", check=True)
        pid = serving_pid(names)
        assert pid is not None
        assert os.stat(f"/proc/{pid}").st_uid == NOBODY
        home = f"HOME={pwd.getpwuid(NOBODY).pw_dir}"
        assert home in Path(f"/proc/{pid}/environ").read_text().split("\0")
    finally:
        stop_coordinator(names)
