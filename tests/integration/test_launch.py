"""Starting a coordinator as a program."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shmpool.launch import LaunchError, ensure_coordinator, serving_pid, start_on_demand
from shmpool.names import Names
from tests.support.coordinator import endpoint_keys, pool_config
from tests.support.gunicorn import stop_coordinator

NOBODY = 65534


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


def test_root_starts_it_as_the_workers_user(config: Path, pool_name: str) -> None:
    """The names carry that user's uid, and the process runs as that user."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a program as another user")
    if not _can_run_as_nobody():
        pytest.skip(f"uid {NOBODY} may not execute {sys.executable}")
    names = Names.of(pool_name, NOBODY)
    try:
        ensure_coordinator(str(config), uid=NOBODY)
        pid = serving_pid(names)
        assert pid is not None
        assert os.stat(f"/proc/{pid}").st_uid == NOBODY
    finally:
        stop_coordinator(names)


def _can_run_as_nobody() -> bool:
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True
