"""What the page for pgdbpool's users shows is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shmpool import pgdbpool
from shmpool.pgdbpool import configuration
from tests.integration.docs.test_readme import run_python
from tools.pg_cluster import HOST, Server

PAGE = (Path(__file__).parents[3] / "docs" / "pgdbpool.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of its first column."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


def names(cell: str) -> list[str]:
    """Return what a cell sets as code."""
    return re.findall(r"`(\w+)`", cell)


def test_program_runs(primary: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's program works as it stands there, on a server of the tests."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for before, after in (
        ("db1.example.com", HOST),
        ("db2.example.com", HOST),
        ('"name": "app", "user": "app"', '"name": "postgres", "user": "postgres"'),
    ):
        assert before in program
        program = program.replace(before, after)
    monkeypatch.setenv("PGPORT", str(primary.port))
    run_python(program)
    assert primary.execute("SELECT page FROM visits") == [("start",)]
    primary.execute("DROP TABLE visits")


def test_imports_exist() -> None:
    """The imports that the page names can be done."""
    for row in rows("pgdbpool"):
        run_python(row[1].strip("`"))


def test_interface_is_complete() -> None:
    """The page lists every public name, and each method that it lists exists."""
    listed = set()
    for name, methods in [row[:2] for row in rows("class")]:
        listed |= set(names(name)) or set(names(methods))
        for method in names(methods):
            if owner := getattr(pgdbpool, name.strip("`"), None):
                assert method in ("with", "pool") or hasattr(owner, method), (name, method)
    listed |= {names(row[0])[0] for row in rows("exception")}
    assert listed == set(pgdbpool.pool.__all__)


def test_defaults_are_those_of_the_code() -> None:
    """The page lists every key with its default."""
    tables = {"key of `db`": configuration._ENDPOINT_KEYS, "key of a group": configuration._GROUP_KEYS}
    for heading, keys in tables.items():
        told = {name: row[2].strip("*`") for row in rows(heading) for name in names(row[0])}
        assert set(told) == set(keys) - set(configuration._INTERNAL_KEYS)
        for name, text in told.items():
            default = keys[name].default
            if default is configuration._REQUIRED:
                assert text == "required"
            elif default is not None:
                assert text == str(default), name
