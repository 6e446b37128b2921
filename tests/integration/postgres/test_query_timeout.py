"""`query_timeout`: what a frozen server cannot do to a thread, and what is never cut.

What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection as plain_connection
from psycopg2.extras import DictConnection, NamedTupleCursor, RealDictCursor

from shmpool import Connection, Handle, Pool, QueryTimeout, TransactionOutcomeUnknown, attachment
from shmpool.bounded import BoundedConnection, BoundedCursor
from shmpool.names import Names
from shmpool.observation import observe
from shmpool.status import GroupReport
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.postgres import frozen
from tests.support.waiting import wait_until
from tests.support.workers import (
    PROBE,
    backend,
    in_child,
    is_ready,
    is_whole,
    lease_of,
    one_value,
    pool_of,
)
from tools.pg_cluster import Cluster, Server

SECONDS = 0.4
SLACK_S = 0.2
CAP = 8
KEYS = f'connections = {CAP}\ntarget = "primary"\nper_worker_max = {CAP}\nquery_timeout = "{SECONDS}s"\n'
GROUPS = {
    "auto": f"{KEYS}autocommit = true",
    "tx": KEYS,
    "free": 'connections = 2\ntarget = "primary"\nautocommit = true',
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that nobody else uses, to be frozen."""
    with Cluster() as cluster:
        cluster.primary.execute("CREATE TABLE lines (line text)")
        yield cluster.primary


@pytest.fixture(scope="module")
def coordinator(server: Server) -> Iterator[CoordinatorProcess]:
    """A coordinator of groups with the setting and without."""
    name = f"q{os.getpid()}"
    endpoints = {"pg1": endpoint_keys(server.conninfo())}
    with running_coordinator(pool_config(name, endpoints, GROUPS, PROBE), name) as process:
        yield process


@pytest.fixture
def name(coordinator: CoordinatorProcess) -> str:
    """The pool's name, once its server is well again after the test before."""
    wait_until(lambda: is_ready(coordinator.names.pool), within=10, what=lambda: coordinator.log)
    return coordinator.names.pool


@pytest.fixture
def pool(name: str) -> Iterator[Pool]:
    """A pool of this process; every permit is back afterwards."""
    with pool_of(name) as pool:
        yield pool


def group(pool: str) -> GroupReport:
    """Return how the group `auto` is."""
    return next(group for group in observe(Names.of(pool)).groups if group.name == "auto")


def execute(conn: Handle, sql: str = "SELECT 1") -> None:
    """Run a query."""
    with conn.cursor() as cur:
        cur.execute(sql)


def test_every_thread_is_freed_and_every_permit_comes_back(pool: Pool, server: Server) -> None:
    """Frozen server: each of several threads is freed within query_timeout + 0.2 s.

    The group's permits are back while it is still frozen, the endpoint's once its sessions there are gone.
    """
    handles = [pool.checkout("auto") for _ in range(CAP)]
    taken: list[float] = []
    errors: list[BaseException] = []

    def use(handle: Handle) -> None:
        began = time.monotonic()
        try:
            execute(handle)
        except psycopg2.OperationalError as error:
            taken.append(time.monotonic() - began)
            errors.append(error)
        pool.checkin(handle)

    with frozen(server):
        threads = [threading.Thread(target=use, args=(handle,)) for handle in handles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(taken) == CAP
        assert SECONDS <= min(taken) <= max(taken) < SECONDS + SLACK_S, taken
        assert {type(error) for error in errors} == {QueryTimeout}
        assert "no answer within query_timeout, 0.4 s" in str(errors[0])
        wait_until(lambda: group(pool.name).free == CAP, what=lambda: f"{group(pool.name)}")
        (endpoint,) = observe(Names.of(pool.name)).endpoints
        assert endpoint.free == endpoint.issued - CAP, "its sessions live on"
    resumed = time.monotonic()
    wait_until(lambda: is_whole(pool.name), within=10)
    print(
        f"\n{CAP} threads on a frozen server, query_timeout {SECONDS:g} s: freed after {min(taken):.3f} to "
        f"{max(taken):.3f} s; every permit back {time.monotonic() - resumed:.3f} s after it woke up"
    )
    with pool.connection("auto") as conn:
        assert one_value(conn, "SELECT 1") == 1


def fetch_named(conn: Handle) -> Callable[[], Any]:
    """Fetch from a server-side cursor."""
    cur = conn.cursor("named")
    cur.execute("SELECT generate_series(1, 10)")
    return cur.fetchall


def iterate_named(conn: Handle) -> Callable[[], Any]:
    """Iterate over a server-side cursor whose rows are named tuples."""
    cur = conn.cursor("named", cursor_factory=NamedTupleCursor)
    cur.execute("SELECT generate_series(1, 10) AS number")
    return lambda: list(cur)


def commit(conn: Handle) -> Callable[[], Any]:
    """Commit."""
    execute(conn)
    return lambda: conn.commit()


def leave_block(conn: Handle) -> Callable[[], Any]:
    """Leave a transaction block."""
    conn.__enter__()
    execute(conn)
    return lambda: conn.__exit__(None, None, None)


def execute_many(conn: Handle) -> Callable[[], Any]:
    """Run a query several times."""
    return lambda: conn.cursor().executemany("SELECT %s", [(1,), (2,)])


def copy_out(conn: Handle) -> Callable[[], Any]:
    """Copy from the server."""
    return lambda: conn.cursor().copy_to(io.StringIO(), "lines")


def copy_in(conn: Handle) -> Callable[[], Any]:
    """Copy to the server."""
    return lambda: conn.cursor().copy_expert("COPY lines FROM STDIN", io.BytesIO(b"a\nb\n"))


def set_property(conn: Handle) -> Callable[[], Any]:
    """Set what psycopg2 asks the server for."""
    return lambda: conn.set_client_encoding("latin1")


WAYS = [fetch_named, iterate_named, commit, leave_block, execute_many, copy_out, copy_in, set_property]


def test_every_way_to_wait_is_bounded(pool: Pool, server: Server) -> None:
    """Whatever waits for a frozen server is freed in time, and the checkin does not wait.

    The error is the same for all, but a commit says that its outcome is unknown.
    """
    handles = [pool.checkout("tx") for _ in WAYS]
    waits = [way(handle) for way, handle in zip(WAYS, handles, strict=True)]
    seen: dict[str, tuple[type, bool, bool]] = {}

    def use(name: str, wait: Callable[[], Any], handle: Handle) -> None:
        error: type = type(None)
        began = time.monotonic()
        try:
            wait()
        except psycopg2.Error as raised:
            error = type(raised)
        freed = time.monotonic()
        pool.checkin(handle)
        seen[name] = (error, SECONDS <= freed - began < SECONDS + SLACK_S, time.monotonic() - freed < SLACK_S)

    with frozen(server):
        threads = [
            threading.Thread(target=use, args=(way.__name__, wait, handle))
            for way, wait, handle in zip(WAYS, waits, handles, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        ending = (commit, leave_block)
        told = {way: TransactionOutcomeUnknown if way in ending else QueryTimeout for way in WAYS}
        assert seen == {way.__name__: (told[way], True, True) for way in WAYS}


def test_cut_commit_names_its_reason(pool: Pool, server: Server) -> None:
    """Nobody knows what becomes of a commit that was cut; why it was, and the driver's error, are in the chain."""
    handle = pool.checkout("tx")
    execute(handle)
    with frozen(server), pytest.raises(TransactionOutcomeUnknown, match="no answer within query_timeout") as caught:
        handle.commit()
    pool.checkin(handle)
    assert isinstance(caught.value.__cause__, QueryTimeout)
    assert type(caught.value.__cause__.__cause__) is psycopg2.OperationalError


def test_checkin_on_a_frozen_server_is_bounded(pool: Pool, server: Server) -> None:
    """The rollback of a checkin is cut as well, and the permit follows the session."""
    handle = pool.checkout("tx")
    execute(handle)
    with frozen(server):
        began = time.monotonic()
        pool.checkin(handle)
        assert SECONDS <= time.monotonic() - began < SECONDS + SLACK_S


def test_short_queries_are_never_cut(pool: Pool) -> None:
    """Many queries one after another, together far longer than query_timeout: one connection serves them all."""
    end = time.monotonic() + 4 * SECONDS
    with pool.connection("auto") as conn:
        pid, count = backend(conn), 0
        while time.monotonic() < end:
            execute(conn, f"SELECT pg_sleep({SECONDS / 60})")
            count += 1
        assert count > 4
        conn.cursor().executemany(f"SELECT %s, pg_sleep({SECONDS / 4})", [(number,) for number in range(8)])
    with pool.connection("auto") as conn:
        assert backend(conn) == pid
        assert one_value(conn, "SELECT 1") == 1


def test_own_time_of_the_application_is_not_bounded(pool: Pool) -> None:
    """An open transaction, a row that is worked on, and arguments that are made slowly may take their time."""

    def arguments() -> Iterator[tuple[int]]:
        for number in range(2):
            yield (number,)
            time.sleep(SECONDS * 1.5)

    with pool.connection("tx") as conn:
        pid = backend(conn)
        cur = conn.cursor("named")
        cur.execute("SELECT generate_series(1, 3)")
        for _ in cur:
            time.sleep(SECONDS / 2)
        conn.cursor().executemany("SELECT %s", arguments())
        assert one_value(conn, "SELECT pg_backend_pid()") == pid


class Slowly(io.BytesIO):
    """A file that takes its time for each piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Give one line."""
        time.sleep(SECONDS * 1.2)
        return self.readline()


@pytest.mark.parametrize("kind", [io.BytesIO, io.StringIO])
def test_copy_that_makes_progress_is_not_cut(pool: Pool, kind: type[Any]) -> None:
    """A COPY from the server, longer than query_timeout in all: each piece comes in time."""
    rows, width = 12, 9000
    query = f"COPY (SELECT repeat('x', {width}), pg_sleep({SECONDS / 4}) FROM generate_series(1, {rows})) TO STDOUT"
    file = kind()
    with pool.connection("auto") as conn:
        began = time.monotonic()
        conn.cursor().copy_expert(query, file)
        assert time.monotonic() - began > 2 * SECONDS
        assert len(file.getvalue()) > rows * width


@pytest.mark.parametrize("text", [True, False], ids=["text", "binary"])
def test_copy_arrives_whole(pool: Pool, *, text: bool) -> None:
    """Both kinds of files, both ways, through every method: what is copied in is what is copied out."""
    told = "snow\nß\n"
    with pool.connection("tx") as conn, conn.cursor() as cur:
        cur.execute("TRUNCATE lines")
        cur.copy_from(io.StringIO(told) if text else io.BytesIO(told.encode()), "lines")
        out: Any = io.StringIO() if text else io.BytesIO()
        cur.copy_to(out, "lines")
        assert out.getvalue() == (told if text else told.encode())
        with pytest.raises(TypeError):
            cur.copy_from(None, "lines")  # type: ignore[arg-type]  # no file
        conn.rollback()


def test_copy_from_a_slow_file_is_not_cut(pool: Pool) -> None:
    """The time that the application's file takes is not the server's."""
    with pool.connection("auto") as conn:
        conn.cursor().copy_expert("COPY lines FROM STDIN", Slowly(b"one\ntwo\n"))
        assert one_value(conn, "SELECT count(*) FROM lines WHERE line IN ('one', 'two')") == 2


def test_slow_query_on_a_well_server_is_cut_too(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """What counts is the answer; the log names pool, group and endpoint."""
    with pool.connection("auto") as conn:
        began = time.monotonic()
        with pytest.raises(QueryTimeout):
            execute(conn, "SELECT pg_sleep(30)")
        assert time.monotonic() - began < SECONDS + SLACK_S
    told = f"pool {pool.name}: group auto, endpoint pg1: no answer within query_timeout, 0.4 s: a connection was cut"
    wait_until(lambda: told in caplog.messages)


class Talking(DictConnection, Connection):
    """An application's own class, with a cursor class of its own."""


def test_classes_of_the_application_stay_what_they_are(name: str) -> None:
    """Connection and cursors are instances of the application's classes, and only groups with the setting pay."""
    with pool_of(name, connection_factory=Talking) as pool:
        with pool.connection("auto") as conn:
            assert isinstance(lease_of(conn).connection, Talking)
            with conn.cursor() as cur:
                cur.execute("SELECT 7 AS seven")
                row: Any = cur.fetchone()
                assert row["seven"] == 7
            with conn.cursor(cursor_factory=RealDictCursor) as cur:
                assert isinstance(cur, BoundedCursor)
                cur.execute("SELECT 7 AS seven")
                row = cur.fetchone()
                assert row == {"seven": 7}
        with pool.connection("free") as conn:
            assert type(lease_of(conn).connection) is Talking
            assert not isinstance(conn.cursor(), BoundedCursor)


def test_without_threads_it_is_said_once(name: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Where no thread could cut anything, the log says that the setting has no effect; queries run as without it."""
    monkeypatch.setattr(attachment, "_has_threads", False)
    with caplog.at_level(logging.WARNING, "shmpool"):
        for _ in range(2):
            with pool_of(name) as pool, pool.connection("auto") as conn:
                assert not isinstance(lease_of(conn).connection, BoundedConnection)
                execute(conn, f"SELECT pg_sleep({SECONDS * 1.2})")
    told = [message for message in caplog.messages if "group auto: query_timeout has no effect" in message]
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 and newer: fork beside threads
def test_fork_leaves_the_parent_s_bound_and_gives_the_child_its_own(pool: Pool, server: Server) -> None:
    """A child cuts its own connections and none of its parent's; the parent's are still bounded."""
    handle = pool.checkout("auto")
    execute(handle)

    def in_the_child() -> str:
        with pool.connection("auto") as conn:
            try:
                execute(conn, "SELECT pg_sleep(30)")
            except QueryTimeout:
                return "cut"
        return "not cut"

    assert in_child(in_the_child) == "cut"
    execute(handle)
    with frozen(server), pytest.raises(QueryTimeout):
        execute(handle)
    pool.checkin(handle)


def test_cut_connection_serves_nobody_else(pool: Pool) -> None:
    """One that was cut after its last query ended goes to no other holder."""
    with pool.connection("auto") as conn:
        pid, cut = backend(conn), lease_of(conn).connection
        assert isinstance(cut, plain_connection)
        cut.is_cut = True
        cut.marks.append(None)
    with pool.connection("auto") as conn:
        assert backend(conn) != pid
