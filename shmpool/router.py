"""Which endpoints a group of this process goes to, and which of its idle connections had better be elsewhere.

What the segment tells (endpoints.py) is handed to the rules (routing.py); beside it stands what this process met: an
endpoint that refused lately is tried last, and one that is DOWN is tried for want of others, with backoff (trials.py).

Threads.  Any thread asks; single attribute and item stores carry what is shared.
Health is advice: with a stale coordinator nothing is moved, and the rules take health, roles and lag as unknown.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import psycopg2

from shmpool.attachment import Attachment
from shmpool.chance import chance
from shmpool.clock import monotonic
from shmpool.endpoints import count_held, epoch_of, heartbeat_age, is_overtaken, read_candidates
from shmpool.routing import Candidate, Route, choose, is_fallback_spent, is_too_slow, should_move
from shmpool.settings import GroupSettings
from shmpool.slots import GroupPermits

AVOID_S: Final = 1.0  # how long an endpoint that refused is tried last
FALLBACK_REST_S: Final = 1.0  # how long a connection that fell back rests while the group may hold no more like it
_TURNS: Final = 1 << 16  # more than any cycle of weights


class Attempt:
    """What one checkout has tried so far.

    Args:
        only: the endpoints that it may try; default: all that are eligible.
    """

    __slots__ = ("failures", "has_tried", "only", "route")

    def __init__(self, only: Collection[int] | None = None) -> None:
        self.only = only
        self.route: Route | None = None
        self.failures: dict[int, psycopg2.OperationalError] = {}
        self.has_tried = False  # an endpoint that is DOWN

    def is_trial(self, endpoint: int) -> bool:
        """Whether an endpoint is tried though it is DOWN."""
        return self.route is not None and endpoint in self.route.last_resort


class Router:
    """Made by each group of a process; `settings` and `permits` follow the configuration."""

    def __init__(self, attachment: Attachment, settings: GroupSettings, permits: GroupPermits) -> None:
        self.settings = settings
        self.permits = permits
        self._attachment = attachment
        self._turn = int(chance() * _TURNS)  # workers that start together do not all begin at the same endpoint
        self._avoid: dict[int, float] = {}  # endpoint -> monotonic time until which it is tried last

    def route(self, attempt: Attempt) -> Route:
        """Ask for the endpoints to try now; those that refused lately come last, and spare ones if all others did."""
        self._turn += 1
        route = choose(
            self.settings,
            self._candidates(),
            is_stale=self._is_stale(),
            groups=self._attachment.settings.groups,
            held=self._held_at,
            turn=self._turn,
        )
        now = monotonic()
        avoided = {index for index in route.order if self._avoid.get(index, 0.0) > now}
        order = tuple(sorted(route.order, key=avoided.__contains__))
        if attempt.only is not None:
            order = tuple(index for index in order if index in attempt.only)
        elif not avoided >= set(order) - route.spare:
            order = tuple(index for index in order if index not in route.spare)
        attempt.route = Route(order, route.refusals, last_resort=self._due(route.last_resort, attempt))
        return attempt.route

    def _due(self, last_resort: tuple[int, ...], attempt: Attempt) -> tuple[int, ...]:
        """Return the endpoints that are DOWN and that this process may try now."""
        attachment = self._attachment
        return tuple(
            index
            for index in last_resort
            if (attempt.only is None or index in attempt.only)
            and attachment.trials.is_due(index, epoch_of(attachment.segment, index))
            and not is_overtaken(attachment.segment, attachment.settings.endpoints, index)
        )

    def reasons(self, route: Route) -> dict[str, str]:
        """Say why each endpoint does not serve, and what came of trying it all the same."""
        segment, trials = self._attachment.segment, self._attachment.trials
        indexes = {e.name: e.index for e in self._attachment.settings.endpoints}
        told = {name: trials.told(indexes[name], epoch_of(segment, indexes[name])) for name in route.refusals}
        return {name: f"{reason}; {told[name]}" if told[name] else reason for name, reason in route.refusals.items()}

    def avoid(self, endpoint: int) -> None:
        """Try an endpoint last for a while: it just refused."""
        self._avoid[endpoint] = monotonic() + AVOID_S

    def trust(self, endpoint: int) -> None:
        """Try an endpoint in its turn again: it just served."""
        self._avoid.pop(endpoint, None)

    def is_too_slow(self, endpoint: int) -> bool:
        """Whether an endpoint lags too far for its idle connections to be kept."""
        settings = self.settings
        if (settings.max_lag_s is None and settings.max_lag_bytes is None) or self._is_stale():
            return False
        return is_too_slow(settings, self._candidates(), endpoint, self._attachment.settings.groups, self._held_at)

    def should_move(self, endpoint: int, rested: float) -> bool:
        """Whether a connection is better opened elsewhere, or by a worker that has none where few may be had.

        Args:
            rested: seconds since its last checkout.
        """
        if self._is_stale():
            return False
        candidates = self._candidates()
        if should_move(self.settings, candidates, endpoint):
            return True
        groups = self._attachment.settings.groups
        return rested >= FALLBACK_REST_S and is_fallback_spent(
            self.settings, candidates, endpoint, groups, self._held_at
        )

    def _candidates(self) -> list[Candidate]:
        attachment = self._attachment
        return read_candidates(attachment.segment, attachment.settings.endpoints, attachment.endpoints)

    def _is_stale(self) -> bool:
        """Whether the coordinator's heartbeat is too old to believe health, roles and lag."""
        return heartbeat_age(self._attachment.segment) > self._attachment.settings.stale_after

    def _held_at(self, endpoint: int) -> int:
        """Count the connections that all workers of the host hold for this group at an endpoint."""
        return count_held(self._attachment.segment, self.permits, self._attachment.endpoints[endpoint])
