"""The coordinator's event loop: one thread that owns every word, helper threads for what blocks.

It ticks every 100 ms, every 20 ms while somebody waits, and at once when a worker's control connection or process
ends.  Probes and looks at server sessions run in threads, which hand results over and wake the loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import resource
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shmpool.clock import monotonic
from shmpool.errors import MechanismError
from shmpool.frames import Message
from shmpool.layout import SLOTS, WORKERS
from shmpool.names import Names
from shmpool.replication import Lag, is_lag_old, lag_of
from shmpool.rows import owner_of, parent_of
from shmpool.segment import Segment
from shmpool.settings import EndpointSettings
from shmpool.states import Admin, Health, Role, Use, Verdict
from shmpool.words import YES, Kind
from shmpool.words import field as field_of
from shmpool_coordinator import health
from shmpool_coordinator.arbiter import Arbiter, waiting_groups
from shmpool_coordinator.balance import Balancer
from shmpool_coordinator.config import Config, ConfigError
from shmpool_coordinator.config import Probe as ProbeOptions
from shmpool_coordinator.control import Control, Peer, Reply, RequestError
from shmpool_coordinator.health import EndpointHealth, ProbeResult
from shmpool_coordinator.origin import File, Origin, password_findings
from shmpool_coordinator.probe import Probe, parse_conninfo
from shmpool_coordinator.reaper import Reaper
from shmpool_coordinator.registry import Access, Registry, UnknownEndpointError, lock_pool
from shmpool_coordinator.repair import RepairError
from shmpool_coordinator.sessions import Sessions

TICK_S: Final = 0.1
BUSY_TICK_S: Final = 0.02  # while somebody waits
ENDING_TICK_S: Final = 0.005  # while a worker is just ending: its locks and sockets go before it is gone
CHECK_EVERY_S: Final = 1.0  # names, drained rows, linger
EVIDENCE_GAP_S: Final = 0.1  # at most one extra probe per endpoint in this time
EVIDENCE_HOLDS_S: Final = 1.0  # how long a refused probe confirms what workers told
SETTLE_AT_END_S: Final = 2.0
DEPART_S: Final = 10.0  # a mule's workers: their requests may take longer, but a mule alone is to be replaced soon
CLOCK_STEP_S: Final = 0.1
JITTER: Final = 0.1
HANDLED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OTHER_FILES: Final = 128  # semaphores, probes, looks at sessions

EXIT_OK: Final = 0
EXIT_DAMAGED: Final = 3  # a name no longer leads to the pool's own inode

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tell the service manager (sd_notify), if there is one."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager,
    ):
        manager.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


class Resolver:
    """The address of a conninfo's host, resolved anew from time to time (blocks: not for the event loop)."""

    def __init__(self, conninfo: str, every_s: float) -> None:
        keywords = parse_conninfo(conninfo)
        host = keywords.get("host", "")
        self._host = "" if keywords.get("hostaddr") or host.startswith(("/", "@")) else host
        self._port = keywords.get("port", "5432")
        self._every_s = every_s
        self._address = ""
        self._due = 0.0

    def address(self) -> str:
        """Return the address, "" where libpq is to find it; one that is still valid is kept.

        Raises:
            OSError: the name cannot be resolved, and never could.
        """
        if self._host and monotonic() >= self._due:
            self._due = monotonic() + self._every_s
            try:
                found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            except OSError:
                if not self._address:
                    self._due = 0.0
                    raise
                return self._address
            addresses = [str(entry[4][0]) for entry in found]
            if self._address not in addresses:
                self._address = addresses[0]
        return self._address


class Prober:
    """One endpoint's probe in a thread of its own: `go` asks for one check, its result is handed in."""

    def __init__(self, probe: Probe, resolver: Resolver, hand_in: Callable[[Prober, ProbeResult], None]) -> None:
        self._probe = probe
        self._resolver = resolver
        self._hand_in = hand_in
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.is_busy = False
        self.began = float("-inf")  # the last check
        self._thread = threading.Thread(target=self._run, name=repr(probe), daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Check once; the caller waits for the result before it asks again."""
        self.is_busy = True
        self.began = monotonic()
        self._requests.put(True)

    def end(self) -> None:
        """End the thread after the check it may be in."""
        self._requests.put(False)

    def _run(self) -> None:
        while self._requests.get():
            try:
                result = self._probe.check(self._resolver.address())
            except OSError as error:
                result = ProbeResult(verdict=Verdict.REFUSED, error=f"name not resolved: {error.strerror or error}")
            self._hand_in(self, result)
        self._probe.close()


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


class Daemon:
    """One pool's coordinator."""

    def __init__(
        self,
        config: Config,
        *,
        origin: Origin | None = None,
        linger_s: float | None = None,
        master_pid: int | None = None,
    ) -> None:
        """Become the coordinator of the configured pool and make or adopt its segment.

        Args:
            origin: where the configuration comes from; default: the file that it was read from.
            linger_s: end so many seconds after the last worker row became free; None: never.
            master_pid: the master that runs this process beside its workers and ends both together (mule.py).

        Raises:
            CoordinatorRunningError, SegmentMismatchError, SegmentInUseError, OSError, ValueError.
        """
        self.names = Names.of(config.name)
        self._origin = origin or File(Path(config.source))
        self._access = Access.of(config)
        self._linger_s = linger_s
        self._master_pid = master_pid
        self._depart_by: float | None = None  # the master ended us and its workers: these have time until then
        self._is_reload = False  # it will come back
        self._selector = selectors.EpollSelector()
        self._results: queue.SimpleQueue[tuple[Prober, ProbeResult]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._drain_wakes)
        self._keep(Registry(self.names, config, lock_pool(self.names, self._access)))
        _make_room(2 * _peers_of(self.segment) + OTHER_FILES)
        self._successor = config  # what the segment after this one is made with, once this one is retired
        self._watches: dict[int, Watch] = {}
        self._signals: set[int] = set()
        self._is_ending = False
        self._exit_code = EXIT_OK
        self._ended_rows: set[int] = set()
        self._next_tick = 0.0
        self._next_check = 0.0
        self._last_used = monotonic()
        self._clock_offset = time.time() - monotonic()
        self.control = Control(
            self.names,
            self._selector,
            self._serve,
            self._worker_ended,
            mode=self._access.mode,
            gid=self._access.gid,
            max_peers=_peers_of(self.segment),
        )
        self._watch_endpoints()

    def _keep(self, registry: Registry) -> None:
        """Work on a registry's segment from now on."""
        self.registry = registry
        self.segment = registry.segment
        self.permits = registry.permits
        self.reaper = Reaper(self.segment, registry.locks)
        self.arbiter = Arbiter(self.segment, lambda row: registry.locks.holder(row) is not None)
        self.balancer = Balancer(self.segment, self.permits, self.arbiter.connections)
        self.sessions = Sessions(self.segment, self._wake)
        self._sent_home: dict[int, int] = {}  # slot words, by slot: what rests at drained endpoints and was asked for

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until a signal, `stop` or the linger time ends it; return the exit code."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in HANDLED:
            signal.signal(number, lambda number, _: self._signals.add(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)  # one that came too early is served now
        self._selector.register(read_fd, selectors.EVENT_READ, lambda _: os.read(read_fd, 4096))
        how = "adopted" if self.registry.is_adopted else "created"
        how += ", retired: its successor opens when nothing is held any more" if self.registry.is_retired else ""
        log.info("pool %s: segment %s, pid %d", self.names.pool, how, os.getpid())
        self.tick()
        notify(f"READY=1\nMAINPID={os.getpid()}")
        try:
            while not self._is_ending:
                self._turn()
        finally:
            notify("STOPPING=1")
            self._end()
            signal.set_wakeup_fd(-1)
            os.close(read_fd)
            os.close(write_fd)
        return self._exit_code

    def _turn(self) -> None:
        due = min([self._next_tick, *(w.health.next_probe for w in self._watches.values() if self._may_go(w))])
        for key, mask in self._selector.select(max(0.0, due - monotonic())):
            key.data(mask)
        self._take_signals()
        self._take_results()
        now = monotonic()
        for watch in self._watches.values():
            if watch.health.next_probe <= now and self._may_go(watch):
                watch.prober.go()
        if now >= self._next_tick:
            self.tick()

    def tick(self) -> None:
        """Do everything that is due to the tables once."""
        if self.registry.is_retired and self.registry.is_left():
            self._succeed()
        self.registry.beat()
        hinted, self._ended_rows = self._ended_rows, set()
        self.reaper.tick(hinted)
        self.permits.tick(self.sessions.is_gone)
        waiters = self.arbiter.waiters()
        if waiters:
            self.permits.ring_waiting(*waiting_groups(waiters))
        now = monotonic()
        assert self.registry.settings is not None
        usable = self.registry.usable_endpoints() if waiters else {}
        rows = self.arbiter.tick(waiters, self.registry.settings, usable, self.permits, now)
        if not self.registry.is_retired:
            rows |= self.balancer.tick(self.registry.settings, {waiter.group for waiter in waiters}, now)
        rows |= self._rows_to_leave()
        if rows:
            self.control.send_rows(rows, "recall")
        offset = time.time() - now
        if offset < self._clock_offset - CLOCK_STEP_S:
            log.warning("clock: set back by %.1f s, all bells ring", self._clock_offset - offset)
            self.permits.ring_all()
        self._clock_offset = offset
        if now >= self._next_check:
            self._next_check = now + CHECK_EVERY_S
            self._check(now)
        if self._depart_by is not None and (now >= self._depart_by or not self._has_siblings()):
            self._is_ending = True
        self._next_tick = now + (ENDING_TICK_S if self.reaper.awaits_an_end else BUSY_TICK_S if waiters else TICK_S)

    def _rows_to_leave(self) -> set[int]:
        """Return the worker rows with something new to close: connections that rest at endpoints that are not READY."""
        drained = self.registry.drained_endpoints()
        resting = self.arbiter.idle_at(drained) if drained else {}
        told, self._sent_home = self._sent_home, resting
        per_row = self.segment.layout.slots_per_worker
        return {slot // per_row for slot, word in resting.items() if told.get(slot) != word}

    def _check(self, now: float) -> None:
        damage = self.registry.damage()
        if damage is not None:
            log.critical(
                "pool %s: %s; retired: workers leave at checkin (systemd's RemoveIPC, or a cleaner of /dev/shm?)",
                self.names.pool,
                damage,
            )
            self.registry.retire()
            self._exit_code, self._is_ending = EXIT_DAMAGED, True
            return
        if self.registry.drop_drained():
            self._watch_endpoints()
            self.control.send_workers("config")
        try:
            if self.control.restore():
                log.error("control socket %s: was removed, made again", self.names.socket)
        except OSError as error:
            log.error("control socket %s: was removed and cannot be made again: %s", self.names.socket, error)
        if self._linger_s is not None:
            if self.registry.any_worker():
                self._last_used = now
            elif now - self._last_used >= self._linger_s and self._close_to_newcomers():
                log.info("pool %s: no worker for %g s, ending", self.names.pool, self._linger_s)
                self._is_ending = True

    def _wake(self) -> None:
        """Make the loop tick at once (from any thread)."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def _drain_wakes(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        if self._results.empty():
            self._next_tick = 0.0

    def _take_signals(self) -> None:
        while self._signals:
            number = self._signals.pop()
            if self._master_pid is not None:
                self._depart(number)
            elif number == signal.SIGHUP:
                with contextlib.suppress(ConfigError, ValueError, OSError):
                    self.reload()
            else:
                log.info("pool %s: %s, ending", self.names.pool, signal.Signals(number).name)
                self._is_ending = True

    def _depart(self, number: int) -> None:
        """End after the master's workers, which it has told to end as well."""
        if self._depart_by is None:
            self._depart_by = monotonic() + DEPART_S
        self._is_reload = number != signal.SIGINT
        name = signal.Signals(number).name
        log.info("pool %s: %s, ending after the workers of pid %d", self.names.pool, name, self._master_pid)

    def _has_siblings(self) -> bool:
        """Whether a worker of the master that runs this process still holds a row."""
        holders = map(self.registry.locks.holder, range(self.segment.layout.workers))
        return any(pid and parent_of(pid) == self._master_pid for pid in holders)

    # -- probes ------------------------------------------------------------------------------------

    def _watch_endpoints(self) -> None:
        """Have one prober for each endpoint as it is configured now."""
        settings, probe = self.registry.settings, self.registry.config.probe
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
                    health.hasten(self.registry.known_health(index), monotonic()),
                )
        self.sessions.configure(
            settings.endpoints,
            probe,
            grace_s=self.registry.config.coordinator.orphan_grace,
            lookup=self._origin.passwords,
        )

    def _prober(self, endpoint: EndpointSettings) -> Prober:
        settings = self.registry.config.probe
        probe = Probe(
            endpoint,
            pool=self.names.pool,
            overlay=settings.conninfo,
            timeout_s=settings.timeout,
            lookup=self._origin.passwords,
        )

        def hand_in(prober: Prober, result: ProbeResult) -> None:
            self._results.put((prober, result))
            self._wake()

        return Prober(probe, Resolver(endpoint.conninfo, settings.resolve_every), hand_in)

    def _may_go(self, watch: Watch) -> bool:
        is_maintained = self.registry.status(watch.settings.index).admin is Admin.MAINT
        return not watch.prober.is_busy and not is_maintained

    def _take_results(self) -> None:
        while True:
            try:
                prober, result = self._results.get_nowait()
            except queue.Empty:
                return
            prober.is_busy = False
            for watch in self._watches.values():
                if watch.prober is prober:
                    self._advance(watch, result)

    def _advance(self, watch: Watch, result: ProbeResult) -> None:
        now, began = monotonic(), watch.prober.began
        could_fall = watch.health.health is Health.UP and health.SIGN_OF_VERDICT[result.verdict] is health.Sign.BAD
        watch.health = health.advance(
            watch.health,
            result,
            self.registry.config.probe,
            now,
            jitter=random.uniform(-JITTER, JITTER),
            is_used=could_fall and self._is_used(watch),
            is_reported=now - watch.evidence <= EVIDENCE_HOLDS_S,
            is_urgent=watch.is_urgent,
        )
        watch.is_urgent = False
        if watch.extra_probe > began:  # evidence that came while this probe was on its way
            watch.health = health.hasten(watch.health, watch.extra_probe)
        if result.verdict is Verdict.LOST and watch.health.bad == 1:
            watch.health = health.hasten(watch.health, now)  # the kept connection: a new one tells more
        epochs = self._epochs()
        watch.result = result
        if result.verdict is Verdict.MISCONFIGURED and self._origin.passwords is not None:
            self._origin.passwords.refused(watch.settings.name)
        self.registry.record_probe(watch.settings.index, watch.health, result)
        self._record_lag(watch, now)
        for other in self._watches.values():  # a promotion supersedes another primary at once
            if other is not watch:
                self.registry.judge(other.settings.index, other.health)
            self._tell(other)
        if self._epochs() != epochs:
            self.control.send_workers("endpoint")  # to close what rests there
        if self.registry.has_vacant_role():
            soon = now + self.registry.config.probe.fastinter
            for other in self._watches.values():
                other.health = health.hasten(other.health, soon)

    def _epochs(self) -> dict[int, int]:
        return {index: self.registry.status(index).epoch for index in self._watches}

    def _is_used(self, watch: Watch) -> bool:
        """Whether a worker used the endpoint with success since its last probe, and since any evidence against it.

        A connection that rests was given back after its last checkout.  One that was in use at the last bad probe
        was given back since then if it rests now, or was checked out anew.
        """
        last_probe = watch.health.last_probe
        if last_probe is None:
            return False
        before = watch.busy if last_probe > watch.evidence else {}
        watch.busy = self._checkouts(watch, Use.ACTIVE)
        resting = self._checkouts(watch, Use.IDLE)
        return any(since > max(last_probe, watch.evidence) for _, since in resting.values()) or any(
            slot in before and before[slot][0] == opened and (slot in resting or before[slot][1] != since)
            for slot, (opened, since) in (resting | watch.busy).items()
        )

    def _checkouts(self, watch: Watch, use: Use) -> dict[int, tuple[float, float]]:
        """Return by slot when each of the endpoint's connections in this use was claimed and checked out last."""
        slots = self.arbiter.slots_in(use)
        words, times = self.permits.slot_words() if slots else [], self.segment.times
        places = {slot: self.segment.layout.at(SLOTS, slot) for slot in slots}
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
            self.registry.record_lag(index, Lag(0, 0.0) if is_primary else Lag(None, None))
            return
        replica = self.registry.server(index)
        others = [self.registry.server(other) for other in self._watches if other != index]
        lag = lag_of(
            replica,
            others,
            replay_age=result.lag_s,
            unreplayed=result.lag_bytes,
            level_for=None if watch.level_at is None else now - watch.level_at,
            last=self.registry.lag(index),
        )
        if lag.bytes == 0 and not is_lag_old(replica, others):
            watch.level_at = now
        self.registry.record_lag(index, lag)

    def _tell(self, watch: Watch) -> None:
        status = self.registry.status(watch.settings.index)
        now = (status.health, status.role, status.verdict)
        if now == watch.told:
            return
        watch.told = now
        level = logging.INFO if status.verdict is Verdict.OK else logging.WARNING
        log.log(
            level,
            "endpoint %s: %s, %s, %s%s",
            watch.settings.name,
            status.health.name,
            status.role.name.lower(),
            status.verdict.name.lower(),
            f" ({watch.health.error})" if watch.health.error else "",
        )

    # -- messages ----------------------------------------------------------------------------------

    def _serve(self, peer: Peer, message: Message) -> Reply | None:
        serve = {
            "hello": self._hello,
            "look": self._look,
            "waiting": self._waiting,
            "evidence": self._evidence,
            "info": self._info,
            "reload": self._reload,
            "admin": self._admin,
            "retire": self._retire,
            "repair": self._repair,
            "passwords": self._passwords,
            "stop": self._stop,
        }.get(message["type"])
        if serve is None:
            raise RequestError(f"message type {str(message['type'])[:40]!r} is not known")
        return serve(peer, message)

    def _hello(self, peer: Peer, message: Message) -> Reply:
        row, generation = _integer(message, "row"), _integer(message, "generation")
        if not self.registry.is_row_of(row, generation):
            raise RequestError(f"worker row {row} has not generation {generation}")
        peer.row, peer.generation = row, generation
        owner = owner_of(self.segment, row)
        if not peer.pid or (owner.pid == peer.pid and owner.visibly_lives()):  # 0: of another pid namespace
            self.control.watch(peer)
        return Reply("welcome", {"pid": os.getpid(), "heartbeat": TICK_S})

    def _look(self, _peer: Peer, message: Message) -> None:
        """A process ended, as its parent knows: look at its rows now."""
        pid = _integer(message, "pid")
        for row in range(self.segment.layout.workers):
            if pid and self.segment.words[self.segment.layout.at(WORKERS, row, "pid")] == pid:
                self._worker_ended(row)

    def _waiting(self, _peer: Peer, message: Message) -> None:
        _integer(message, "group")
        self._next_tick = 0.0

    def _evidence(self, _peer: Peer, message: Message) -> None:
        index = _integer(message, "endpoint")
        watch = self._watches.get(index)
        if watch is None:
            raise RequestError(f"endpoint {index} is not configured")
        watch.evidence = monotonic()
        if watch.extra_probe <= watch.evidence:  # else one is due that nobody needs twice
            watch.extra_probe = max(watch.evidence, watch.extra_probe + EVIDENCE_GAP_S)
        watch.is_urgent = True
        watch.health = health.hasten(watch.health, watch.extra_probe)

    def _info(self, _peer: Peer, _message: Message) -> Reply:
        return Reply(
            "info",
            {
                "pid": os.getpid(),
                "pool": self.names.pool,
                "config_file": self.registry.config.source,
                "linger": self._linger_s,
                "workers": sum(peer.row is not None for peer in self.control.peers),
                "adoptions": self.segment.header("coordinator_adoptions"),
                "endpoints": {
                    watch.settings.name: {
                        "health": watch.health.health.name,
                        "role": watch.health.role.name,
                        "verdict": self.registry.status(watch.settings.index).verdict.name,
                        "error": watch.health.error[:500],
                    }
                    for watch in self._watches.values()
                },
            },
        )

    def _reload(self, _peer: Peer, _message: Message) -> Reply:
        try:
            return Reply("reloaded", {"changes": self.reload()})
        except (ConfigError, ValueError, OSError) as error:
            raise RequestError(str(error)) from None

    def _passwords(self, peer: Peer, message: Message) -> Reply:
        """A process with the same configuration hands its passwords over: one may be newer than what is known."""
        known = self._origin.passwords
        if known is None:
            raise RequestError(
                f"pool {self.names.pool!r}: its configuration says where passwords are read, none is taken from here"
            )
        given: Any = message.get("passwords")
        wrong = list(map(str, password_findings(given, self.registry.config.endpoints)))
        if wrong:
            raise RequestError("; ".join(wrong))
        for watch in self._watches.values():
            name = watch.settings.name
            if name in given and known.take(name, given[name]):
                log.info("endpoint %s: pid %d gave another password", name, peer.pid)
                if watch.health.verdict is Verdict.MISCONFIGURED:
                    watch.health = health.hasten(watch.health, monotonic())
        return Reply("taken", {})

    def _admin(self, peer: Peer, message: Message) -> Reply:
        """Note what an operator wants of an endpoint; the next tick, which is now, sends home what rests there."""
        name, wish = _text(message, "endpoint"), _text(message, "admin")
        wishes = {admin.name.lower(): admin for admin in Admin}
        if wish not in wishes:
            raise RequestError(f"admin is {wish[:40]!r}, expected one of {', '.join(wishes)}")
        try:
            status = self.registry.set_operator_wish(name, wishes[wish])
        except UnknownEndpointError as error:
            raise RequestError(str(error)) from None
        alone = self.registry.groups_left_alone_by(name)
        log.warning("endpoint %s: %s, as pid %d (uid %d) asked for", name, wish, peer.pid, peer.uid)
        if alone:
            log.warning("endpoint %s: without it no endpoint is eligible for group %s", name, ", ".join(alone))
        self._next_tick = 0.0
        return Reply(
            "admin",
            {
                "endpoint": name,
                "admin": status.admin.name.lower(),
                "operator": status.admin_operator.name.lower(),
                "configuration": status.admin_config.name.lower(),
                "groups_left_alone": alone,
            },
        )

    def _retire(self, peer: Peer, _message: Message) -> Reply:
        """Let everybody leave the segment; `tick` makes its successor when the last one has."""
        try:
            self._successor = self._load()
        except (ConfigError, ValueError, OSError) as error:
            raise RequestError(f"nothing changed, as the successor could not be made: {error}") from None
        if not self.registry.is_retired:
            log.warning("pool %s: retired, as pid %d asked for", self.names.pool, peer.pid)
            self.registry.retire()
            self.control.send_workers("config")
        self._next_tick = 0.0
        return Reply("retired", {"token": f"{self.segment.token:016x}"})

    def _repair(self, peer: Peer, message: Message) -> Reply:
        apply = message.get("apply") is True
        if apply:
            log.warning("pool %s: repair asked for by pid %d", self.names.pool, peer.pid)
        try:
            return Reply("repairs", {"repairs": self.registry.repair(apply=apply)})
        except RepairError as error:
            raise RequestError(str(error)) from None

    def _stop(self, peer: Peer, _message: Message) -> Reply:
        log.info("pool %s: stop asked for by pid %d, ending", self.names.pool, peer.pid)
        self._is_ending = True
        return Reply("stopping", {"pid": os.getpid()})

    def _worker_ended(self, row: int) -> None:
        self._ended_rows.add(row)
        self._next_tick = 0.0

    def reload(self) -> list[str]:
        """Read the configuration file again; return what changed.

        Raises:
            ConfigError, ValueError, OSError: the file cannot be used, or there is none; nothing was changed.
        """
        try:
            config = self._of_this_pool(self._origin.read_again())
            if self.registry.is_retired:
                raise ValueError("the segment is retired; its successor is made with the file as it is then")
            changes = self.registry.configure(config)
        except (ConfigError, ValueError, OSError) as error:
            log.error("reload: nothing changed: %s", error)
            raise
        self._watch_endpoints()
        self.control.send_workers("config")
        self._next_tick = 0.0
        for change in changes or ["no change"]:
            log.info("reload: %s", change)
        return changes

    def _load(self) -> Config:
        """Return the configuration for a successor.  Raises as `reload`."""
        return self._of_this_pool(self._origin.read())

    def _of_this_pool(self, config: Config) -> Config:
        if config.name != self.names.pool:
            raise ValueError(f"{config.source}: name is {config.name!r}, this is pool {self.names.pool!r}")
        return config

    def _succeed(self) -> None:
        """Replace the retired segment, through which nothing is held, by a new one of the same name."""
        try:
            self._successor = self._load()
        except (ConfigError, ValueError, OSError) as error:
            log.error("pool %s: the successor is made with the configuration read before: %s", self.names.pool, error)
        old = self.registry
        old.unlink_segment()
        try:
            registry = Registry(self.names, self._successor, old.locks, old.operator_wishes())
        except (MechanismError, ValueError, OSError) as error:
            log.critical("pool %s: no successor could be made: %s", self.names.pool, error)
            self._exit_code, self._is_ending = EXIT_DAMAGED, True
            return
        for index in list(self._watches):
            self._watches.pop(index).prober.end()
        self.reaper.close()
        self.arbiter.close()
        self._keep(registry)
        old.close()
        self.control.max_peers = _peers_of(self.segment)
        self._last_used = monotonic()
        self._watch_endpoints()
        log.info("pool %s: the successor of the retired segment is open", self.names.pool)

    # -- the end -----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Leave: remove everything if nobody uses the pool, else leave it for the next coordinator."""
        self.control.close()
        try:
            is_settled = self._exit_code == EXIT_OK and self._settle_all()
            if is_settled and not self._is_reload and self._is_closed():
                self.registry.unlink()
                log.info("pool %s: ended, nothing is left", self.names.pool)
            else:
                self.registry.leave()
                log.info("pool %s: ended, the segment stays for the next coordinator", self.names.pool)
        finally:
            for watch in self._watches.values():
                watch.prober.end()
            self.reaper.close()
            self.arbiter.close()
            self.registry.close()
            self._selector.close()
            os.close(self._wake_fd)
            self.registry.locks.release_coordinator()

    def _settle_all(self) -> bool:
        """Give back what dead workers left, for a bounded time; return whether nothing is held by anybody."""
        deadline = monotonic() + SETTLE_AT_END_S
        while self.registry.is_retired or not self.registry.any_worker():
            self.reaper.tick()
            self.permits.tick(self.sessions.is_gone)
            if self.registry.is_left():
                return True
            if monotonic() >= deadline:
                return False
            time.sleep(BUSY_TICK_S)
        return False

    def _is_closed(self) -> bool:
        """Whether nobody can come in: retired and once seen to be left, or closed now."""
        return self.registry.is_retired or self._close_to_newcomers()

    def _close_to_newcomers(self) -> bool:
        """Take nobody in any more, if nothing is held; return whether that is so.

        A worker that came in just before keeps the segment open; one that comes later finds it retired, and waits
        for what comes next.
        """
        if self.registry.is_retired:
            return self.registry.is_left()
        self.registry.retire()
        if self.registry.is_left():
            return True
        self.registry.reopen()
        return False


def _peers_of(segment: Segment) -> int:
    """Return how many control connections a pool may need: a worker that rejoins has two for a moment."""
    return 2 * segment.layout.workers + 64


def _make_room(files: int) -> None:
    """Raise the limit of open files as far as it may be: each control connection has a pidfd beside it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _integer(message: Message, key: str) -> int:
    value: Any = message.get(key)
    if type(value) is not int:
        raise RequestError(f"{message['type']}: {key} is {str(value)[:40]!r}, expected a whole number")
    return value


def _text(message: Message, key: str) -> str:
    value: Any = message.get(key)
    if type(value) is not str:
        raise RequestError(f"{message['type']}: {key} is {str(value)[:40]!r}, expected a text")
    return value
