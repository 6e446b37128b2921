"""Compile permit.c with a configuration and run it.

Needs a C compiler and nothing else; every run is a program of its own in a temporary directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("permit.c")
NAMES: Final = (
    "WORKERS",
    "SLOTS",
    "GROUPS",
    "ENDPOINTS",
    "GROUP_CAP",
    "GROUP_CAP2",
    "ENDPOINT_CAP",
    "ENDPOINT_CAP2",
    "ABANDON",
    "OWED",
    "AUDIT_ALWAYS",
    "MAX_STATES",
    "MISTAKE",
)

# Each mistake, and a small configuration in which it has to be found.
MISTAKES: Final = {
    "TOUCH_BEFORE_RECORD": "WORKERS=1",
    "FREE_BEFORE_POSTS": "WORKERS=1",
    "GO_ON_AFTER_ABANDON": "WORKERS=1",
    "TAKE_DIRTY_ROW": "WORKERS=1",
    "REAP_THE_LIVING": "WORKERS=1",
    "SETTLE_WITHOUT_RECORD": "WORKERS=1",
    "GROUP_WAITS_FOR_ENDPOINT": "WORKERS=2",
    "COMPARE_MENTIONS": "WORKERS=2",
    "NO_SEQUENCE": "WORKERS=2",
    "VALUE_AFTER_COPIES": "WORKERS=2",
    "IGNORE_LIVE": "WORKERS=2",
    "WAIT_FOR_LIVE": "WORKERS=2 GROUP_CAP2=2",
    "REREAD_TABLE": "WORKERS=2 GROUP_CAP2=2",
    "MARK_BEFORE_POST": "WORKERS=1",
    "MARK_BOTH_FIELDS": "WORKERS=1",
    "ABSORB_LAST": "WORKERS=2 GROUP_CAP2=2",
    "GROW_WITHOUT_PENDING": "WORKERS=1 GROUP_CAP2=2",
    "SHRINK_WITHOUT_PENDING": "WORKERS=1 GROUP_CAP2=2",
}

_COUNTS = re.compile(r"^states (\d+)(?:.*? depth (\d+))?(?: steps (\d+))?", re.MULTILINE)
_BOUND_REACHED: Final = 2


class ModelError(Exception):
    """The model could not be run; the message says why."""


class NoCompilerError(ModelError):
    """There is no C compiler."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one exploration found."""

    is_ok: bool
    is_bounded: bool  # stopped at MAX_STATES, without a violation so far
    states: int
    depth: int  # moves to the farthest state; 0 after a violation
    steps: int  # length of the trace; 0 without a violation
    seconds: float
    output: str

    @property
    def verdict(self) -> str:
        """Return the line that says how it ended."""
        return self.output.splitlines()[-2]


def find_compiler() -> str:
    """Return the C compiler's path.

    Raises:
        NoCompilerError: there is none.
    """
    for name in ("cc", "gcc"):
        if path := shutil.which(name):
            return path
    raise NoCompilerError("no C compiler: neither cc nor gcc is on PATH; install gcc (Debian: apt-get install gcc)")


def defines_of(config: str) -> list[str]:
    """Turn `NAME=VALUE NAME=VALUE` into compiler arguments.

    Raises:
        ModelError: a name or value that the model does not know.
    """
    defines = []
    for word in config.split():
        name, _, value = word.partition("=")
        if name not in NAMES:
            raise ModelError(f"configuration: {word!r} found, expected NAME=VALUE with one of {', '.join(NAMES)}")
        if name == "MISTAKE" and value not in MISTAKES:
            raise ModelError(f"configuration: no mistake {value!r}; there are {', '.join(MISTAKES)}")
        if name != "MISTAKE" and not value.isdecimal():
            raise ModelError(f"configuration: {word!r} found, expected a number after {name}=")
        defines.append(f"-D{word}")
    return defines


def explore(config: str) -> Result:
    """Explore one configuration to its end.

    Raises:
        ModelError: it does not compile (a bound in permit.c was passed), or it ended in an unknown way.
        NoCompilerError: there is no C compiler.
    """
    compiler, defines = find_compiler(), defines_of(config)
    with tempfile.TemporaryDirectory(prefix="permit-model-") as directory:
        program = os.path.join(directory, "permit")
        command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", *defines, "-o", program, str(SOURCE)]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode != 0:
            raise ModelError(f"{config!r} does not compile:\n{compiled.stderr}")
        begin = time.monotonic()
        run = subprocess.run([program], capture_output=True, text=True, check=False)
        seconds = time.monotonic() - begin
    counts = _COUNTS.search(run.stdout)
    if counts is None:
        raise ModelError(f"{config!r} ended with exit code {run.returncode}: {run.stderr.strip() or run.stdout}")
    states, depth, steps = (int(group or 0) for group in counts.groups())
    return Result(run.returncode == 0, run.returncode == _BOUND_REACHED, states, depth, steps, seconds, run.stdout)
