"""What a thousand workers cost: an idle coordinator, one audit, one `shmpool status`.

The workers' rows are synthetic: one process owns them all, and holds every permit through real brackets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from shmpool import views
from shmpool.layout import PERMITS, SLOT_WORDS, SLOTS, USE_WORDS
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.rows import NO_SERVER, Locks, Process, _enter
from shmpool.segment import Segment, attach
from shmpool.semaphores import Semaphore
from shmpool.slots import EndpointPermits, GroupPermits, SlotTable, Token
from shmpool.states import Use
from shmpool_coordinator.tally import Tally
from tools.chaos.run import ChaosError
from tools.pg_cluster import Cluster
from tools.stage import Signals, say

ROWS: Final = 1000
SLOTS_PER_ROW: Final = 16
SECONDS: Final = 10.0
ROUNDS: Final = 50
STATUS_ROUNDS: Final = 5
CHANGE_EVERY_S: Final = 0.05
START_S: Final = 20.0
MOST: Final = {"share": 0.02, "audit": 0.010, "status": 0.5}  # of a core; seconds

CONFIG: Final = """
name = "{name}"
[limits]
workers = {rows}
slots_per_worker = {slots}
[endpoints.pg1]
conninfo = "{conninfo}"
max_connections = {all}
[groups.all]
connections = {all}
target = "any"
"""


def run(seconds: float, signals: Signals) -> int:
    """Measure and print a table; return 0 if everything is within its bound."""
    names = Names.of(f"scale-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="shmpool-scale-"))
        server = stack.enter_context(Cluster()).primary
        config = Path(directory, "shmpool.toml")
        config.write_text(
            CONFIG.format(
                name=names.pool, rows=ROWS, slots=SLOTS_PER_ROW, all=ROWS * SLOTS_PER_ROW, conninfo=server.conninfo()
            )
        )
        pid = stack.enter_context(_coordinator(names, config))
        _wait(lambda: observe(names).level == 0, signals, "the pool is ready")
        segment = attach(names)
        stack.callback(segment.release)
        say(f"coordinator's share of a core, {seconds:g} s each")
        empty = _share(pid, seconds, signals)
        holder = stack.enter_context(_Holder.of(segment))
        time.sleep(1.0)
        held = _share(pid, seconds, signals)
        changing = _share(pid, seconds, signals, every=holder.change)
        audit, anew = _audits(segment, holder)
        status = _status(names)
    bound = MOST["share"]
    rows = [
        ("coordinator, no worker", f"{empty:.2%}", f"{bound:.0%}", empty <= bound),
        (f"coordinator, {ROWS} rows x {SLOTS_PER_ROW} held", f"{held:.2%}", f"{bound:.0%}", held <= bound),
        (f"the same, one slot changing every {CHANGE_EVERY_S * 1000:.0f} ms", f"{changing:.2%}", "", True),
        ("audit: copy and count, one row changed", f"{audit * 1000:.2f} ms", "10 ms", audit <= MOST["audit"]),
        ("audit: copy and count, all anew", f"{anew * 1000:.2f} ms", "10 ms", anew <= MOST["audit"]),
        ("shmpool status", f"{status:.2f} s", "0.5 s", status <= MOST["status"]),
    ]
    table = Table("what", "found", "at most")
    for what, found, most, is_good in rows:
        table.add_row(what, found, most, style="" if is_good else "bold red")
    Console(highlight=False).print(table)
    return 0 if all(is_good for *_, is_good in rows) else 1


@contextlib.contextmanager
def _coordinator(names: Names, config: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config", str(config), "--log-level", "error"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for path in names.leftovers():
            path.unlink(missing_ok=True)


class _Holder:
    """The owner of every row, and of every permit."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        locks = Locks(segment.names, segment.header("lock_inode"))
        self.table = SlotTable(segment, memoryview(bytearray(8 * (ROWS + 1))).cast("Q"))  # it does not fork
        me = Process.current()
        for number in range(ROWS):
            row = _enter(segment, number, me, NO_SERVER) if locks.try_row(number) else None
            if row is None:
                raise ChaosError(f"worker row {number} is not free")
            self.table.add_row(row)
        self._locks = locks
        self.semaphores = [self._semaphore(kind) for kind in "gbwe"]
        group, bell, endpoint_bell, endpoint = self.semaphores
        self._group = GroupPermits(segment, 0, group, bell, endpoint_bell)
        self._endpoint = EndpointPermits(segment, 0, endpoint, [endpoint_bell])
        self._tokens = [self._claim() for _ in range(ROWS * SLOTS_PER_ROW)]

    @classmethod
    @contextlib.contextmanager
    def of(cls, segment: Segment) -> Iterator[_Holder]:
        """Hold everything for the length of a `with` block."""
        holder = cls(segment)
        try:
            yield holder
        finally:
            for token in holder._tokens:
                holder.table.release(token)
            holder.table.forget()
            for semaphore in holder.semaphores:
                semaphore.close()
            for row in range(ROWS):
                holder._locks.unlock_row(row)

    def _semaphore(self, kind: str) -> Semaphore:
        return Semaphore(self.segment.names.semaphore(self.segment.token, kind, 0))

    def _claim(self) -> Token:
        token = self.table.take(self._group)
        if not self.table.claim_once(token, self._group, [self._endpoint]):
            raise ChaosError("a permit is missing")
        self.segment.words[self.segment.layout.at(SLOTS, token.number, "backend_pid")] = 1
        self.segment.words[self.segment.layout.at(USE_WORDS, token.number)] = Use.IDLE
        return token

    def change(self) -> None:
        """Give one pair of permits back and take one."""
        self.table.release(self._tokens.pop())
        self._tokens.append(self._claim())


def _share(pid: int, seconds: float, signals: Signals, every: Callable[[], None] = lambda: None) -> float:
    """Return a process's share of a core, while something is done every CHANGE_EVERY_S."""
    before, began = _cpu(pid), time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        signals.check()
        every()
        time.sleep(CHANGE_EVERY_S)
    return (_cpu(pid) - before) / elapsed


def _cpu(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    nanoseconds = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            nanoseconds += int(schedstat.read_text().split()[0])
    return nanoseconds / 1e9


def _audits(segment: Segment, holder: _Holder) -> tuple[float, float]:
    """Return the median times of a copy and its count: with little changed since the last, and all anew."""
    inodes = [segment.words[segment.layout.at(PERMITS, n, "semaphore_inode")] for n in range(segment.layout.semaphores)]
    group, _, _, endpoint = holder.semaphores
    known = {0: group, segment.layout.groups: endpoint}

    def values() -> list[int | None]:
        return [known[n].value if inode else None for n, inode in enumerate(inodes)]

    start, end = segment.layout.span(SLOT_WORDS)

    def timed(tally: Tally) -> float:
        began = time.perf_counter()
        tally.update(views.snap(segment, values).raw)
        return time.perf_counter() - began

    kept = Tally(end - start, segment.layout.groups)
    timed(kept)
    changed, anew = [], []
    for _ in range(ROUNDS):
        holder.change()
        changed.append(timed(kept))
        anew.append(timed(Tally(end - start, segment.layout.groups)))
    return statistics.median(changed), statistics.median(anew)


def _status(names: Names) -> float:
    """Return the median time of the command, from start to end."""
    command, found = [sys.executable, "-m", "shmpool.cli", "status", names.pool], []
    for _ in range(STATUS_ROUNDS):
        began = time.perf_counter()
        told = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        found.append(time.perf_counter() - began)
        if names.pool.encode() not in told.stdout:
            raise ChaosError(f"shmpool status: exit code {told.returncode}")
    return statistics.median(found)


def _wait(condition: Callable[[], bool], signals: Signals, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        signals.check()
        if time.monotonic() > deadline:
            raise ChaosError(f"expected that {what} within {START_S:g} s")
        time.sleep(0.05)
