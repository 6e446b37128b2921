"""What a worker loads: the driver, the semaphores, little else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shmpool

PACKAGE = Path(shmpool.__file__).parent
DRIVER_USERS = {
    "bounded",
    "connection",
    "credentials",
    "freshness",
    "handle",
    "lease",
    "local_group",
    "losses",
    "opening",
    "pool",
    "pool_errors",
    "retry",
    "router",
    "silence",
    "waiting",
} | {
    "kept_cursor",
    "session",
    "shared",
}
HEAVY = ("pydantic", "rich", "shmpool_coordinator", "asyncio", "http", "email", "argparse", "unittest")


def loaded_by(program: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after a program."""
    told = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ended = subprocess.run([sys.executable, "-c", f"{program}\n{told}"], capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


def test_worker_loads_no_heavy_module() -> None:
    """A process that makes a pool loads neither the coordinator nor what validates, draws or loops."""
    loaded = loaded_by("import shmpool; shmpool.Pool('web')")
    assert {"psycopg2", "posix_ipc"} <= loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


@pytest.mark.parametrize("program", ["import shmpool", "import shmpool.cli, shmpool.observation, shmpool.segment"])
def test_tools_load_no_driver(program: str) -> None:
    """What only reads the segment works without the driver."""
    assert "psycopg2" not in loaded_by(program)


def test_driver_is_imported_by_the_pool_s_modules_alone() -> None:
    """psycopg2 is known to the modules that talk to a server, and to no other."""
    users = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "psycopg2" for name in names):
                users.add(path.stem)
    assert users <= DRIVER_USERS


def test_public_names_exist() -> None:
    """Everything that the package promises can be had, and an unknown name is an AttributeError."""
    for name in shmpool.__all__:
        assert getattr(shmpool, name) is not None
        assert name in dir(shmpool)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shmpool.nothing
