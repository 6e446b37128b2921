"""The warning of a process that forks with connections at rest."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
{imports}
from shmpool import attachment

class Attached:
    names = type("Names", (), {{"pool": "some"}})
    pid, opened_by = 1, "  somebody"
    def stop_background(self): return False
    def rest(self): return 2
    def leave(self): return True

attachment.attached = lambda: [Attached()]
if os.fork() == 0:
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("imports", ["", "import logging"])
def test_fork_warns_and_disturbs_no_other_at_fork_handler(imports: str) -> None:
    """A fork that gives connections back first says so, also in a process that has not loaded `logging`."""
    command = [sys.executable, "-c", PROGRAM.format(imports=imports)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stderr
    assert "gave back 2 idle connections" in told
    assert "Exception ignored" not in told
