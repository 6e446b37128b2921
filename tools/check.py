"""Everything that must pass before a change is done: `make check`.

Steps run in order; the first that fails ends the run with a line naming it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SCRIPTS = Path(PYTHON).parent
PACKAGES = {"shmpool", "shmpool_coordinator"}
COMMANDS = ("shmpool", "shmpool-coordinator")


class CheckFailedError(Exception):
    """A step did not pass; the message says why in one line."""


def run(*command: str | Path, cwd: Path = ROOT, is_quiet: bool = False) -> None:
    """Run a command; when quiet, show its output only if it fails."""
    output = subprocess.PIPE if is_quiet else None
    result = subprocess.run(
        command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT if is_quiet else None, check=False
    )
    if result.returncode != 0:
        sys.stdout.write((result.stdout or b"").decode(errors="replace"))
        words = " ".join(map(str, command))
        raise CheckFailedError(f"exit code {result.returncode} from: {words}")


def check_distribution() -> None:
    """Build sdist and wheel; install the wheel where nothing of the checkout can be seen."""
    with tempfile.TemporaryDirectory(prefix="shmpool-check-") as name:
        scratch = Path(name)
        built, empty, environment = scratch / "dist", scratch / "empty", scratch / "venv"
        empty.mkdir()
        run(PYTHON, "-m", "build", "--no-isolation", "--outdir", built, is_quiet=True)
        (wheel,) = built.glob("*.whl")
        check_names(wheel)
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        constraints = ROOT / "constraints.txt"
        run(*pip, "install", "--quiet", "-c", constraints, wheel, cwd=empty, is_quiet=True)
        run(*pip, "check", cwd=empty, is_quiet=True)
        for command in COMMANDS:
            run(environment / "bin" / command, "--help", cwd=empty, is_quiet=True)


def check_names(wheel: Path) -> None:
    """Compare the wheel's top-level names with the two packages."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    found = {name for name in names if not name.endswith(".dist-info")}
    if found != PACKAGES:
        raise CheckFailedError(
            f"{wheel.name} holds {sorted(found)} instead of {sorted(PACKAGES)};"
            " see [tool.hatch.build] in pyproject.toml"
        )


STEPS: dict[str, Callable[[], None]] = {
    "format": lambda: run(PYTHON, "-m", "ruff", "format", "--check"),
    "lint": lambda: run(PYTHON, "-m", "ruff", "check"),
    "types": lambda: run(PYTHON, "-m", "mypy"),
    "layers": lambda: run(SCRIPTS / "lint-imports"),
    "tests": lambda: run(PYTHON, "-m", "pytest", "-n", "auto", "--dist", "loadfile"),
    "wheel": check_distribution,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return 0 when all passed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check",
        description=f"Check the project, stopping at the first failure: {', '.join(STEPS)}.",
    )
    parser.add_argument("--skip-tests", action="store_true", help="leave out the tests")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    for name, step in STEPS.items():
        if name == "tests" and options.skip_tests:
            print("== tests: skipped", flush=True)
            continue
        print(f"== {name}", flush=True)
        step_begin = time.monotonic()
        try:
            step()
        except CheckFailedError as error:
            print(f"check: {name} FAILED: {error}", flush=True)
            return 1
        except KeyboardInterrupt:
            print(f"check: interrupted in {name}", flush=True)
            return 130
        print(f"== {name}: passed in {time.monotonic() - step_begin:.1f} s", flush=True)
    print(f"check: all passed in {time.monotonic() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
