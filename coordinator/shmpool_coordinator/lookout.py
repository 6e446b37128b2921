"""The lookout: each endpoint's probe, when it is due, and what its results make of the endpoint in the registry.

Workers' evidence brings a probe forward, and their use keeps an endpoint in that only its probes say is gone; the
rules are those of health.py.

Assumptions.  Used by the event loop's thread only; the probes' own threads do nothing but hand their results in.
"""

from __future__ import annotations

import logging
import queue
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from shmpool.clock import monotonic
from shmpool.layout import SLOTS
from shmpool.replication import Lag, is_lag_old, lag_of
from shmpool.settings import EndpointSettings
from shmpool.states import Admin, Health, Role, Use, Verdict
from shmpool.words import YES, Kind
from shmpool.words import field as field_of
from shmpool_coordinator import health
from shmpool_coordinator.arbiter import Arbiter
from shmpool_coordinator.config import Probe as ProbeOptions
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from shmpool_coordinator.origin import Passwords
from shmpool_coordinator.probe import Probe
from shmpool_coordinator.prober import Prober, Resolver
from shmpool_coordinator.registry import Registry

EVIDENCE_GAP_S: Final = 0.1  # at most one extra probe per endpoint in this time
EVIDENCE_HOLDS_S: Final = 1.0  # how long a refused probe confirms what workers told
LOOK_ANEW_S: Final = 5.0  # after a standstill: who may not be believed for longer than that looks like one that is dead
JITTER: Final = 0.1

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Watch:
    """An endpoint, its probe and what is known of it."""

    settings: EndpointSettings
    probe: ProbeOptions
    prober: Prober
    health: EndpointHealth
    result: ProbeResult | None = None
    evidence: float = float("-inf")  # when workers told last that they lost it
    extra_probe: float = float("-inf")  # the last one that evidence brought forward
    busy: dict[int, tuple[float, float]] = field(default_factory=dict)  # slots in use at the last bad probe: times
    is_urgent: bool = False
    level_at: float | None = None  # when it was last known to have replayed all that its primary had
    told: tuple[Health, Role, Verdict] = field(default=(Health.UNKNOWN, Role.UNKNOWN, Verdict.NONE))


class Lookout:
    """All endpoints of a registry, watched."""

    def __init__(
        self,
        registry: Registry,
        arbiter: Arbiter,
        passwords: Passwords | None,
        *,
        wake: Callable[[], None],
        on_news: Callable[[], None],
    ) -> None:
        """Watch nothing yet: `configure` begins.

        Args:
            passwords: what processes gave with the configuration, if it does not say where they are read.
            wake: makes the event loop call `take_results` (called from any thread).
            on_news: told that workers must look at what rests at some endpoint.
        """
        self._registry = registry
        self._endpoints = registry.endpoints
        self._arbiter = arbiter
        self._passwords = passwords
        self._wake = wake
        self._on_news = on_news
        self._watches: dict[int, Watch] = {}
        self._results: queue.SimpleQueue[tuple[Prober, ProbeResult]] = queue.SimpleQueue()
        self._turned_at = monotonic()
        self._awake_since = float("-inf")  # before that it stood still: what probes saw until then is old

    def configure(self) -> None:
        """Have one prober for each endpoint as it is configured now."""
        settings, probe = self._registry.settings, self._registry.config.probe
        assert settings is not None
        wanted = {e.index: e for e in settings.endpoints}
        for index in [i for i, w in self._watches.items() if (wanted.get(i), probe) != (w.settings, w.probe)]:
            self._watches.pop(index).prober.end()
        for index, endpoint in wanted.items():
            if index not in self._watches:
                self._watches[index] = Watch(
                    endpoint,
                    probe,
                    self._prober(endpoint),
                    health.hasten(self._endpoints.known_health(index), monotonic()),
                )

    def _prober(self, endpoint: EndpointSettings) -> Prober:
        settings = self._registry.config.probe
        probe = Probe(
            endpoint,
            pool=self._registry.names.pool,
            overlay=settings.conninfo,
            timeout_s=settings.timeout,
            lookup=self._passwords,
        )

        def hand_in(prober: Prober, result: ProbeResult) -> None:
            self._results.put((prober, result))
            self._wake()

        named = "" if endpoint.address == "service" else endpoint.conninfo  # libpq tries all addresses
        return Prober(probe, Resolver(named, settings.resolve_every), hand_in)

    def end(self) -> None:
        """End all probes, each after the check it may be in."""
        for watch in self._watches.values():
            watch.prober.end()
        self._watches.clear()

    # -- the loop's turns --------------------------------------------------------------------------

    def due(self) -> float:
        """Return when the next probe is due (monotonic seconds)."""
        return min((w.health.next_probe for w in self._watches.values() if self._may_go(w)), default=float("inf"))

    def probe_due(self, now: float) -> None:
        """Begin the probes that are due."""
        for watch in self._watches.values():
            if watch.health.next_probe <= now and self._may_go(watch):
                watch.prober.go()

    def has_results(self) -> bool:
        """Whether a probe has handed in what `take_results` has not taken."""
        return not self._results.empty()

    def _may_go(self, watch: Watch) -> bool:
        is_maintained = self._endpoints.status(watch.settings.index).admin is Admin.MAINT
        return not watch.prober.is_busy and not is_maintained

    def take_results(self) -> None:
        """Judge the endpoints by what their probes have handed in; called in every turn of the loop."""
        self._note_standstill()
        while True:
            try:
                prober, result = self._results.get_nowait()
            except queue.Empty:
                return
            prober.is_busy = False
            if prober.began < self._awake_since:
                continue
            for watch in self._watches.values():
                if watch.prober is prober:
                    self.advance(watch.settings.index, result)

    def _note_standstill(self) -> None:
        """After a stop that was longer than workers believe what they read: look anew before they may again."""
        now, before = monotonic(), self._turned_at
        self._turned_at = now
        assert self._registry.settings is not None
        if now - before <= self._registry.settings.stale_after:
            return
        log.warning("stood still for %.1f s, every endpoint is looked at anew", now - before)
        self._awake_since = now
        for watch in self._watches.values():
            watch.health = health.hasten(watch.health, now)

    def has_looked(self) -> bool:
        """Whether each endpoint that is probed was probed since the last standstill, or that was long ago."""
        return monotonic() - self._awake_since >= LOOK_ANEW_S or all(
            watch.health.last_probe is None
            or watch.health.last_probe >= self._awake_since
            or self._endpoints.status(watch.settings.index).admin is Admin.MAINT
            for watch in self._watches.values()
        )

    def advance(self, index: int, result: ProbeResult) -> None:
        """Take in what a probe of an endpoint saw, and what it says of the others."""
        watch = self._watches[index]
        now, began = monotonic(), watch.prober.began
        is_seen = health.SIGN_OF_VERDICT[result.verdict] in (health.Sign.GOOD, health.Sign.CLOSED)
        watch.health = health.advance(
            watch.health,
            result,
            self._registry.config.probe,
            now,
            jitter=random.uniform(-JITTER, JITTER),
            is_used=not is_seen and self._is_used(watch),
            is_reported=now - watch.evidence <= EVIDENCE_HOLDS_S,
            is_urgent=watch.is_urgent,
        )
        watch.is_urgent = False
        if watch.extra_probe > began:  # evidence that came while this probe was on its way
            watch.health = health.hasten(watch.health, watch.extra_probe)
        if result.verdict is Verdict.LOST and watch.health.bad == 1:
            watch.health = health.hasten(watch.health, now)  # the kept connection: a new one tells more
        epochs, late = self._epochs(), self._endpoints.late()
        watch.result = result
        if result.verdict is Verdict.MISCONFIGURED and self._passwords is not None:
            self._passwords.refused(watch.settings.name)
        self._endpoints.record_probe(index, watch.health, result)
        self._record_lag(watch, now)
        for other in self._watches.values():  # a promotion supersedes another primary at once
            if other is not watch:
                self._endpoints.judge(other.settings.index, other.health)
            self._tell(other)
        if self._epochs() != epochs or self._endpoints.late() != late:
            self._on_news()
        if self._endpoints.has_vacant_role():
            soon = now + self._registry.config.probe.fastinter
            for other in self._watches.values():
                other.health = health.hasten(other.health, soon)

    def _epochs(self) -> dict[int, int]:
        return {index: self._endpoints.status(index).epoch for index in self._watches}

    def _is_used(self, watch: Watch) -> bool:
        """Whether a worker used the endpoint with success since its last probe, and since any evidence against it.

        A connection that rests was given back after its last checkout.  One that was in use at the last bad probe
        was given back since then if it rests now, or was checked out anew.
        """
        last_probe = watch.health.last_probe
        if last_probe is None:
            return False
        if watch.health.health is Health.DOWN:  # whoever got a connection all the same
            taken = self._checkouts(watch, Use.IDLE) | self._checkouts(watch, Use.ACTIVE)
            return any(opened > last_probe for opened, _ in taken.values())
        before = watch.busy if last_probe > watch.evidence else {}
        watch.busy = self._checkouts(watch, Use.ACTIVE)
        resting = self._checkouts(watch, Use.IDLE)
        return any(since > max(last_probe, watch.evidence) for _, since in resting.values()) or any(
            slot in before and before[slot][0] == opened and (slot in resting or before[slot][1] != since)
            for slot, (opened, since) in (resting | watch.busy).items()
        )

    def _checkouts(self, watch: Watch, use: Use) -> dict[int, tuple[float, float]]:
        """Return by slot when each of the endpoint's connections in this use was claimed and checked out last."""
        slots = self._arbiter.slots_in(use)
        words, times = self._registry.permits.slot_words() if slots else [], self._registry.segment.times
        places = {slot: self._registry.segment.layout.at(SLOTS, slot) for slot in slots}
        return {
            slot: (times[at + SLOTS.column("opened_at")], times[at + SLOTS.column("since")])
            for slot, at in places.items()
            if field_of(words[slot], Kind.ENDPOINT, watch.settings.index) == YES
        }

    def _record_lag(self, watch: Watch, now: float) -> None:
        """Store how far a replica that just answered is behind; a primary is not."""
        result, index = watch.result, watch.settings.index
        if result is None or result.verdict is not Verdict.OK:
            return
        if watch.health.role is not Role.REPLICA or result.lsn is None:
            is_primary = watch.health.role is Role.PRIMARY
            self._endpoints.record_lag(index, Lag(0, 0.0) if is_primary else Lag(None, None))
            return
        replica = self._endpoints.server(index)
        others = [
            self._endpoints.server(other)
            for other, seen in self._watches.items()
            if other != index and seen.settings.address == "instance"
        ]
        lag = lag_of(
            replica,
            others,
            replay_age=result.lag_s,
            unreplayed=result.lag_bytes,
            level_for=None if watch.level_at is None else now - watch.level_at,
            last=self._endpoints.lag(index),
        )
        if lag.bytes == 0 and not is_lag_old(replica, others):
            watch.level_at = now
        self._endpoints.record_lag(index, lag)

    def _tell(self, watch: Watch) -> None:
        status = self._endpoints.status(watch.settings.index)
        now = (status.health, status.role, status.verdict)
        if now == watch.told:
            return
        watch.told = now
        told = watch.health.error or self._endpoints.conflict(watch.settings.index)
        level = logging.INFO if status.verdict is Verdict.OK else logging.WARNING
        log.log(
            level,
            "endpoint %s: %s, %s, %s%s",
            watch.settings.name,
            status.health.name,
            status.role.name.lower(),
            status.verdict.name.lower(),
            f" ({told})" if told else "",
        )

    # -- what workers tell, and what is told -------------------------------------------------------

    def take_evidence(self, index: int) -> bool:
        """Probe an endpoint soon, as workers lost it; return whether there is such an endpoint."""
        watch = self._watches.get(index)
        if watch is None:
            return False
        watch.evidence = monotonic()
        if watch.extra_probe <= watch.evidence:  # else one is due that nobody needs twice
            watch.extra_probe = max(watch.evidence, watch.extra_probe + EVIDENCE_GAP_S)
        watch.is_urgent = True
        watch.health = health.hasten(watch.health, watch.extra_probe)
        return True

    def take_success(self, index: int, role: Role, pid: int) -> bool:
        """Let an endpoint that is DOWN serve everybody, as it served a worker; return whether there is such a one.

        It does until nobody succeeds.
        """
        watch = self._watches.get(index)
        if watch is None:
            return False
        if watch.health.health is Health.DOWN:
            log.warning("endpoint %s: is DOWN, and pid %d got a connection", watch.settings.name, pid)
            watch.health = health.serving(watch.health, role, monotonic())
            self._endpoints.record_serving(index, watch.health)
            for other in self._watches.values():
                self._endpoints.judge(other.settings.index, other.health)
                self._tell(other)
            self._on_news()
        return True

    def take_password(self, name: str) -> None:
        """Probe an endpoint now if it was misconfigured: another password is known."""
        for watch in self._watches.values():
            if watch.settings.name == name and watch.health.verdict is Verdict.MISCONFIGURED:
                watch.health = health.hasten(watch.health, monotonic())

    def names(self) -> list[str]:
        """Return the endpoints' names."""
        return [watch.settings.name for watch in self._watches.values()]

    def describe(self) -> dict[str, Any]:
        """Return by name how the endpoints are, in plain values."""
        return {
            watch.settings.name: {
                "health": watch.health.health.name,
                "role": watch.health.role.name,
                "verdict": self._endpoints.status(watch.settings.index).verdict.name,
                "error": watch.health.error[:500],
            }
            for watch in self._watches.values()
        }
