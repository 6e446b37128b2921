"""A pool's segment, lock file and semaphores without a coordinator, and views made by hand."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from shmpool import semaphores
from shmpool.clock import monotonic
from shmpool.layout import ENDPOINTS, GROUPS, HEADER, PERMITS, SLOTS, WORKERS, Layout
from shmpool.names import Names
from shmpool.rows import Locks, create_lock_file, take_row
from shmpool.segment import Segment, create, private_page
from shmpool.semaphores import Semaphore
from shmpool.settings import Credentials, EndpointSettings, GroupSettings, PoolSettings
from shmpool.slots import EndpointPermits, GroupPermits, Outcome, SlotTable, Token
from shmpool.states import Admin, Health, Role, SegmentState, Use, Verdict
from shmpool.views import PermitRow, PoolView, SlotRow, WorkerRow
from shmpool.words import Control, Kind, SlotWord, Status, UseWord

SHAPE = Layout(workers=3, slots_per_worker=4, endpoints=2, groups=2)
CONNINFO = "host=192.0.2.1 user=somebody"  # must not show up in any report
CAP = 3  # of the one group and the one endpoint


def unique_names() -> Names:
    """Return the names of a pool that nobody else uses."""
    return Names.of(f"test-{os.getpid()}-{secrets.token_hex(4)}")


def remove_all(names: Names) -> None:
    """Remove whatever a pool left in /dev/shm."""
    for path in names.leftovers():
        path.unlink(missing_ok=True)


def endpoint_settings(index: int = 0, name: str = "pg1") -> EndpointSettings:
    """Return an endpoint's settings."""
    return EndpointSettings(
        index=index,
        name=name,
        conninfo=CONNINFO,
        max_connections=CAP,
        weight=1,
        backup=False,
        address="instance",
        via="direct",
        credentials=Credentials(password_file="", password_command=(), password_env=""),
    )


def group_settings(index: int = 0, name: str = "read") -> GroupSettings:
    """Return a group's settings."""
    return GroupSettings(
        index=index,
        name=name,
        connections=CAP,
        target="any",
        endpoints=(),
        conninfo="",
        policy="least-connections",
        max_lag_bytes=None,
        max_lag_s=None,
        fallback_connections=0,
        autocommit=True,
        isolation_level="default",
        readonly=False,
        reset="none",
        per_worker_min=0,
        per_worker_max=8,
        timeout=5.0,
        max_waiting=0,
        reserve=0,
        max_lifetime=3600.0,
        max_idle=600.0,
        ping_after=30.0,
        leak_after=None,
        query_timeout=None,
        statement_timeout=None,
        lock_timeout=None,
        idle_in_transaction_session_timeout=None,
        settings={"search_path": "app"},
        application_name="",
    )


def pool_settings(name: str = "test") -> PoolSettings:
    """Return the settings of a pool with one endpoint and one group."""
    return PoolSettings(
        name=name,
        config_file="/etc/shmpool/test.toml",
        autostart=True,
        stale_after=5.0,
        endpoints=(endpoint_settings(),),
        groups=(group_settings(),),
    )


@dataclass
class OfflinePool:
    """One endpoint `pg1`, one group `read`, CAP permits each; nobody coordinates it."""

    names: Names
    segment: Segment
    opened: dict[str, Semaphore] = field(default_factory=dict)

    def permits(self) -> tuple[GroupPermits, EndpointPermits]:
        """Return the two semaphores as brackets use them."""
        group = GroupPermits(self.segment, 0, self.opened["g"], self.opened["b"], self.opened["w"])
        return group, EndpointPermits(self.segment, 0, self.opened["e"], [self.opened["w"]])

    def attach_worker(self) -> SlotTable:
        """Make this process a worker: take a row."""
        table = SlotTable(self.segment, private_page())
        locks = Locks(self.names, self.segment.header("lock_inode"))
        table.add_row(take_row(self.segment, locks))
        return table

    def open_connection(self, table: SlotTable, use: Use = Use.ACTIVE) -> Token:
        """Claim a permit pair and note a connection, as the pool does."""
        group, endpoint = self.permits()
        token = table.take(group)
        assert table.claim(token, group, [endpoint]) is Outcome.GRANTED
        self.segment.words[token.detail_at + SLOTS.column("backend_pid")] = 4242
        self.segment.words[token.use_at] = UseWord(use, 0).word()
        return token

    def beat(self) -> None:
        """Store a heartbeat in the coordinator's place, and name this process as the coordinator."""
        self.segment.times[self.segment.layout.at(HEADER, 0, "heartbeat")] = monotonic()


@contextmanager
def offline_pool(names: Names | None = None) -> Iterator[OfflinePool]:
    """Make a pool by hand and remove it again."""
    names = names or unique_names()
    segment = create(names, SHAPE)
    pool = OfflinePool(names, segment)
    try:
        segment.set_header("lock_inode", create_lock_file(names))
        for kind in "gebw":
            name = names.semaphore(segment.token, kind, 0)
            pool.opened[kind] = semaphores.create(name, mode=0o600)
        for row, kind in ((0, "g"), (SHAPE.groups, "e")):
            for _ in range(CAP):
                pool.opened[kind].release()
            _store(segment, PERMITS, row, "control", Control(CAP, CAP, 0).word())
            _store(segment, PERMITS, row, "last_target", CAP)
            _store(segment, PERMITS, row, "semaphore_inode", _inode(pool, kind))
        _store(segment, GROUPS, 0, "in_use", 1)
        _store(segment, GROUPS, 0, "bell_inode", _inode(pool, "b"))
        _store(segment, GROUPS, 0, "endpoint_bell_inode", _inode(pool, "w"))
        _store(segment, ENDPOINTS, 0, "status", healthy().word())
        segment.publish(pool_settings(names.pool))
        segment.set_header("state", SegmentState.OPEN)
        yield pool
    finally:
        for semaphore in pool.opened.values():
            semaphore.close()
        segment.release()
        remove_all(names)


def _inode(pool: OfflinePool, kind: str) -> int:
    return semaphores.inode_of(pool.names.semaphore(pool.segment.token, kind, 0))


def _store(segment: Segment, table: Any, row: int, column: str, value: int) -> None:
    segment.words[segment.layout.at(table, row, column)] = value


def healthy(**changes: Any) -> Status:
    """Return the status of an endpoint without a fault."""
    return Status(7, 1, Verdict.OK, Admin.READY, Admin.READY, Role.PRIMARY, Health.UP)._replace(**changes)


def zeros(table: Any, **values: Any) -> dict[str, Any]:
    """Return a row of zeros with some values."""
    return {column.name: 0 for column in table.columns} | values


def permit_row(kind: Kind, index: int = 0, **changes: Any) -> PermitRow:
    """Return a permit row at rest with CAP permits."""
    values: dict[str, Any] = {
        "kind": kind,
        "index": index,
        "value": CAP,
        "control": Control(CAP, CAP, 0),
        "certain": 0,
        "unknown_live": 0,
        "unknown_orphan": 0,
        "last_target": CAP,
        "audits": 0,
        "lost_found": 0,
        "out_of_bounds": 0,
    }
    return PermitRow(**values | changes)


def slot_row(number: int = 0, word: str = "", use: Use = Use.FREE, **changes: Any) -> SlotRow:
    """Return a slot of group 0 and endpoint 0; `word` is two of `-?y`, and `o` for an orphan."""
    fields = ["-?y".index(sign) for sign in (word + "--")[:2].replace("o", "-")]
    waits_for_endpoint = changes.pop("waits_for_endpoint", False)
    is_recalled = changes.pop("is_recalled", False)
    return SlotRow(
        number,
        SlotWord(1, 0, fields[0], 0, fields[1], "o" in word),
        UseWord(use, 0, waits_for_endpoint),
        zeros(SLOTS, **{"backend_pid": 99, "since": 90.0, "opened_at": 50.0} | changes),
        is_recalled,
    )


def worker_row(*slots: SlotRow, number: int = 0, is_held: bool | None = True) -> WorkerRow:
    """Return a worker row of pid 77."""
    return WorkerRow(number, zeros(WORKERS, pid=77, generation=1, attached_at=10.0), is_held, slots)


def view(**changes: Any) -> PoolView:
    """Return a view without a fault, taken at 100 s."""
    values: dict[str, Any] = {
        "name": "test",
        "taken_at": 100.0,
        "taken_wall": 1_700_000_000.0,
        "state": SegmentState.OPEN,
        "header": zeros(HEADER, heartbeat=99.5, config_generation=1),
        "settings": pool_settings(),
        "is_clean": True,
        "permits": (permit_row(Kind.GROUP), permit_row(Kind.ENDPOINT)),
        "endpoints": {0: zeros(ENDPOINTS, status=healthy(), since=40.0, probed_at=99.0, latency=0.002)},
        "groups": {0: zeros(GROUPS, in_use=1)},
        "workers": (),
    }
    return PoolView(**values | changes)
