"""Make the development environment in .venv, or say what is missing to make it.

Runs under any Python from 3.6 on, so that an old one gets a sentence instead of a traceback.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
CANDIDATES = ("python3.13", "python3.12", "python3.11")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
INSTALL = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
STAMP = os.path.join(VENV, "shmpool.stamp")
INPUTS = ("pyproject.toml", "constraints.txt")
UWSGI = os.path.join(VENV, "bin", "uwsgi")
PEERS = ("matplotlib", "pgdbpool", "psycopg", "psycopg_pool", "sqlalchemy")
UWSGI_LOG = os.path.join(VENV, "uwsgi.log")


def main() -> None:
    with open(os.path.join(ROOT, INPUTS[0])) as lock:
        # Two makes at once: the second waits and finds the work done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sys.argv[1:] == ["uwsgi"]:
            add_uwsgi()
        elif sys.argv[1:] == ["bench"]:
            add_bench()
        else:
            refresh()


def refresh() -> None:
    """Bring .venv up to date; the stamp, written last, tells a finished one from a half made one."""
    wanted, stamp = wanted_stamp(), read_stamp()
    if stamp == wanted:
        return
    # A usable environment serves even when the `python3` that runs this file is too old.
    is_old = sys.version_info < OLDEST
    if is_old and stamp[:1] + stamp[2:] == wanted[:1] + wanted[2:]:
        return
    refuse_if_unusable(is_old)

    # Same place and Python: only the packages changed. Otherwise moved, foreign or half made.
    is_reusable = stamp[:2] == wanted[:2]
    if os.path.exists(STAMP):
        os.remove(STAMP)
    if not is_reusable:
        say("making .venv with Python {}.{}".format(*sys.version_info[:2]))
        run([sys.executable, "-m", "venv", "--clear", VENV], "make the virtual environment")
    say("installing packages (about 20 s)")
    run([*INSTALL, "-e", ".[dev]"], "install the packages")
    with open(STAMP, "w") as stamp_file:
        stamp_file.write("\n".join(wanted))
    say("ready")


def add_uwsgi() -> None:
    """Compile uWSGI, unless it is there.  Where that fails the rest works without it: an error in CI only."""
    if os.path.exists(UWSGI):
        return
    say("compiling uWSGI (half a minute)")
    with open(UWSGI_LOG, "w") as log:
        status = subprocess.call([*INSTALL, "-e", ".[dev-uwsgi]"], cwd=ROOT, stdout=log, stderr=log)
    if status:
        told = (
            "uWSGI could not be compiled: it takes a C compiler and Python's headers (Debian, Ubuntu: apt install gcc"
            f" libc6-dev python3-dev); the reason is in {UWSGI_LOG}"
        )
        if os.environ.get("CI"):
            stop(told)
        say(told + "; its tests are skipped")


def add_bench() -> None:
    """Install the pools that a benchmark compares with, unless they are there."""
    probe = f"import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, {PEERS!r})))"
    if subprocess.call([VENV_PYTHON, "-c", probe]):
        say("installing the pools to compare with")
        run([*INSTALL, "-e", ".[bench]"], "install the pools to compare with")


def wanted_stamp() -> "list[str]":
    """Return what the stamp of an up-to-date environment says: place, Python, inputs."""
    digest = hashlib.sha256()
    for name in INPUTS:
        with open(os.path.join(ROOT, name), "rb") as source:
            digest.update(source.read())
    return [VENV, "{}.{}".format(*sys.version_info[:2]), digest.hexdigest()]


def read_stamp() -> "list[str]":
    """Return the stamp's lines, or nothing where the environment is unfinished or broken."""
    if not os.path.exists(VENV_PYTHON):
        return []
    try:
        with open(STAMP) as stamp_file:
            return stamp_file.read().splitlines()
    except OSError:
        return []


def refuse_if_unusable(is_old: bool) -> None:
    """Exit with one line that says what to install, when this Python cannot make .venv."""
    found = "{}.{}.{}".format(*sys.version_info[:3])
    if is_old:
        usable = [name for name in CANDIDATES if is_runnable(name)]
        if usable:
            advice = f"run: make PYTHON={usable[0]}"
        else:
            advice = (
                "install it (Debian 12, Ubuntu 24.04: apt install python3 python3-venv)"
                " and run: make PYTHON=<path to it>"
            )
        stop(f"needs Python 3.11 or newer, {sys.executable} is {found}; {advice}")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        stop(
            "{} {} lacks {}; install it (Debian, Ubuntu: apt install python3-venv or python{}.{}-venv)".format(
                sys.executable, found, " and ".join(missing), *sys.version_info[:2]
            )
        )


def is_runnable(name: str) -> bool:
    """Tell whether `name` is on PATH and starts (version managers leave shims that do not)."""
    path = shutil.which(name)
    if path is None:
        return False
    with open(os.devnull, "w") as null:
        return subprocess.call([path, "-c", "import venv"], stdout=null, stderr=null) == 0


def run(command: "list[str]", purpose: str) -> None:
    status = subprocess.call(command, cwd=ROOT)
    if status:
        stop(f"could not {purpose} (exit code {status}); the reason is above")


def say(message: str) -> None:
    print("shmpool: " + message)
    sys.stdout.flush()


def stop(message: str) -> None:
    say(message)
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the next make starts again")
