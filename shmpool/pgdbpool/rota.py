"""Whose turn it is: the endpoints of `db`, dealt out one after the other, and what is known of each.

An endpoint that failed is skipped while others serve.  It is tried again when none does, or to bring back a connection
that is at home there; in between at least its `connection_retry_sleep`, and by one thread at a time.

Threads.  Single attribute stores carry the state: two threads that meet here may at worst both try one endpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from shmpool.pgdbpool.configuration import EndpointSettings

PATIENCE: Final = 10  # an attempt that nobody needs may take this part of the time: one that took 10 s waits for 100 s

logger = logging.getLogger("shmpool.pgdbpool")


class Endpoint:
    """An entry of `db` and how it did last.  Times are CLOCK_MONOTONIC."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.reason: str | None = None  # why the last attempt failed
        self.retry_at = 0.0
        self._spare_until = 0.0

    def __repr__(self) -> str:
        return f"<Endpoint {self.settings.label}: {self.reason or 'well'}>"

    def is_due(self, now: float) -> bool:
        """Whether it may be tried by somebody who needs a connection."""
        return self.reason is None or now >= self.retry_at

    def is_inviting(self, now: float) -> bool:
        """Whether it may be tried by somebody who has a connection elsewhere."""
        return self.reason is None or now >= max(self.retry_at, self._spare_until)

    def begin(self, now: float) -> None:
        """Let the others skip it while it is tried, if it failed last."""
        self.retry_at = now + self.settings.connection_retry_sleep

    def failed(self, reason: str, began: float, now: float) -> None:
        """Note that an attempt failed."""
        if self.reason is None:
            logger.warning("endpoint %s: %s", self.settings.label, reason)
        self.reason = reason
        self.retry_at = now + self.settings.connection_retry_sleep
        self._spare_until = now + PATIENCE * (now - began)

    def served(self) -> None:
        """Note that an attempt succeeded."""
        if self.reason is not None:
            logger.warning("endpoint %s: serves again", self.settings.label)
        self.reason = None


class Rota:
    """The endpoints of a configuration, in its order."""

    def __init__(self, settings: Iterable[EndpointSettings]) -> None:
        self.endpoints = [Endpoint(one) for one in settings]
        self._dealt = 0

    def deal(self) -> Endpoint:
        """Return the next endpoint in turn: the home of a connection."""
        home = self.endpoints[self._dealt % len(self.endpoints)]
        self._dealt += 1
        return home

    def candidates(self, home: Endpoint, now: float) -> list[Endpoint]:
        """Return whom to try for a connection, best first: who is well, from its home onwards, then who is due."""
        at = self.endpoints.index(home)
        order = self.endpoints[at:] + self.endpoints[:at]
        return sorted((one for one in order if one.is_due(now)), key=lambda one: one.reason is not None)

    def pause(self, now: float) -> float:
        """Return the seconds until somebody may be tried."""
        return max(0.0, min(0.0 if one.is_due(now) else one.retry_at - now for one in self.endpoints))

    def reasons(self) -> str:
        """Say why each of them cannot serve."""
        return "; ".join(f"{one.settings.label}: {one.reason or 'not tried'}" for one in self.endpoints)
