"""The explored model of the permit protocol: the protocol holds, and the model would notice if it did not."""

from __future__ import annotations

import os
import re

import pytest

from tools.model import __main__ as command
from tools.model.explorer import MISTAKES, SOURCE, ModelError, NoCompilerError, explore, find_compiler


@pytest.fixture(scope="module")
def compiler() -> str:
    """Return the C compiler; without one these tests are skipped, and fail in CI."""
    try:
        return find_compiler()
    except NoCompilerError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("config", ["WORKERS=2", "WORKERS=1 SLOTS=2 GROUP_CAP=2 ENDPOINT_CAP2=2"])
def test_the_protocol_holds(config: str) -> None:
    """Every state that a small pool can reach keeps the invariants."""
    result = explore(config)
    assert result.is_ok, result.output
    assert result.states > 10_000
    assert result.depth > 10


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mistake", ["FREE_BEFORE_POSTS", "MARK_BEFORE_POST", "NO_SEQUENCE"])
def test_a_mistake_is_found(mistake: str) -> None:
    """A protocol with a deliberate mistake ends in a violation, told with the moves that lead to it."""
    result = explore(f"{MISTAKES[mistake]} MISTAKE={mistake}")
    assert not result.is_ok
    assert result.verdict.startswith("violation: ")
    assert f"\n{result.steps:4}. " in result.output


def test_the_bound_is_not_a_violation(compiler: str) -> None:
    """A search that stops at its bound says so and is not taken for a finished one."""
    assert compiler
    result = explore("WORKERS=2 MAX_STATES=1000")
    assert result.is_bounded
    assert not result.is_ok
    assert (result.states, result.steps) == (1000, 0)


@pytest.mark.parametrize("config", ["WORKER=2", "WORKERS", "WORKERS=two", "MISTAKE=NONE_SUCH"])
@pytest.mark.usefixtures("compiler")
def test_a_bad_configuration_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model does not know is named, and nothing runs."""
    with pytest.raises(ModelError, match="configuration"):
        explore(config)
    assert command.main(["--config", config]) == 2
    assert config.partition("=")[2] in capsys.readouterr().err


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no compiler is, the tool says what to install and ends with 3."""
    monkeypatch.setenv("PATH", "")
    assert command.main(["--quick"]) == 3
    assert "no C compiler" in capsys.readouterr().err


def test_every_mistake_is_listed() -> None:
    """The program, the tool and the README name the same mistakes."""
    part = SOURCE.read_text().partition("#define NO_MISTAKE 0\n")[2].partition("#ifndef MISTAKE\n")[0]
    readme = SOURCE.with_name("README.md").read_text().partition("## Deliberate mistakes")[2]
    assert re.findall(r"#define (\w+) \d+", part) == list(MISTAKES)
    assert re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE) == list(MISTAKES)
