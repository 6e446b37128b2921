"""`Pool.run` on real servers: what is done again, and what never is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import errors
from psycopg2.extensions import ISOLATION_LEVEL_REPEATABLE_READ

from shmpool import ConnectionLost, Handle, Pool, TransactionOutcomeUnknown
from tests.support.losing import end, execute, losing_coordinator
from tests.support.relay import Relay
from tests.support.workers import backend, end_session, is_connected, one_value, pool_of
from tools.pg_cluster import Cluster, Server

SUICIDE = "SELECT pg_terminate_backend(pg_backend_pid())"
TOGETHER_S = 10


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Iterator[Server]:
    """A primary with a table of two counters."""
    cluster.primary.execute("CREATE TABLE counted (name text PRIMARY KEY, number int)")
    yield cluster.primary
    cluster.primary.execute("DROP TABLE counted")


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[Relay]:
    """What stands between the pool and the primary."""
    with Relay(server.port) as relay:
        yield relay


@pytest.fixture(scope="module")
def name(cluster: Cluster, relay: Relay) -> Iterator[str]:
    """The name of a coordinated pool."""
    name = f"r{os.getpid()}"
    with losing_coordinator(name, cluster, relay):
        yield name


@pytest.fixture
def pool(name: str, server: Server) -> Iterator[Pool]:
    """A pool of this process, and counters at 0; every permit is back afterwards."""
    server.execute("DELETE FROM counted; INSERT INTO counted VALUES ('a', 0), ('b', 0)")
    with pool_of(name) as pool:
        yield pool


def counters(server: Server) -> list[int]:
    """Return what was made to last."""
    return [number for (number,) in server.execute("SELECT number FROM counted ORDER BY name")]


def add(conn: Handle, counter: str = "a") -> None:
    """Count once."""
    execute(conn, f"UPDATE counted SET number = number + 1 WHERE name = '{counter}'")


def in_order(*steps: Callable[[Handle], Any]) -> Callable[[Handle], None]:
    """Do one thing after the other."""

    def take(conn: Handle) -> None:
        for step in steps:
            step(conn)

    return take


class Work:
    """A function that counts its calls, and fails in the first so many."""

    def __init__(self, fail: Callable[[Handle], Any], *, times: int = 1, first: Callable[[Handle], Any] = id) -> None:
        self.calls = 0
        self._fail, self._times, self._first = fail, times, first

    def __call__(self, conn: Handle) -> int:
        """Count in the database and return the number of the call."""
        self.calls += 1
        if self.calls <= self._times:
            self._first(conn)
            self._fail(conn)
        add(conn)
        return self.calls


def test_result_is_returned_and_the_work_committed(pool: Pool, server: Server) -> None:
    """One call, its result, its commit, and the connection is back."""

    def work(conn: Handle) -> str:
        add(conn)
        return "done"

    assert pool.run("tx", work) == "done"
    assert counters(server) == [1, 0]
    assert pool.statistics()["tx"]["idle"] == 1
    with pool.connection("auto") as conn:
        after = conn.commit_position()
    assert pool.run("tx", lambda conn: one_value(conn, "SELECT 1"), after=after, timeout=5.0) == 1


@pytest.mark.parametrize("group", ["tx", "auto"])
def test_dead_idle_connection_is_replaced_before_the_call(pool: Pool, server: Server, group: str) -> None:
    """One that died at rest is never given to the function, in autocommit neither, and costs no try."""
    with pool.connection(group) as conn:
        pid = backend(conn)
    end_session(server, pid)
    assert not is_connected(server, pid)
    work = Work(lambda conn: None, times=0)
    assert pool.run(group, work, retries=0) == 1
    assert counters(server) == [1, 0]


def test_lost_before_the_first_statement(pool: Pool, server: Server) -> None:
    """Nothing was sent: done again on another connection, once."""
    work = Work(in_order(lambda conn: end(server, conn), add))
    assert pool.run("tx", work) == 2
    assert counters(server) == [1, 0]


LATER: dict[str, tuple[str, Callable[[Handle], Any], list[int]]] = {
    "in a transaction": ("tx", lambda conn: None, [0, 0]),
    "after a commit": ("tx", in_order(add, lambda conn: conn.commit()), [1, 0]),
    "in autocommit": ("auto", add, [1, 0]),
}


@pytest.mark.parametrize("case", LATER)
def test_lost_later_is_told_and_done_once(pool: Pool, server: Server, case: str) -> None:
    """A function that may have had an effect is not called again."""
    group, first, lasting = LATER[case]
    work = Work(lambda conn: execute(conn, SUICIDE), first=first)
    with pytest.raises(ConnectionLost):
        pool.run(group, work)
    assert work.calls == 1
    assert counters(server) == lasting


def set_autocommit(conn: Handle, value: bool) -> None:
    """Set the property."""
    conn.autocommit = value


COMMITTING = {
    "commit()": in_order(add, lambda conn: conn.commit()),
    "property": in_order(lambda conn: set_autocommit(conn, True), add, lambda conn: set_autocommit(conn, False)),
    "set_session": in_order(
        lambda conn: conn.set_session(autocommit=True), add, lambda conn: conn.set_session(autocommit=False)
    ),
}


@pytest.mark.parametrize("way", COMMITTING)
def test_lost_before_a_statement_but_after_a_commit(pool: Pool, server: Server, way: str) -> None:
    """What was made to last before stays: not called again, though the last transaction had not begun."""
    work = Work(in_order(lambda conn: end(server, conn), add), first=COMMITTING[way])
    with pytest.raises(ConnectionLost) as caught:
        pool.run("tx", work)
    assert not caught.value.was_sent
    assert (work.calls, counters(server)) == (1, [1, 0])


def test_lost_commit_is_never_repeated(pool: Pool, server: Server, relay: Relay) -> None:
    """The commit took effect, and the function ran once."""
    work = Work(lambda conn: None, times=0)
    relay.lose_answer_to(b"COMMIT")
    with pytest.raises(TransactionOutcomeUnknown):
        pool.run("tx", work)
    assert (work.calls, counters(server)) == (1, [1, 0])


def both(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Do two things at once, and let neither fail silently."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  told below
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_serialization_failure(pool: Pool, server: Server) -> None:
    """Two transactions that read the same and write it: the loser begins anew, and nothing is lost."""
    meeting = threading.Barrier(2, timeout=TOGETHER_S)
    calls: list[int] = []

    def work(conn: Handle) -> None:
        calls.append(backend(conn))
        conn.set_session(isolation_level=ISOLATION_LEVEL_REPEATABLE_READ)
        number = one_value(conn, "SELECT number FROM counted WHERE name = 'a'")
        if len(calls) <= 2:
            meeting.wait()
        execute(conn, f"UPDATE counted SET number = {number + 1} WHERE name = 'a'")

    both(lambda: pool.run("tx", work), lambda: pool.run("tx", work))
    assert len(calls) == 3
    assert counters(server) == [2, 0]


def test_deadlock(pool: Pool, server: Server) -> None:
    """Two transactions that wait for each other: the server ends one, which begins anew."""
    meeting = threading.Barrier(2, timeout=TOGETHER_S)
    calls: list[str] = []

    def work(conn: Handle, first: str, second: str) -> None:
        calls.append(first)
        add(conn, first)
        if len(calls) <= 2:
            meeting.wait()
        add(conn, second)

    both(
        lambda: pool.run("tx", lambda conn: work(conn, "a", "b")),
        lambda: pool.run("tx", lambda conn: work(conn, "b", "a")),
    )
    assert len(calls) == 3
    assert counters(server) == [2, 2]


def clash(conn: Handle) -> None:
    """Have the server raise a serialization failure."""
    execute(conn, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")


@pytest.mark.parametrize(
    "first",
    [in_order(add, lambda conn: conn.commit()), in_order(add, lambda conn: execute(conn, "COMMIT"))],
    ids=["commit()", "COMMIT"],
)
def test_failure_after_a_commit_of_its_own(pool: Pool, server: Server, first: Callable[[Handle], Any]) -> None:
    """The server rolled back the last transaction, not what the function had committed before: called once."""
    work = Work(clash, first=first)
    with pytest.raises(errors.SerializationFailure):
        pool.run("tx", work)
    assert (work.calls, counters(server)) == (1, [1, 0])


def test_autocommit_is_not_repeated(pool: Pool, server: Server) -> None:
    """With autocommit the statements before the failure stand: called once."""
    work = Work(clash, first=add)
    with pytest.raises(errors.SerializationFailure):
        pool.run("auto", work)
    assert (work.calls, counters(server)) == (1, [1, 0])


@pytest.mark.parametrize("group", ["reading", "replica"])
def test_read_only_groups_repeat_after_every_loss(pool: Pool, group: str) -> None:
    """What only reads may be done again, whatever had been sent."""
    calls: list[int] = []

    def work(conn: Handle) -> int:
        calls.append(backend(conn))
        if len(calls) == 1:
            execute(conn, SUICIDE)
        return int(one_value(conn, "SELECT 41 + 1"))

    assert pool.run(group, work) == 42
    assert len(set(calls)) == 2


def test_read_only_commit_is_repeated(pool: Pool, relay: Relay) -> None:
    """A lost end of a transaction that could only read."""
    calls: list[int] = []

    def work(conn: Handle) -> None:
        calls.append(one_value(conn, "SELECT 1"))

    relay.lose_answer_to(b"COMMIT")
    pool.run("reading", work)
    assert len(calls) == 2


def test_lifted_restriction_counts_as_writing(pool: Pool, server: Server) -> None:
    """A function that makes its session writable is not called again."""
    work = Work(lambda conn: execute(conn, SUICIDE), first=lambda conn: conn.set_session(readonly=False))
    with pytest.raises(ConnectionLost):
        pool.run("reading", work)
    assert (work.calls, counters(server)) == (1, [0, 0])


def test_exceptions_of_the_function_pass_untouched(pool: Pool, server: Server) -> None:
    """Its own, also of a class that would be repeated, and those of another connection: one call, the same object."""
    own = [ValueError("mine"), errors.SerializationFailure("mine"), ConnectionLost("pg1", OSError("mine"))]
    for error in own:

        def fail(conn: Handle, error: Exception = error) -> None:
            raise error

        work = Work(fail, first=add)
        with pytest.raises(type(error)) as caught:
            pool.run("tx", work)
        assert caught.value is error
        assert caught.value.__cause__ is None
        assert work.calls == 1

    def elsewhere(conn: Handle) -> None:
        with pool.connection("tx") as other:
            end(server, other)
            add(other)

    work = Work(elsewhere)
    with pytest.raises(ConnectionLost):
        pool.run("tx", work)
    assert (work.calls, counters(server)) == (1, [0, 0])


def test_tries_are_counted(pool: Pool, server: Server) -> None:
    """So many retries and no more, then the last error; none if none are wanted."""
    for retries in (0, 3):
        work = Work(clash, times=100, first=add)
        with pytest.raises(errors.SerializationFailure):
            pool.run("tx", work, retries=retries)
        assert work.calls == 1 + retries
    assert counters(server) == [0, 0]


def test_no_try_begins_after_the_timeout(pool: Pool, server: Server) -> None:
    """However many retries are left."""
    work = Work(clash, times=1_000_000)
    began = time.monotonic()
    with pytest.raises(psycopg2.errors.SerializationFailure):
        pool.run("tx", work, retries=1_000_000, timeout=0.3)
    assert time.monotonic() - began < 2
    assert work.calls > 1
