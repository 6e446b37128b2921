"""One chaos run: servers, coordinator, workers and sampler are started, tormented by a schedule, ended and counted.

Guarantees: leaving the `with` block ends all of it, also after Ctrl-C; if this process is killed, the nursery and the
sampler end with their pipes, the coordinator lingers out, and the servers' guard ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from shmpool.clock import monotonic
from shmpool.launch import serving_pid
from shmpool.layout import PERMITS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.segment import Segment, attach
from tools.chaos.board import Board, Column
from tools.chaos.figures import Figures
from tools.chaos.recovery import Recovery
from tools.chaos.schedule import Caps, Fault, Scenario, digest, faults
from tools.pg_cluster import Cluster
from tools.stage import ROOT, Signals, say

START_S: Final = 20.0
END_S: Final = 20.0  # for the workers to end, and again for everything to be accounted for
LOOK_S: Final = 0.001
TELL_EVERY_S: Final = 5.0
TIMEOUT_S: Final = 15  # of a checkout
LINGER_S: Final = 20
TICKS: Final = 2  # one of them comes after its signal handlers are there
SHOWN: Final = 20  # lines of a log

CONFIG: Final = """
name = "{name}"
[limits]
workers = {rows}
slots_per_worker = 8
endpoints = 2
groups = 2
[coordinator]
autostart = false
[endpoints.pg1]
conninfo = "{pg1}"
max_connections = {caps.endpoints[pg1]}
[endpoints.pg2]
conninfo = "{pg2}"
max_connections = {caps.endpoints[pg2]}
[groups.read]
connections = {caps.groups[read]}
target = "any"
autocommit = true
timeout = "{timeout}s"
[groups.write]
connections = {caps.groups[write]}
target = "primary"
timeout = "{timeout}s"
"""


class ChaosError(Exception):
    """The run cannot go on; the message says why."""


class Chaos:
    """One run."""

    def __init__(self, scenario: Scenario, *, seed: int, seconds: float, workers: int, signals: Signals) -> None:
        self.scenario = scenario
        self.seed = seed
        self.seconds = seconds
        self.workers = workers
        self.signals = signals
        self.schedule = faults(scenario, seed, seconds, workers)
        self.names = Names.of(f"chaos-{os.getpid()}")
        self.figures = Figures(
            f"scenario {scenario.name}, seed {seed}, {seconds:g} s, {workers} workers, schedule {digest(self.schedule)}"
        )
        self._ends = contextlib.ExitStack()
        self._caps = Caps.most()
        self._pids: dict[int, int] = {}  # place -> pid
        self._doomed: set[int] = set()  # pids that were sent SIGKILL
        self._births = 0
        self._waking: list[tuple[float, int]] = []  # when a stopped process goes on
        self._lines = b""
        self._sampled: dict[str, Any] = {}
        self._is_there = self._serving = False
        self._has_new_config = False
        self._is_ending = False

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    # -- start -------------------------------------------------------------------------------------

    def _start(self) -> None:
        directory = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="shmpool-chaos-")))
        self._config, self._log = directory / "shmpool.toml", directory / "workers.log"
        self._coordinator_log = directory / "coordinator.log"
        say("starting a primary and a standby")
        self._cluster = self._ends.enter_context(Cluster(standbys=1))
        self._servers = {"pg1": self._cluster.primary, "pg2": self._cluster.standbys[0]}
        self.board = Board(directory / "board", self.workers)
        self._write_config()
        self._ends.callback(self._remove_names)
        self._start_coordinator()
        self._ends.callback(self._end_coordinator)
        self._wait(lambda: serving_pid(self.names, is_fresh=True), START_S, "the coordinator serves")
        self._segment: Segment = attach(self.names)
        self._ends.callback(self._segment.release)
        self._recovery = Recovery(self._segment)
        self._wait(self._look_for_coordinator, START_S, "the coordinator ticks")
        self._nursery = self._start_python(
            "tools.chaos.worker", self.names.pool, str(directory / "board"), str(self.workers), str(self._log)
        )
        servers = [f"{name}={server.conninfo()}" for name, server in self._servers.items()]
        most = json.dumps(Caps.most().endpoints)
        self._sampler = self._start_python("tools.chaos.sampler", self.names.pool, most, *servers)
        for place in range(self.workers):
            self._spawn(place)

    def _start_python(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of our own modules, which ends when its input does."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._ends.callback(_end, process)
        return process

    def _start_coordinator(self) -> None:
        command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(self._config)]
        with self._coordinator_log.open("ab") as log:
            self._coordinator = subprocess.Popen(
                [*command, "--linger", f"{LINGER_S}s"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._is_there = self._serving = False

    def _look_for_coordinator(self) -> bool:
        """Note when the coordinator that was started last begins to serve: its first tick is over."""
        if not self._serving:
            header = self._segment.header
            is_there = header("coordinator_pid") == self._coordinator.pid
            if is_there and not self._is_there:
                self._recovery.coordinator_since = monotonic()
            self._is_there = is_there
            self._serving = is_there and header("ticks") >= TICKS
            if self._serving:
                if self._has_new_config:  # it may have read the file just before
                    _send(self._coordinator.pid, signal.SIGHUP)
                self._has_new_config = False
        return self._serving

    def _write_config(self) -> None:
        text = CONFIG.format(
            name=self.names.pool,
            rows=8 * self.workers,
            timeout=TIMEOUT_S,
            caps=self._caps,
            **{name: server.conninfo() for name, server in self._servers.items()},
        )
        new = self._config.with_suffix(".new")
        new.write_text(text)
        new.replace(self._config)

    # -- workers -----------------------------------------------------------------------------------

    def _spawn(self, place: int) -> None:
        self._births += 1
        self.board.clear_sleeping(place)
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(f"{place} {self.seed}/{place}/{self._births}\n".encode())
        self._nursery.stdin.flush()

    def _hear(self) -> None:
        """Take in what nursery and sampler said."""
        *lines, self._lines = (self._lines + _read(self._nursery.stdout)).split(b"\n")
        for line in lines:
            words = line.decode().split()
            place, pid = int(words[1]), int(words[2])
            if words[0] == "started":
                self._pids[place] = pid
            else:
                self._ended(place, pid, int(words[3]))
        for line in _read(self._sampler.stdout).splitlines():
            with contextlib.suppress(ValueError):  # half a line: the next one tells all of it
                self._sampled = json.loads(line)

    def _ended(self, place: int, pid: int, status: int) -> None:
        if self._pids.get(place) == pid:
            del self._pids[place]
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and pid in self._doomed
        self._doomed.discard(pid)
        if not was_killed and status != 0:
            self.figures.trouble.append(f"worker pid {pid} ended by itself, wait status {status}")
        if not self._is_ending:
            self._spawn(place)

    # -- faults ------------------------------------------------------------------------------------

    def torment(self) -> None:
        """Let the schedule happen."""
        began = tell_at = monotonic()
        waiting = list(reversed(self.schedule))
        say(f"{len(waiting)} faults begin")
        while (now := monotonic()) < began + self.seconds or self._waking:
            self.signals.check()
            self._hear()
            if not self._look_for_coordinator() and self._coordinator.poll() is not None:
                raise ChaosError(f"the coordinator ended by itself: {self._coordinator.returncode}")
            self._recovery.look()
            self._wake(now)
            while waiting and waiting[-1].at <= now - began:
                self._do(waiting.pop())
            if now >= tell_at:
                tell_at = now + TELL_EVERY_S
                self._tell(now - began)
            time.sleep(LOOK_S if self._recovery.is_watching else 2 * LOOK_S)

    def _tell(self, elapsed: float) -> None:
        done, sampled = self.figures.done, self._sampled
        say(
            f"{elapsed:5.1f} s: {done['workers killed']} killed, {done['coordinators killed']} coordinators, "
            f"{self.board.total(Column.CHECKOUTS)} checkouts, {self.board.total(Column.FAILED)} failed, "
            f"{sampled.get('clean', 0)} of {sampled.get('views', 0)} views clean, "
            f"{sampled.get('violations', 0)} violations"
        )

    def _do(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                self._kill(fault.worker)
            case "stop":
                if (pid := self._pids.get(fault.worker)) is not None and pid not in self._doomed:
                    self._stop(pid, fault.seconds, "workers stopped")
            case "caps":
                assert fault.caps is not None
                self._caps = fault.caps
                self._write_config()
                if self._serving:
                    _send(self._coordinator.pid, signal.SIGHUP)
                else:
                    self._has_new_config = True
                self.figures.done["caps changed"] += 1
            case "kill coordinator":
                self._coordinator.kill()
                self._coordinator.wait()
                self._start_coordinator()
                self.figures.done["coordinators killed"] += 1
            case "stop coordinator":
                if self._serving:
                    self._stop(self._coordinator.pid, fault.seconds, "coordinators stopped")
            case "terminate backends":
                with contextlib.suppress(Exception):
                    self._cluster.primary.execute(
                        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() "
                        "and application_name ~ 'shmpool:.*:[0-9]+$' order by random() limit 2"
                    )
                self.figures.done["backends terminated"] += 2
            case "restart server":
                self._cluster.standbys[0].restart("immediate")
                self.figures.done["servers restarted"] += 1

    def _kill(self, place: int) -> None:
        pid = self._pids.get(place)
        if pid is None or pid in self._doomed:
            return
        self._doomed.add(pid)
        sleeping = self.board.sleeping(place)
        _send(pid, signal.SIGKILL)
        self._recovery.killed(pid, sleeping)
        self.figures.done["workers killed"] += 1

    def _stop(self, pid: int, seconds: float, what: str) -> None:
        _send(pid, signal.SIGSTOP)
        self._waking.append((monotonic() + seconds, pid))
        self.figures.done[what] += 1

    def _wake(self, now: float) -> None:
        for entry in [entry for entry in self._waking if entry[0] <= now]:
            self._waking.remove(entry)
            _send(entry[1], signal.SIGCONT)
            if entry[1] == self._coordinator.pid:
                self._recovery.coordinator_since = monotonic()

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let everybody end in order, and count."""
        self._is_ending = True
        say("the faults are over, workers end")
        self._wait(self._look_for_coordinator, START_S, "a coordinator serves")
        self._end_workers()
        deadline = monotonic() + END_S
        while (left := self._unaccounted()) and monotonic() < deadline:
            self._pass_time()
        self.figures.unaccounted = left
        if left:
            say("not everything is accounted for")
        while self._recovery.is_watching and monotonic() < deadline:
            self._pass_time()
        self._end_sampler()
        self._collect()
        self._coordinator.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._coordinator.wait(END_S)
        if self._coordinator.returncode != 0:
            self.figures.trouble.append(f"the coordinator ended with code {self._coordinator.returncode}")
        self.figures.unaccounted += [f"{path} is left" for path in self.names.leftovers()]

    def _pass_time(self) -> None:
        self.signals.check()
        self._hear()
        self._recovery.look()
        time.sleep(10 * LOOK_S)

    def _wait(self, condition: Callable[[], object], within: float, what: str) -> None:
        deadline = monotonic() + within
        while not condition():
            self.signals.check()
            if monotonic() >= deadline:
                raise ChaosError(f"expected that {what} within {within:g} s; {_tail(self._coordinator_log)}")
            time.sleep(10 * LOOK_S)

    def _end_workers(self) -> None:
        deadline = monotonic() + END_S
        time.sleep(0.1)  # those that are being forked
        self._hear()
        for pid in self._pids.values():
            _send(pid, signal.SIGTERM)
        while self._pids and monotonic() < deadline:
            self._pass_time()
        for place, pid in self._pids.items():
            self.figures.trouble.append(f"worker {place} pid {pid} did not end in {END_S:g} s")
            _send(pid, signal.SIGUSR1)
        if self._pids:
            time.sleep(0.5)
            say(_tail(self._log, 80))
            for pid in self._pids.values():
                self._doomed.add(pid)
                _send(pid, signal.SIGKILL)
            while self._pids:
                self._pass_time()

    def _end_sampler(self) -> None:
        assert self._sampler.stdin is not None
        self._sampler.stdin.close()
        self._sampler.wait(END_S)
        self._hear()
        if self._sampler.returncode != 0 or not self._sampled:
            self.figures.trouble.append(f"the sampler ended with code {self._sampler.returncode}")

    def _unaccounted(self) -> list[str]:
        """Return what is not as it must be when nobody uses the pool."""
        report = observe(self.names)
        found = [str(violation) for violation in report.violations]
        if not report.is_judged:
            return ["no clean view"]
        found += [
            f"group {g.name}: free {g.free}, issued {g.issued}, target {g.target}"
            for g in report.groups
            if not g.free == g.issued == g.target == self._caps.groups[g.name]
        ]
        found += [
            f"endpoint {e.name}: free {e.free}, issued {e.issued}, cap {self._caps.endpoints[e.name]}"
            for e in report.endpoints
            if not e.free == e.issued == self._caps.endpoints[e.name]
        ]
        return found

    def _collect(self) -> None:
        """Put all that was counted into the figures."""
        figures, board, sampled = self.figures, self.board, self._sampled
        seen = figures.seen
        for column in (Column.CHECKOUTS, Column.RAISED, Column.DROPPED, Column.FORKED, Column.FORKS_STUCK):
            seen[f"{column.name.lower().replace('_', ' ')}"] = board.total(column)
        for name in ("views", "clean", "samples", "servers away"):
            seen[name] = sampled.get(name, 0)
        for name, most in Caps.most().endpoints.items():
            seen[f"most sessions at {name} (cap at most {most})"] = sampled.get(f"most {name}", 0)
            seen[f"samples with {name} at its cap"] = sampled.get(f"full {name}", 0)
        for counter in ("audits", "lost_found", "out_of_bounds"):
            seen[counter.replace("_", " ")] = self._sum(counter)
        figures.times = self._recovery.times()
        if sampled.get("violations"):
            figures.violations = sampled["found"] or ["violations"]
        if self._sum("out_of_bounds"):
            figures.violations.append(f"{self._sum('out_of_bounds')} audits found numbers out of bounds")
        workers = self._log.read_text() if self._log.exists() else ""
        figures.failed = re.findall(r"^.*checkout of .* failed: .*$", workers, re.MULTILINE)
        if board.total(Column.FAILED) > len(figures.failed):
            figures.failed.append(f"{board.total(Column.FAILED)} counted")
        if not self.scenario.backend_ends and not self.scenario.server_restarts:
            figures.trouble += re.findall(r"^.*in use: .*$", workers, re.MULTILINE)
        figures.trouble += self._recovery.overdue
        told = self._coordinator_log.read_text()
        figures.trouble += re.findall(r"^.*(?:CRITICAL|ERROR|Traceback).*$", told, re.MULTILINE)
        figures.trouble += re.findall(r"^(?!.*InterruptedByHandler).*(?:Error|Fatal)\b.*$", _without(workers), re.M)

    def _sum(self, column: str) -> int:
        start, end = self._segment.layout.span(PERMITS)
        return sum(self._segment.words[start + PERMITS.column(column) : end : PERMITS.row_words].tolist())

    def keep_logs(self, directory: Path) -> None:
        """Copy the logs to where they outlive the run."""
        directory.mkdir(parents=True, exist_ok=True)
        for log in (self._log, self._coordinator_log):
            if log.exists():
                (directory / log.name).write_bytes(log.read_bytes())

    def _end_coordinator(self) -> None:
        if self._coordinator.poll() is None:
            _send(self._coordinator.pid, signal.SIGCONT)
            self._coordinator.kill()
            self._coordinator.wait()

    def _remove_names(self) -> None:
        for path in self.names.leftovers():
            path.unlink(missing_ok=True)


def _without(workers: str) -> str:
    """Return the workers' log without what is counted elsewhere."""
    return "\n".join(line for line in workers.splitlines() if not line.startswith("worker "))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End one of our own modules, which ends when its input does; what is left of its group is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _read(pipe: IO[bytes] | None) -> bytes:
    assert pipe is not None
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), 1 << 16)
    return b""


def _tail(log: Path, lines: int = SHOWN) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:]) if log.exists() else "no log"
