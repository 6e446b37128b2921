"""Apache with mod_wsgi for tests: a private configuration on a loopback port, and a Python environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.support.deployments import APPS, ROOT

PROGRAMS: Final = ("apache2", "httpd")
MODULES: Final = (Path("/usr/lib/apache2/modules"), Path("/usr/lib64/httpd/modules"))
NOBODY: Final = 65534
FRAME: Final = """
ServerRoot {directory}
DefaultRuntimeDir {directory}
PidFile httpd.pid
ErrorLog server.log
ServerName localhost
Listen 127.0.0.1:{port}
User #{uid}
Group #{gid}
LoadModule mpm_{mpm}_module {modules}/mod_mpm_{mpm}.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
WSGISocketPrefix {directory}/wsgi
"""


class Apache(NamedTuple):
    """An installed Apache with mod_wsgi."""

    program: str
    modules: Path
    python: str  # the interpreter that mod_wsgi embeds

    def configuration(self, mpm: str, directory: Path, port: int, lines: str) -> str:
        """Return a whole configuration around the lines that matter."""
        uid, gid = served_by()
        frame = FRAME.format(directory=directory, port=port, uid=uid, gid=gid, mpm=mpm, modules=self.modules)
        return frame + lines

    def make_environment(self, directory: Path) -> Path:
        """Make a virtual environment for mod_wsgi, with copies that every user may read, and return its place."""
        environment = directory / "venv"
        subprocess.run([self.python, "-m", "venv", "--without-pip", environment], check=True)
        packages = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        for source in (ROOT / "shmpool", ROOT / "coordinator" / "shmpool_coordinator"):
            shutil.copytree(source, packages / source.name)
        apps = Path(*APPS.split("."))
        shutil.copytree(ROOT / apps, packages / apps)
        for name in sorted(_needed("shmpool") - {"shmpool"}):
            _copy(distribution(name), packages)
        return environment


def served_by() -> tuple[int, int]:
    """Return the uid and gid of the processes that serve: Apache refuses root."""
    return (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def _needed(name: str) -> set[str]:
    """Return a distribution and everything that it requires."""
    requirements = [Requirement(text) for text in distribution(name).requires or ()]
    found = {name}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= _needed(requirement.name)
    return found


def _copy(one: Distribution, packages: Path) -> None:
    for file in one.files or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and source.exists():
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, packages / file)


def require_apache() -> Apache:
    """Return the installed one; skip the test where there is none, or none for this Python, and fail it in CI."""
    program = next(filter(None, map(shutil.which, (*PROGRAMS, *(f"/usr/sbin/{name}" for name in PROGRAMS)))), None)
    modules = next((path for path in MODULES if (path / "mod_wsgi.so").exists()), None)
    if program is None or modules is None:
        reason = "no Apache with mod_wsgi (Debian: apache2, libapache2-mod-wsgi-py3)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    embedded = re.search(rb"libpython(3\.\d+)\.so", (modules / "mod_wsgi.so").read_bytes())
    version = embedded[1].decode() if embedded else "an unknown version"
    if version != sysconfig.get_python_version():
        pytest.skip(f"mod_wsgi embeds Python {version}; the packages here are for {sysconfig.get_python_version()}")
    return Apache(program, modules, f"/usr/bin/python{version}")
