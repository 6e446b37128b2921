"""The seam for moving a connection from one worker to another: one gives it up, another one takes it over.

Today only the permits move: the one worker closes its connection, the other opens one of its own.  A cheaper way would
take the place of these two functions; who is asked, who waits, and who holds which permit do not depend on it.

Threads.  As of lease.py and opening.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmpool.lease import Lease, give_back
from shmpool.opening import open_lease
from shmpool.router import Attempt

if TYPE_CHECKING:
    from shmpool.local_group import LocalGroup


def give_up(lease: Lease) -> None:
    """Part with a connection, and its permits, that another worker waits for."""
    give_back(lease)


def take_over(group: LocalGroup, token: Lease, attempt: Attempt, deadline: float) -> Lease | None:
    """Make a connection of permits that were just claimed, whoever gave them up; None: that failed, and they went back.

    Raises as `open_lease`.
    """
    return open_lease(group, token, attempt, deadline)
