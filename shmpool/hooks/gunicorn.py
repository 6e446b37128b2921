"""Hooks for Gunicorn.  One line in gunicorn.conf.py is enough:

    from shmpool.hooks.gunicorn import *

With the environment variable SHMPOOL_CONFIG naming a configuration file, Gunicorn starts a coordinator unless one
lives.  Without it, start one by other means (systemd).  Hooks of your own are combined by `chain`:

    from shmpool.hooks import gunicorn as shmpool_hooks
    post_fork = shmpool_hooks.chain(shmpool_hooks.post_fork, my_post_fork)

Works with sync and gthread workers, with and without preloading, on HUP (new workers start before the old ones end,
within the same caps) and on USR2 (two masters share one coordinator).

What is not here, and why.
    on_exit: nothing is stopped or removed.  On USR2 the old master's runs while the new one serves, and another
        service may use the same pool.  The coordinator ends by itself, `linger` after the last worker.
    child_exit attaches nothing and waits for nothing: it tells the coordinator to look at the dead worker's row now.
        That is a hint beside others (the end of the worker's process, of its control connection); without it the
        coordinator finds out all the same.
    post_fork attaches nothing: a pool attaches on first use, after the worker dropped its privileges.  If the
        coordinator has ended by then, as nobody used it for so long, the first use starts one (`autostart`).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol

from shmpool.attachment import set_server
from shmpool.clock import monotonic
from shmpool.control_client import tell
from shmpool.errors import MechanismError
from shmpool.launch import CONFIG_VARIABLE, ensure_coordinator, names_in
from shmpool.names import Names
from shmpool.pool import close_all
from shmpool.states import ServerKind

__all__ = ["child_exit", "on_reload", "on_starting", "post_fork", "worker_exit"]

NAME_VARIABLE: Final = "SHMPOOL_NAME"
EXIT_NO_COORDINATOR: Final = 1
TELL_S: Final = 0.1  # what a dead worker may cost the master at most


class Arbiter(Protocol):
    """What is used of Gunicorn's master."""

    cfg: Any
    log: Any


class Worker(Protocol):
    """What is used of Gunicorn's worker."""

    pid: int


def _next_generation(previous: int) -> int:
    """Return a number above the previous one, and above those of masters started earlier (milliseconds since boot)."""
    return max(previous + 1, int(monotonic() * 1000))


# Of this master.  A reload executes gunicorn.conf.py again and keeps this module; USR2 starts from nothing, later.
_generation = _next_generation(0)


def on_starting(server: Arbiter) -> None:
    """Start the coordinator if SHMPOOL_CONFIG is set and none lives.  Runs in the master.

    Gunicorn does not start where that fails: no worker could serve, and the log says why.
    """
    try:
        _ensure_coordinator(server)
    except (MechanismError, OSError, ValueError) as error:
        server.log.critical("shmpool: %s", error)
        sys.exit(EXIT_NO_COORDINATOR)


def on_reload(server: Arbiter) -> None:
    """Count the reload: workers forked from now on are newer, and idle connections of the old ones are recalled first.

    Runs in the master, before the new workers start.  A coordinator that died meanwhile is started again; if that
    fails, the reload goes on and the log says why.
    """
    global _generation
    _generation = _next_generation(_generation)
    try:
        _ensure_coordinator(server)
    except (MechanismError, OSError, ValueError) as error:
        server.log.error("shmpool: %s", error)


def post_fork(server: Arbiter, worker: Worker) -> None:
    """Tell the pool which start or reload this worker belongs to.  Runs in the worker; nothing is attached."""
    set_server(ServerKind.GUNICORN, os.getppid(), _generation)


def worker_exit(server: Arbiter, worker: Worker) -> None:
    """Close the worker's pools: permits are given back in order.  After SIGKILL the coordinator does it.

    Runs in the worker; Gunicorn may also call it in the master, whose pools are to live on for the next fork.
    """
    if worker.pid == os.getpid():
        close_all()


def child_exit(server: Arbiter, worker: Worker) -> None:
    """Tell the coordinator that a worker is gone, so that its permits are back the sooner.

    Runs in the master, in its signal handler: nothing is attached, locked or logged, and nobody is waited for.
    """
    for names in _pools_of(server):
        with contextlib.suppress(MechanismError):
            tell(names, "look", TELL_S, pid=worker.pid)


def chain(*functions: Callable[..., object]) -> Callable[..., None]:
    """Return one hook that calls several, in order, with the same arguments.

    Gunicorn checks how many arguments a hook takes: the chain takes as many as its first function.
    """

    def hook(*arguments: Any) -> None:
        for function in functions:
            function(*arguments)

    hook.__signature__ = inspect.signature(functions[0])  # type: ignore[attr-defined]  # read by inspect
    return hook


def _ensure_coordinator(server: Arbiter) -> None:
    config = os.environ.get(CONFIG_VARIABLE)
    if config:
        ensure_coordinator(config, uid=server.cfg.uid, gid=server.cfg.gid)
        server.log.info("shmpool: a coordinator serves the pool of %s", config)


def _pools_of(server: Arbiter) -> set[Names]:
    """Return the pools that the environment names: of SHMPOOL_CONFIG's file, and SHMPOOL_NAME."""
    uid = server.cfg.uid
    config, name = os.environ.get(CONFIG_VARIABLE), os.environ.get(NAME_VARIABLE)
    pools: set[Names] = set()
    with contextlib.suppress(MechanismError, ValueError):
        if config:
            pools.add(names_in(config, uid=uid))
    with contextlib.suppress(ValueError):
        if name:
            pools.add(Names.of(name, uid if os.geteuid() == 0 and uid else None))
    return pools
