"""What the page about configurations in code shows is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shmpool.control_client import request
from shmpool.names import Names
from tests.integration.docs.test_readme import run_python
from tests.support.gunicorn import stop_coordinator
from tools.pg_cluster import Server

PAGE = (Path(__file__).parents[3] / "docs" / "in-code.md").read_text()


def test_program_runs(primary: Server, pool_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's program works as it stands there, on a server of the tests; nothing else was started for it."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for before, after in (('"web"', f'"{pool_name}"'), ("host=10.0.0.1 dbname=app user=app", primary.conninfo())):
        assert before in program
        program = program.replace(before, after)
    monkeypatch.setenv("APP_PASSWORD", "any")
    names = Names.of(pool_name)
    try:
        run_python(program)
        assert request(names, "info")["config_file"] == ""
    finally:
        stop_coordinator(names)
