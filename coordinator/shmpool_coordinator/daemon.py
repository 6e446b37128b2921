"""The coordinator's event loop: one thread that owns every word, helper threads for what blocks.

It ticks every 100 ms, every 20 ms while somebody waits, when a connection may go that somebody waits for, and at once
when a worker's control connection or process ends.  Probes and looks at server sessions run in threads, which hand
results over and wake the loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import selectors
import signal
import socket
import time
from pathlib import Path
from typing import Final

from shmpool.clock import monotonic
from shmpool.errors import MechanismError
from shmpool.names import Names
from shmpool.rows import parent_of
from shmpool.segment import Segment
from shmpool_coordinator.adoption import Access, lock_pool
from shmpool_coordinator.arbiter import Arbiter, waiting_groups
from shmpool_coordinator.balance import Balancer
from shmpool_coordinator.config import Config, ConfigError
from shmpool_coordinator.control import Control
from shmpool_coordinator.lookout import Lookout
from shmpool_coordinator.origin import File, Origin
from shmpool_coordinator.reaper import Reaper
from shmpool_coordinator.registry import Registry
from shmpool_coordinator.requests import Requests
from shmpool_coordinator.sessions import Sessions

TICK_S: Final = 0.1
BUSY_TICK_S: Final = 0.02  # while somebody waits
LEAST_TICK_S: Final = 0.005  # before the next one for a connection that may go by then
ENDING_TICK_S: Final = 0.005  # while a worker is just ending: its locks and sockets go before it is gone
CHECK_EVERY_S: Final = 1.0  # names, drained rows, linger
SETTLE_AT_END_S: Final = 5.0  # a busy server takes its time to end sessions in the middle of a query
DEPART_S: Final = 10.0  # a mule's workers: their requests may take longer, but a mule alone is to be replaced soon
CLOCK_STEP_S: Final = 0.1
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
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._drain_wakes)
        self._keep(Registry(self.names, config, lock_pool(self.names, self._access)))
        _make_room(2 * _peers_of(self.segment) + OTHER_FILES)
        self._successor = config  # what the segment after this one is made with, once this one is retired
        self._signals: set[int] = set()
        self._is_ending = False
        self._exit_code = EXIT_OK
        self._ended_rows: set[int] = set()
        self._next_tick = 0.0
        self._next_check = 0.0
        self._last_used = monotonic()
        self._clock_offset = time.time() - monotonic()
        self.requests = Requests(self, self._origin, heartbeat_s=TICK_S, linger_s=linger_s)
        self.control = Control(
            self.names,
            self._selector,
            self.requests.serve,
            self.worker_ended,
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
        self.lookout = Lookout(
            registry,
            self.arbiter,
            self._origin.passwords,
            wake=self._wake,
            on_news=lambda: self.control.send_workers("endpoint"),  # to close what rests there
        )
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
        due = min(self._next_tick, self.lookout.due())
        for key, mask in self._selector.select(max(0.0, due - monotonic())):
            key.data(mask)
        self._take_signals()
        self.lookout.take_results()
        now = monotonic()
        self.lookout.probe_due(now)
        if now >= self._next_tick:
            self.tick()

    def tick(self) -> None:
        """Do everything that is due to the tables once."""
        if self.registry.is_retired and self.registry.is_left():
            self._succeed()
        if self.lookout.has_looked():
            self.registry.beat()
        hinted, self._ended_rows = self._ended_rows, set()
        self.reaper.tick(hinted)
        self.permits.tick(self.sessions.is_gone)
        waiters = self.arbiter.waiters()
        if waiters:
            self.permits.ring_waiting(*waiting_groups(waiters))
        now = monotonic()
        assert self.registry.settings is not None
        usable = self.registry.endpoints.usable() if waiters else {}
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
        pause = ENDING_TICK_S if self.reaper.awaits_an_end else BUSY_TICK_S if waiters else TICK_S
        self._next_tick = min(now + pause, max(now + LEAST_TICK_S, self.arbiter.due))

    def _rows_to_leave(self) -> set[int]:
        """Return the worker rows with something new to close: connections that rest at endpoints that are not READY."""
        drained = self.registry.endpoints.drained()
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
        if not self.lookout.has_results():
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

    def _watch_endpoints(self) -> None:
        """Probe each endpoint, and look at its sessions, as it is configured now."""
        settings, config = self.registry.settings, self.registry.config
        assert settings is not None
        self.lookout.configure()
        self.sessions.configure(
            settings.endpoints,
            config.probe,
            grace_s=config.coordinator.orphan_grace,
            lookup=self._origin.passwords,
        )

    # -- what peers ask for ------------------------------------------------------------------------

    def tick_soon(self) -> None:
        """Tick in this turn of the loop."""
        self._next_tick = 0.0

    def worker_ended(self, row: int) -> None:
        """Look in this turn whether the worker of a row has ended."""
        self._ended_rows.add(row)
        self._next_tick = 0.0

    def stop(self) -> None:
        """End after this turn."""
        self._is_ending = True

    def retire(self, asked_by: int) -> None:
        """Let everybody leave the segment; `tick` makes its successor when the last one has.

        Raises:
            ConfigError, ValueError, OSError: the successor could not be made; nothing was changed.
        """
        self._successor = self._load()
        if not self.registry.is_retired:
            log.warning("pool %s: retired, as pid %d asked for", self.names.pool, asked_by)
            self.registry.retire()
            self.control.send_workers("config")
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
            registry = Registry(self.names, self._successor, old.locks, old.endpoints.operator_wishes())
        except (MechanismError, ValueError, OSError) as error:
            log.critical("pool %s: no successor could be made: %s", self.names.pool, error)
            self._exit_code, self._is_ending = EXIT_DAMAGED, True
            return
        self.lookout.end()
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
            self.lookout.end()
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
