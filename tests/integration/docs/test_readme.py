"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

from shmpool_coordinator import config
from tests.support.coordinator import running_coordinator
from tools.pg_cluster import Cluster

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run_python(code: str, **environment: str) -> None:
    """Run code in an interpreter of its own, as strict as the tests."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def configuration_for(cluster: Cluster, name: str) -> str:
    """Return the README's configuration with real servers in it."""
    (text,) = blocks("toml")
    text = text.replace('name = "web"', f'name = "{name}"')
    for address, server in (("10.0.0.1", cluster.primary), ("10.0.0.2", cluster.standbys[0])):
        text = text.replace(f"host={address} dbname=app user=app", server.conninfo())
    return text


def test_configuration_is_valid_and_complete() -> None:
    """The configuration of the README is accepted without a warning."""
    (text,) = blocks("toml")
    assert config.warnings_of(config.parse(tomllib.loads(text), "README.md")) == []


def test_application_code_runs(cluster: Cluster, pool_name: str) -> None:
    """The application code of the README works with its configuration."""
    code = next(block for block in blocks("python") if "pool.connection" in block)
    code += next(block for block in blocks("python") if "pool.run" in block)
    with running_coordinator(configuration_for(cluster, pool_name), pool_name):
        run_python(code.replace('"web"', f'"{pool_name}"'))


@pytest.mark.parametrize("marker", ["workers = 4", "chain("])
def test_gunicorn_configuration_is_accepted(marker: str) -> None:
    """The Gunicorn configurations of the README define the hooks that Gunicorn calls."""
    code = next(block for block in blocks("python") if marker in block and "gunicorn" in block)
    run_python(f"{code}\nassert callable(post_fork) and callable(on_starting)")


def test_uwsgi_configuration_is_that_of_the_example() -> None:
    """What the README shows of uWSGI is what `make run-uwsgi` runs, but for places."""
    example = ROOT / "examples" / "uwsgi"
    (text,) = blocks("ini")
    shown, run = (ConfigParser(interpolation=None) for _ in range(2))
    shown.read_string(text)
    run.read_string((example / "uwsgi.ini").read_text())
    assert set(shown["uwsgi"]) - {"env"} <= set(run["uwsgi"])
    for key in ("master", "module", "die-on-term", "import"):
        assert shown["uwsgi"][key] == run["uwsgi"][key]
    (mule,) = (block for block in blocks("python") if "shmpool_mule.py" in block)
    assert mule.splitlines()[1:] == (example / "shmpool_mule.py").read_text().splitlines()[2:]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link of the documentation leads somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
