"""Hooks for uWSGI.  One line of its configuration is enough:

    import = shmpool.hooks.uwsgi

or the same import in the application, before it uses a pool.  With the coordinator as a mule (shmpool_coordinator.mule)
uWSGI also starts that, and again when it dies: give the mule's file a name with "shmpool" in it, and workers wait for
it instead of starting a coordinator of their own.

What uWSGI does otherwise than other servers, and what becomes of it here.
    It forks after it has loaded the application, and runs Python's at-fork handlers only with
        `py-call-uwsgi-fork-hooks`.  What the application checks out while it is loaded is closed at checkin, and the
        log says who did it; a worker attaches on first use, and uses nothing of the master's even where no hook ran.
    It reloads in place: the master keeps pid and start time.  The server generation is the moment at which the
        application was loaded: in the master, or with `lazy-apps` in the workers.  There, workers of one start have the
        same; one that was spawned again (chain reload, max-requests) has loaded the application anew, and is newer.
    Older ones (2.0.24) run no Python threads without `enable-threads`.  What the background thread does is done after
        requests then, and the log says so.
    Exit functions run in every child, and not in a worker that ends in the middle of a request: that is the reaper's.
    `uwsgi.post_fork_hook` is chained.  Whoever sets it afterwards, as an import of `uwsgidecorators` does, takes
        nothing away: workers inherit all that they need.

Fork.  Imported in a master, `_enter` runs in each child; in a worker (`lazy-apps`), or without a master, at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

try:
    import uwsgi
except ImportError:
    raise ImportError(
        "shmpool.hooks.uwsgi: found no module 'uwsgi', which only uWSGI's own processes have; import this in an "
        "application that uWSGI loads, or say `import = shmpool.hooks.uwsgi` in uWSGI's configuration"
    ) from None

from shmpool.attachment import (
    be_without_threads,
    do_rounds,
    forget_parent,
    leave_starting_to_server,
    pass_through,
    set_server,
)
from shmpool.clock import monotonic
from shmpool.pool import close_all
from shmpool.states import ServerKind

MULE_NAME: Final = b"shmpool"  # what the coordinator's mule has in its name
NEVER_SPAWNED: Final = 2**64 - 1  # respawn_count of a worker that no master has spawned


def _generation() -> int:
    """Return when the application is being loaded, in milliseconds since boot; the same for all workers of a start."""
    worker = uwsgi.worker_id()
    if worker == 0:
        return int(monotonic() * 1000)
    spawned = uwsgi.workers()[worker - 1]
    is_first = spawned["respawn_count"] in (0, NEVER_SPAWNED)
    began_wall = uwsgi.started_on if is_first else spawned["last_spawn"]
    return int(began_wall - round(time.time() - monotonic())) * 1000


def _chain(name: str, function: Callable[[], object]) -> None:
    """Have uWSGI call a function where it calls an attribute of its module, after what is there already."""
    former: Callable[[], object] | None = getattr(uwsgi, name, None)

    def both() -> None:
        try:
            if former is not None:
                former()
        finally:
            function()

    setattr(uwsgi, name, both)


def _enter() -> None:
    """Say whose process this is, and let go of the parent's attachments.  Runs in each child, mules included."""
    forget_parent()
    set_server(ServerKind.UWSGI, uwsgi.masterpid() or os.getpid(), _loaded)


def _has_mule() -> bool:
    """Whether the coordinator is one of the mules."""
    mules: Any = uwsgi.opt.get("mule", [])
    names = mules if isinstance(mules, list) else [mules]
    return any(isinstance(name, bytes) and MULE_NAME in os.path.basename(name) for name in names)


def _do_without_threads() -> None:
    """Have the background thread's work done after requests; the first to load the application tells."""
    be_without_threads()
    _chain("after_req_hook", do_rounds)
    worker = uwsgi.worker_id()
    if worker == 0 or (worker == 1 and uwsgi.workers()[0]["respawn_count"] in (0, NEVER_SPAWNED)):
        uwsgi.log(
            "shmpool: Python threads do not run in this uWSGI: idle connections are looked after, and given back for "
            "others that wait, only after requests; `enable-threads = true` has an idle worker do that, too"
        )


_loaded: Final = _generation()
if uwsgi.masterpid() == os.getpid():
    pass_through()
_enter()
_chain("post_fork_hook", _enter)
_chain("atexit", close_all)  # Python's own atexit is not run with `skip-atexit-teardown`
if not uwsgi.has_threads:
    _do_without_threads()
if _has_mule():
    leave_starting_to_server()
