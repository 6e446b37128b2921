"""Tenure: how long a worker keeps a busy connection that others wait for; pure.

What it weighs.  A connection that moves serves nobody for the time c that opening it takes.  One that moves after each
tenure T spends c / (T + c) of its time so: a long tenure saves work.  Whoever waits meanwhile waits for those before
it: with q waiters for each connection about q (T + c), which a short tenure keeps short.

What it decides.  As long as the queue's wait stays within WAIT_S, a move may cost LEAST_SHARE of a connection's time.
Where it does not, the tenure gets shorter, until a move costs MOST_SHARE: beyond that, everybody's requests would wait
for connects instead of for each other.  The floor is what the coordinator's ticks and a worker's checkins can follow;
the ceiling keeps one slow connect from binding a connection to its worker.

c is measured where it is spent.  Where a crowded machine makes connects dear, the shares make tenures long, and
connects few: the two settle.
"""

from __future__ import annotations

from typing import Final

WAIT_S: Final = 0.2  # what the queue may wait for the sake of throughput
LEAST_SHARE: Final = 0.05
MOST_SHARE: Final = 0.2
FLOOR_S: Final = 0.02
CEILING_S: Final = 0.5
PAUSE_S: Final = 0.005  # half of what an idle worker's connection may take to reach a waiter, beside the connect


def tenure(cost_s: float, queue: float) -> float:
    """Return how long a connection stays with its worker while others wait, in seconds.

    Args:
        cost_s: what opening a connection takes, in seconds.
        queue: waiting workers that have none, for each connection.
    """
    longest = _lasting(cost_s, LEAST_SHARE)
    shortest = _lasting(cost_s, MOST_SHARE)
    within_wait = WAIT_S / queue - cost_s if queue > 0 else longest
    return min(CEILING_S, max(FLOOR_S, min(longest, max(shortest, within_wait))))


def pause(cost_s: float) -> float:
    """Return how long a connection has to be unused before it counts as idle, and moves without regard to its tenure.

    As long as a move costs, up to PAUSE_S: whoever gives up waiting for more use once that has cost as much as what it
    saves never pays more than twice what was necessary.  So a worker between two requests keeps its connection.
    """
    return min(PAUSE_S, cost_s)


def _lasting(cost_s: float, share: float) -> float:
    """Return the tenure of which a move takes a share: the T of c / (T + c) = share."""
    return cost_s * (1 / share - 1)
