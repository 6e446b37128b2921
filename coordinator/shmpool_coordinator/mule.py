"""The coordinator as a uWSGI mule, which uWSGI starts with the workers and again whenever it dies.

    mule = /srv/app/shmpool_mule.py         a file with two lines: from shmpool_coordinator.mule import main; main()
    mule = shmpool_coordinator.mule:main    the same without a file, but not with `lazy-apps` (uWSGI crashes)

`main` puts the program `shmpool-coordinator run --mule` in the place of the mule's own: the pid stays, so that uWSGI
goes on seeing its mule, and the kernel still ends it with a killed master.  A mule as uWSGI makes it is a fork of a
master that has loaded the application, without Python's at-fork handlers: locks of threads that are not there, logging
and exit functions of the application, descriptors and memory that a coordinator has no use for.  A fresh program has
none of that, needs no `enable-threads` for its probes, and is the one that runs everywhere else.

What uWSGI sends, and what becomes of the pool.  In each case its workers are being told to end, too: the coordinator
goes on for DEPART_S at most (daemon.py) while they do, so that what they hold comes home.
    SIGHUP   a reload in place: the segment stays; the workers that come next use it at once, the next mule adopts it.
             Also a graceful stop, which cannot be told from a reload: the segment waits for the next start.
    SIGTERM  a brutal reload: the same.
    SIGINT   the end: everything is removed, unless somebody else uses the pool.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Final

from shmpool.launch import python
from shmpool.names import Names
from shmpool.rows import coordinator_pid

SIGNALS: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
STAND_BY_S: Final = 0.5  # between looks at a coordinator that was here first
PAUSE_S: Final = 5.0  # before a mule ends that could not start: uWSGI starts it again at once

log = logging.getLogger(__name__)


def main() -> None:
    """Become the coordinator of SHMPOOL_CONFIG's pool.  Does not return.

    Signals wait until the program takes them: one that came earlier would end it with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    program = [python(), "-P", "-m", "shmpool_coordinator", "run", "--mule"]
    try:
        os.execvp(program[0], program)
    except OSError as error:
        print(f"shmpool mule: {program[0]} cannot be run: {error}", file=sys.stderr, flush=True)
        pause()
        raise


def stand_by(names: Names) -> bool:
    """Wait while another coordinator has the pool; return False if the end was asked for instead.

    SIGNALS are blocked.
    """
    is_told = False
    while (pid := coordinator_pid(names)) is not None:
        if not is_told:
            log.info("pool %s: pid %d coordinates it, standing by", names.pool, pid)
            is_told = True
        if signal.sigtimedwait(SIGNALS, STAND_BY_S) is not None:
            return False
    return True


def pause() -> None:
    """Let some time pass, unless the end is asked for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.sigtimedwait(SIGNALS, PAUSE_S)


if __name__ == "__main__":
    main()
