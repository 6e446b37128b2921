"""docs/deployments.md: every deployment is there with its tests, and the applications that it shows serve."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from tests.support.deployments import PAGE, POOL, SHARED, Site, blocks, only_block
from tests.support.serving import running
from tools.pg_cluster import HOST

DEPLOYMENTS = [
    "Apache + mod_wsgi",
    "Gunicorn threads",
    "Gunicorn workers",
    "uWSGI workers",
    "Flask development server",
    "Django development server",
    "One interpreter per process",
    "Separate services",
]


def rows() -> list[list[str]]:
    """Return the cells of the page's table of deployments."""
    lines = re.findall(r"^\| \[.*$", PAGE.read_text(), re.MULTILINE)
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_row_leads_to_its_section_and_tests(deployment: str) -> None:
    """Each deployment has a row whose links lead to a heading of the page and to files with tests."""
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    found = [row for row in rows() if deployment in row[0]]
    assert found
    for row in found:
        assert set(re.findall(r"\(#(.*?)\)", row[0])) <= anchors
        paths = re.findall(r"\((\.\./tests/.*?\.py)\)", row[-1])
        assert paths
        for path in paths:
            assert "def test_" in (PAGE.parent / path).read_text(), path


def test_the_application_serves(site: Site) -> None:
    """The page's application with `shmpool.Pool` answers and takes part in the budget."""
    code = blocks("The application", "python")[0]
    check(site, code.replace('Pool("web")', f'Pool("{site.names.pool}")'), POOL)


def test_the_application_with_pgdbpools_interface_serves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's application with `'type': 'shared'` answers and takes part in the dictionary's budget."""
    monkeypatch.setenv("PSQL_PASSWORD", "unused")
    code = blocks("The application", "python")[1]
    real = f'"host": "{HOST}", "port": {site.role.server.port}, "name": "postgres", "user": "{site.role.name}"'
    code = code.replace('"host": "10.0.0.1", "name": "app", "user": "app"', real)
    literal = re.search(r"^config = (\{.*?^\})$", code, re.MULTILINE | re.DOTALL)
    assert literal is not None
    check(site, code, SHARED, eval(literal[1], {"os": os}))


def check(site: Site, code: str, interface: str, dictionary: dict[str, Any] | None = None) -> None:
    """Run an application, which may have a dictionary of its own, under Gunicorn and send it a request."""
    site.write("app.py", code)
    site.write("gunicorn.conf.py", only_block("Gunicorn", "python"))
    command, environment = site.command(only_block("Gunicorn workers", "sh"), interface)
    command += ["--bind", "127.0.0.1:{port}", "--no-control-socket"]
    if dictionary is not None:
        site.share(dictionary)
    with running(command, site.directory, environment, site.names) as server:
        status, answer = server.request("/")
        assert status == 200, server.log
        assert re.match(r"\d{4}-\d\d-\d\d ", answer["text"])
        assert site.budget.holders() & server.workers()
