"""The report on a pool, as values: for people, and with stable names for monitors.

Nothing in it comes from a connection string, so no report can carry a secret.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from typing import Any, Final

from shmpool.states import Admin, Health, Role, SegmentState, ServerKind, Use, Verdict

SCHEMA: Final = 1  # of `as_json`; grows when a name goes or changes its meaning


class Level(IntEnum):
    """How well a pool is; also the exit code of `shmpool status`."""

    FINE = 0  # nothing to do
    DEGRADED = 1  # works, but something needs a look
    NOT_RUNNING = 2  # no segment, or no coordinator


class RowState(Enum):
    """Who stands behind a worker row."""

    HELD = "held"  # its owner lives
    FREE = "free"  # nobody, and nothing is held
    DEAD = "dead"  # the owner is gone, permits wait for the reaper
    LOST_LOCK = "lost lock"  # the owner lives, but its record lock is gone
    UNSEEN = "unseen"  # the lock file could not be asked


@dataclass(frozen=True, slots=True)
class LostName:
    """A name that does not lead to what the header means, or to what nobody may open."""

    name: str
    expected: int  # inode
    found: int  # inode; 0: there is no such name
    refusal: str = ""  # what is wrong with its owner or mode


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says, beside the words of the segment."""

    coordinator_pid: int | None  # who holds the coordinator's lock; 0: cannot be seen from here; None: nobody
    lost_names: tuple[LostName, ...] = ()
    alive_without_lock: frozenset[int] = frozenset()  # worker rows


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth a look."""

    level: Level
    code: str  # stable, for monitors
    found: str
    meaning: str
    cure: str

    def __str__(self) -> str:
        return f"{self.found}: {self.meaning}; {self.cure}"


@dataclass(frozen=True, slots=True)
class CoordinatorReport:
    """The coordinator, as the segment and the kernel know it."""

    pid: int | None  # of the lock's holder; 0: cannot be seen; None: not running
    heartbeat_age: float | None  # seconds; None: there never was a heartbeat
    adoptions: int
    ticks: int
    reloads: int
    reaped_rows: int


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint.  Times in seconds; None: unknown."""

    index: int
    name: str
    health: Health
    role: Role
    admin: Admin  # the stricter of the two wishes
    admin_operator: Admin
    admin_configuration: Admin
    verdict: Verdict
    weight: int
    epoch: int
    target: int
    issued: int
    free: int | None  # the semaphore's value; None: it could not be read
    held: int
    unknown: int
    idle: int
    active: int
    latency: float | None
    lag: float | None
    lag_bytes: int
    is_lag_old: bool  # a replica's, as of an earlier moment: its primary is not seen now
    is_superseded: bool  # a primary of a cluster that has one on a newer timeline
    since: float | None  # age of the present state
    probed: float | None  # age of the last probe
    failing: float | None  # age of the first failed probe, of those that failed in a row until now

    @property
    def admin_by(self) -> str:
        """Who wants what `admin` says."""
        wishes = (("operator", self.admin_operator), ("configuration", self.admin_configuration))
        return " and ".join(who for who, wish in wishes if wish is self.admin)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group.  Times in seconds; None: there was nothing to measure."""

    index: int
    name: str
    wants: str  # the kind of endpoint: primary, replica ...
    target: int
    issued: int
    free: int | None
    held: int
    unknown: int
    idle: int
    active: int
    waiting: int
    waiting_for_endpoint: int
    oldest_wait: float | None
    checkouts: int
    waits: int
    mean_wait: float | None
    longest_wait: float | None
    timeouts: int
    refused: int  # checkouts that `max_waiting` did not let wait
    opens: int
    mean_open: float | None
    errors: int
    recalls: int


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot.  Times are ages in seconds."""

    number: int
    word: str
    use: Use
    group: str | None
    endpoint: str | None
    is_held: bool  # a permit is held or in doubt
    is_orphan: bool
    is_recalled: bool
    backend_pid: int
    since: float | None
    opened: float | None
    checkouts: int


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker row and its slots."""

    row: int
    pid: int
    generation: int
    server: ServerKind
    server_pid: int
    server_generation: int
    age: float | None
    state: RowState
    held: int
    idle: int
    active: int
    waiting: int
    orphans: int
    slots: tuple[SlotReport, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `shmpool status` shows."""

    name: str
    level: Level
    findings: tuple[Finding, ...]
    taken_wall: float | None = None
    state: SegmentState | None = None  # None: there is no segment to read
    config_file: str = ""
    config_generation: int = 0
    is_judged: bool = False  # whether the invariants could be checked
    violations: tuple[str, ...] = ()
    coordinator: CoordinatorReport | None = None
    endpoints: tuple[EndpointReport, ...] = ()
    groups: tuple[GroupReport, ...] = ()
    workers: tuple[WorkerReport, ...] = field(default=(), repr=False)


def duration(seconds: float | None) -> str:
    """Write a duration for people: `0.4 ms`, `12 ms`, `3.1 s`, `4.0 m`, `2.5 h`, `3.0 d`; `-` for None."""
    if seconds is None:
        return "-"
    for limit, unit, scale in ((0.01, "ms", 1000), (1, "ms", 1000), (60, "s", 1), (3600, "m", 1 / 60)):
        if seconds < limit:
            digits = 0 if limit == 1 else 1
            return f"{max(seconds, 0.0) * scale:.{digits}f} {unit}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


def as_json(report: Report) -> dict[str, Any]:
    """Return plain values with stable names: enums in lower case, times in seconds, None: unknown."""
    plain = _plain(asdict(report))
    assert isinstance(plain, dict)
    return {"schema": SCHEMA, "exit_code": int(report.level), **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name.lower().replace("_", "-")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
