"""A host's name that tests may move: /etc/hosts of one's own for the processes that are started with it.

Names are looked up as ever, by the C library; only the file that it reads is another one, in a mount namespace.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HOSTS = "/etc/hosts"
SET_UP = f'mount --bind "$0" {HOSTS} && exec "$@"'


class Hosts:
    """A file of names and addresses.

    `prefix` is the beginning of a command line: what follows it becomes the process by exec, and finds these names.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._file.write_text("")
        kinds = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-current-user", "--keep-caps"]
        self.prefix = ("unshare", *kinds, "sh", "-c", SET_UP, str(file))

    def require(self) -> None:
        """Skip the test where a process cannot have its own; fail it in CI."""
        try:
            made = subprocess.run([*self.prefix, "true"], capture_output=True, text=True, check=False)
            problem = made.stderr.strip() if made.returncode else ""
        except FileNotFoundError as error:
            problem = str(error)
        if problem and os.environ.get("CI"):
            pytest.fail(f"no names of its own for a process: {problem}")
        if problem:
            pytest.skip(f"no names of its own for a process: {problem}")

    def point(self, name: str, *addresses: str) -> None:
        """Let a name lead to addresses, and no other name to anything."""
        self._file.write_text("".join(f"{address} {name}\n" for address in addresses))
