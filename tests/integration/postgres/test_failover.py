"""Servers that change their roles, or claim the same one: what workers write, where, and how soon.

Worker processes write all the time and note each write; what they noted is judged at the end.  What is measured is
printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import psycopg2
import pytest

from shmpool import NoEligibleEndpoint
from shmpool.control_client import request
from shmpool.names import Names
from shmpool.states import Health, Role, Verdict
from tests.support.endpoints import (
    FAST_S,
    INTER_S,
    JITTER,
    PROBE,
    SLACK_S,
    TIMEOUT_S,
    UP_S,
    WRITE,
    after_probes,
    coordinating,
    endpoint,
    findings,
    seconds_until,
)
from tests.support.waiting import wait_until
from tests.support.workers import one_value, pool_of, read_line, worker
from tools.pg_cluster import Cluster, Server

READ_ONLY: Final = "25006"
EVIDENCE_S: Final = 0.1  # at most one extra probe in this time
WRITES: Final = """
import sys, time
import psycopg2
from shmpool import Pool

pool = Pool(sys.argv[1])
with open(sys.argv[2], "w", buffering=1) as notes:
    print("ready", flush=True)
    while True:
        began = time.monotonic()
        try:
            with pool.connection("write", timeout=0.5) as conn, conn.cursor() as cur:
                cur.execute("INSERT INTO written DEFAULT VALUES RETURNING inet_server_port()")
                told = cur.fetchone()[0]
        except psycopg2.Error as error:
            told = error.pgcode or type(error).__name__
        print(began, time.monotonic(), told, file=notes)
        time.sleep(0.005)
"""


class Note(NamedTuple):
    """One try of a worker: when it began and ended, and to which port it wrote, or its error."""

    began: float
    ended: float
    told: str


class Writers:
    """Worker processes that write all the time."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    @property
    def notes(self) -> list[Note]:
        """What they noted until now, by time."""
        lines = [line.split() for file in self._files for line in file.read_text().splitlines(keepends=True)[:-1]]
        return sorted(Note(float(began), float(ended), told) for began, ended, told in lines)

    def to(self, server: Server) -> list[Note]:
        """Their successful writes to a server."""
        return [note for note in self.notes if note.told == str(server.port)]


@contextmanager
def writers(pool: str, server: Server, directory: Path, count: int = 4) -> Iterator[Writers]:
    """Let workers write; a server has the table for it."""
    server.execute("CREATE TABLE written (at timestamptz DEFAULT clock_timestamp(), alone bool)")
    files = [directory / f"writer{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(worker(WRITES, pool, str(file))) for file in files]
        assert [read_line(process) for process in processes] == ["ready"] * count
        crowd = Writers(files)
        wait_until(lambda: len(crowd.to(server)) > count, within=10)
        yield crowd


def test_promotion_and_return_as_a_standby(pool_name: str, tmp_path: Path) -> None:
    """Promotion: first write within 1 s of the new primary taking writes; the old one, rewound, gets none any more."""
    with Cluster(standbys=1, settings={"wal_log_hints": "on"}) as pair:
        old, new = pair.primary, pair.standbys[0]
        with (
            coordinating(pool_name, {"pg1": old.port, "pg2": new.port}, WRITE) as coordinator,
            writers(pool_name, old, tmp_path) as crowd,
        ):
            asked = time.monotonic()
            new.promote()
            accepts = time.monotonic()
            known_s = seconds_until(
                lambda: endpoint(pool_name, "pg2").role is Role.PRIMARY, JITTER * INTER_S, coordinator
            )
            known = time.monotonic()
            assert endpoint(pool_name, "pg1").verdict is Verdict.ROLE_CONFLICT, "without a probe of its own"
            assert "endpoint-role-conflict" in findings(pool_name)
            seconds_until(lambda: len(crowd.to(new)) > 20, 1, coordinator)
            old.execute("INSERT INTO written (alone) VALUES (true)")
            old.stop()
            old.rewind(new)
            old.start()
            back_s = seconds_until(
                lambda: (
                    (endpoint(pool_name, "pg1").health, endpoint(pool_name, "pg1").role) == (Health.UP, Role.REPLICA)
                ),
                UP_S,
                coordinator,
            )
            returned = time.monotonic()
            assert endpoint(pool_name, "pg1").verdict is Verdict.OK
            assert old.execute("SELECT 1 FROM written WHERE alone") == [], "it was rewound"
            wait_until(lambda: sum(note.began > returned for note in crowd.to(new)) > 20)
        first_s = min(note.ended for note in crowd.to(new)) - accepts
        assert first_s < 1
        assert all(note.ended > asked for note in crowd.to(new)), "nothing is written to a standby"
        assert all(note.began < known for note in crowd.to(old)), "nor to the old primary once the newer is known"
        assert READ_ONLY not in {note.told for note in crowd.notes}
    print(
        f"\npromotion, and the conflict with it, known {known_s:.3f} s and written to {max(first_s, 0):.3f} s after it "
        f"took writes; rewound primary back as a standby after {back_s:.3f} s"
    )


def test_death_and_promotion(pool_name: str, tmp_path: Path) -> None:
    """The primary dies, a standby is promoted: the first write within 1 s of its taking writes, by every worker."""
    with Cluster(standbys=1) as pair:
        old, new = pair.primary, pair.standbys[0]
        with (
            coordinating(pool_name, {"pg1": old.port, "pg2": new.port}, WRITE) as coordinator,
            writers(pool_name, old, tmp_path) as crowd,
        ):
            old.kill()
            seconds_until(lambda: endpoint(pool_name, "pg1").health is Health.DOWN, JITTER * INTER_S, coordinator)
            new.promote()
            accepts = time.monotonic()
            seconds_until(lambda: len(crowd.to(new)) > 20, JITTER * FAST_S, coordinator)
        first_s = min(note.ended for note in crowd.to(new)) - accepts
        assert first_s < 1
        assert READ_ONLY not in {note.told for note in crowd.notes}
    print(f"\nprimary dead, standby promoted: first write {max(first_s, 0):.3f} s after it took writes")


def test_second_primary_on_the_same_timeline(pool_name: str, tmp_path: Path) -> None:
    """A copy started as a primary gets no write and is told within a probe; drained, the first makes room for it."""
    with Cluster(standbys=1) as pair:
        first, copy = pair.primary, pair.standbys[0]
        with (
            coordinating(pool_name, {"pg1": first.port, "pg2": copy.port}, WRITE) as coordinator,
            writers(pool_name, first, tmp_path) as crowd,
        ):
            copy.stop()
            (copy.data / "standby.signal").unlink()
            copy.start()
            told_s = seconds_until(
                lambda: endpoint(pool_name, "pg2").verdict is Verdict.ROLE_CONFLICT, UP_S, coordinator
            )
            assert (endpoint(pool_name, "pg2").health, endpoint(pool_name, "pg2").role) == (Health.UP, Role.PRIMARY)
            assert endpoint(pool_name, "pg1").verdict is Verdict.OK
            assert "endpoint pg2" in findings(pool_name)["endpoint-role-disputed"]
            assert "endpoint pg2: UP, primary, role_conflict (another primary of its cluster" in coordinator.log
            after_probes(coordinator, 2, index=1)  # seen once, a server is a newcomer still
            first.restart()
            back_s = seconds_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.OK, UP_S, coordinator)
            back = time.monotonic()
            wait_until(lambda: sum(note.began > back for note in crowd.to(first)) > 20)
            after_probes(coordinator, 2)
            assert endpoint(pool_name, "pg2").verdict is Verdict.ROLE_CONFLICT
            assert crowd.to(copy) == []
            request(Names.of(pool_name), "admin", endpoint="pg1", admin="drain")
            moved_s = seconds_until(lambda: crowd.to(copy), JITTER * INTER_S, coordinator)
    print(
        f"\nsecond primary on the same timeline: out {told_s:.3f} s after its start, also over a restart of the first "
        f"({back_s:.3f} s); in {moved_s:.3f} s after an administrator drained the first"
    )


def test_two_primaries_that_nobody_knew(pool_name: str) -> None:
    """A coordinator that finds two primaries of one timeline uses neither, and says why, until one is drained."""
    with Cluster(standbys=1) as pair:
        one, other = pair.primary, pair.standbys[0]
        other.stop()
        (other.data / "standby.signal").unlink()
        other.start()
        probe = PROBE.replace(f'"{INTER_S}s"', '"2s"', 1)  # no second look at one before the first at the other
        with (
            coordinating(pool_name, {"pg1": one.port, "pg2": other.port}, WRITE, probe) as coordinator,
            pool_of(pool_name) as pool,
        ):
            assert [endpoint(pool_name, name).verdict for name in ("pg1", "pg2")] == [Verdict.ROLE_CONFLICT] * 2
            with pytest.raises(NoEligibleEndpoint, match="claims to be the primary"):
                pool.checkout("write", timeout=0)
            request(Names.of(pool_name), "admin", endpoint="pg2", admin="drain")
            seconds_until(lambda: endpoint(pool_name, "pg1").verdict is Verdict.OK, JITTER * FAST_S, coordinator)
            with pool.connection("write") as conn:
                assert one_value(conn, "SELECT inet_server_port()") == one.port


def test_independent_writers(primary: Server, cluster: Cluster, pool_name: str) -> None:
    """Two primaries of different systems are two writers: no conflict, both get connections."""
    with coordinating(pool_name, {"pg1": primary.port, "pg2": cluster.primary.port}, WRITE) as coordinator:
        after_probes(coordinator, 2)
        assert [endpoint(pool_name, name).verdict for name in ("pg1", "pg2")] == [Verdict.OK, Verdict.OK]
        with pool_of(pool_name) as pool, pool.connection("write") as one, pool.connection("write") as other:
            ports = {one_value(conn, "SELECT inet_server_port()") for conn in (one, other)}
        assert ports == {primary.port, cluster.primary.port}


def test_demotion_shows_with_the_first_worker_that_writes(pool_name: str) -> None:
    """A server restarts as a standby between two probes: the first worker that wants to write makes the role known."""
    probe = f'[probe]\ninter = "60s"\nfastinter = "60s"\ntimeout = "{TIMEOUT_S}s"'
    with Cluster() as single:
        server = single.primary
        with (
            coordinating(pool_name, {"pg1": server.port}, WRITE, probe) as coordinator,
            pool_of(pool_name) as pool,
        ):
            with pool.connection("write"):
                pass
            server.stop()
            server.put("standby.signal")
            server.start()
            assert endpoint(pool_name, "pg1").role is Role.PRIMARY, "nobody looked yet"
            began = time.monotonic()
            with pytest.raises(psycopg2.OperationalError), pool.connection("write", timeout=0.2) as conn:
                one_value(conn, "SELECT 1")
            wait_until(lambda: endpoint(pool_name, "pg1").role is Role.REPLICA, what=lambda: coordinator.log)
            took = time.monotonic() - began
            assert took < 2 * EVIDENCE_S + SLACK_S
            with pytest.raises(NoEligibleEndpoint, match="is a replica"):
                pool.checkout("write", timeout=0)
    print(f"\ndemoted while probes are a minute apart: role known {took:.3f} s after a worker wanted to write")
