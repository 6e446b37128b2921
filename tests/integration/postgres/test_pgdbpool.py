"""pgdbpool's interface against real servers: what its users rely on, and none of its defects."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from shmpool import pgdbpool as dbpool
from tests.support.twins import SECOND_HOST, Twins
from tests.support.twins import at_work as at_work
from tests.support.twins import twins as twins
from tests.support.waiting import wait_until
from tests.support.workers import in_child
from tools.pg_cluster import HOST, Server


def entry(host: str = HOST, **keys: Any) -> dict[str, Any]:
    """Return an entry of `db`."""
    return {"host": host, "name": "postgres", "user": "postgres", "pass": "unused"} | keys


def start(*entries: dict[str, Any], kind: str = "threaded", **keys: Any) -> None:
    """Initialize with a group "auto" and a group "tx" of two connections each; `keys` are both groups'."""
    group = {"connection_count": 2, "timeout": 10} | keys
    groups = {"auto": group | {"autocommit": True}, "tx": group}
    dbpool.Connection.init({"type": kind, "db": list(entries) or entry(), "groups": groups})


def value(db: dbpool.Handler, sql: str) -> Any:
    """Run a query and return its one value."""
    return db.query(sql).fetchone()[0]


def backend(db: dbpool.Handler) -> int:
    """Return the server process of a handler, without asking it."""
    return int(db.conn_ref.get_backend_pid())


def logged(server: Server) -> list[str]:
    """Return the statements that a server has logged so far."""
    text = (server.root / f"{server.name}.log").read_text()
    return [line.partition("statement: ")[2] for line in text.splitlines() if "statement: " in line]


def rows(twins: Twins) -> int:
    """Return how many items are committed."""
    return int(twins.ask(HOST, "SELECT count(*) FROM items"))


@pytest.mark.parametrize("kind", ["threaded", "non-threaded"])
def test_server_sees_the_statements_and_nothing_else(at_work: Twins, kind: str) -> None:
    """Connecting costs one statement, using a connection none but the user's own: no ping, and no empty commit."""
    before = len(logged(at_work.first))
    start(kind=kind, connection_count=1)
    for group in ("auto", "tx") * 2:
        with dbpool.Handler(group) as db:
            db.query("SELECT 'one'")
            db.query("SELECT %s", ("two",))
    with dbpool.Handler("tx"):
        pass
    seen = logged(at_work.first)[before:]
    settings = "SET statement_timeout = 5000; SET temp_buffers = '128MB'"
    used = ["SELECT 'one'", "SELECT 'two'"]
    assert seen == [settings] * 2 + [*used, "BEGIN", *used, "COMMIT"] * 2


def test_settings_are_each_endpoint_s_own(at_work: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeout (ms) and buffers (MB) are set per connection as its endpoint says; PGOPTIONS stays the user's."""
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    start(
        entry(query_timeout=1500, session_tmp_buffer=16),
        entry(SECOND_HOST, query_timeout=2500, session_tmp_buffer=32),
    )
    assert os.environ["PGOPTIONS"] == "-c geqo=off"
    found = set()
    for group in ("auto", "auto", "tx", "tx"):
        with dbpool.Handler(group) as db:
            found.add(tuple(value(db, f"SHOW {name}") for name in ("statement_timeout", "temp_buffers", "geqo")))
    assert found == {("1500ms", "16MB", "off"), ("2500ms", "32MB", "off")}


def test_query_timeout_is_in_milliseconds(at_work: Twins) -> None:
    """A statement that runs longer is cancelled, and the error carries the server's code."""
    start(entry(query_timeout=50))
    with dbpool.Handler("auto") as db:
        with pytest.raises(dbpool.DBQueryError) as caught:
            db.query("SELECT pg_sleep(10)")
        assert caught.value.pgcode == "57014"
        assert isinstance(caught.value.__cause__, psycopg2.errors.QueryCanceled)
        assert value(db, "SELECT 1") == 1


def test_autocommit_is_off_unless_it_is_asked_for(at_work: Twins) -> None:
    """A group without the key has transactions; one with it has none."""
    start()
    with dbpool.Handler("tx") as db, dbpool.Handler("auto") as auto:
        db.query("INSERT INTO items VALUES (1)")
        assert rows(at_work) == 0
        auto.query("INSERT INTO items VALUES (2)")
        assert rows(at_work) == 1
        db.commit()
        assert rows(at_work) == 2


def test_rows_are_lists_and_dictionaries(at_work: Twins) -> None:
    """A query returns a cursor whose rows can be read by position and by name, also after the handler was left."""
    start()
    with dbpool.Handler("tx") as db:
        found = db.query("SELECT n, n * 2 AS twice FROM generate_series(1, 3) AS n")
    assert [(row[0], row["twice"]) for row in found] == [(1, 2), (2, 4), (3, 6)]


def fail_within(group: str, *statements: str) -> None:
    """Run statements and leave the block by an exception."""
    with dbpool.Handler(group) as db:
        for statement in statements:
            db.query(statement)
        raise KeyError


@pytest.mark.parametrize(("group", "begin"), [("tx", ()), ("auto", ("BEGIN",))])
def test_end_of_the_block_decides(at_work: Twins, group: str, begin: tuple[str, ...]) -> None:
    """What is open at the end is committed; at an exception it is rolled back, a BEGIN of the user's own as well."""
    start(connection_count=1)
    with dbpool.Handler(group) as db:
        for statement in (*begin, "INSERT INTO items VALUES (1)"):
            db.query(statement)
    assert rows(at_work) == 1
    with pytest.raises(KeyError):
        fail_within(group, *begin, "INSERT INTO items VALUES (2)")
    assert rows(at_work) == 1
    with dbpool.Handler(group) as db:
        assert db.conn_ref.get_transaction_status() == 0


def test_commit_that_fails_at_the_end_is_an_error(at_work: Twins) -> None:
    """A block whose transaction the server does not commit raises; the connection serves the next one."""
    start(connection_count=1)
    db = dbpool.Handler("tx")
    db.query("INSERT INTO items VALUES (1), (1)")
    with pytest.raises(dbpool.DBQueryError, match="not committed") as caught, db:
        pass
    assert caught.value.pgcode == "23505"
    with dbpool.Handler("tx") as db:
        assert value(db, "SELECT count(*) FROM items") == 0


def test_error_in_a_transaction_aborts_it(at_work: Twins) -> None:
    """After a failing statement the transaction takes no other, as in PostgreSQL; at its end nothing is committed."""
    start(connection_count=1)
    with dbpool.Handler("tx") as db:
        db.query("INSERT INTO items VALUES (1)")
        with pytest.raises(dbpool.DBQueryError) as caught:
            db.query("SELECT 1 / 0")
        assert caught.value.pgcode == "22012"
        with pytest.raises(dbpool.DBQueryError) as caught:
            db.query("SELECT 1")
        assert caught.value.pgcode == "25P02"
        dbpool.Query.check_db(("tx", 0))  # the server is there
    assert rows(at_work) == 0
    with dbpool.Handler("tx") as db:
        assert value(db, "SELECT 1") == 1


def test_changed_autocommit_is_put_back(at_work: Twins) -> None:
    """A holder that changed autocommit does not change it for the next one."""
    start(connection_count=1)
    with dbpool.Handler("tx") as db:
        db.conn_ref.autocommit = True
    with dbpool.Handler("tx") as db:
        assert db.conn_ref.autocommit is False


@pytest.mark.parametrize("group", ["auto", "tx"])
def test_session_that_ended_while_idle_is_replaced(at_work: Twins, group: str) -> None:
    """No statement fails when a session has ended between two handlers, and conn_ref is the new connection."""
    start(connection_count=1)
    with dbpool.Handler(group) as db:
        before = backend(db)
    at_work.end(before)
    with dbpool.Handler(group) as db:
        assert value(db, "SELECT pg_backend_pid()") == backend(db) != before


@pytest.mark.parametrize("group", ["auto", "tx"])
def test_long_lived_handler_survives_the_end_of_its_session(at_work: Twins, group: str) -> None:
    """Between transactions a handler that is kept gets a new connection, and conn_ref is that one; nothing fails."""
    start(connection_count=1)
    with dbpool.Handler(group) as db:
        before = value(db, "SELECT pg_backend_pid()")
        db.commit()
        at_work.end(before)
        assert value(db, "SELECT pg_backend_pid()") == backend(db) != before


@pytest.mark.parametrize(("group", "begin"), [("tx", ()), ("auto", ("BEGIN",))])
def test_session_that_ends_in_a_transaction(at_work: Twins, group: str, begin: tuple[str, ...]) -> None:
    """The rest of a lost transaction is refused, nothing of it is committed, and the next one works."""
    start(connection_count=1)
    with dbpool.Handler(group) as db:
        for statement in (*begin, "INSERT INTO items VALUES (1)"):
            db.query(statement)
        at_work.end(backend(db))
        with pytest.raises(dbpool.DBQueryError):
            db.query("INSERT INTO items VALUES (2)")
        with pytest.raises(dbpool.DBOfflineError, match="lost in a transaction"):
            db.query("INSERT INTO items VALUES (3)")
    assert rows(at_work) == 0
    with dbpool.Handler(group) as db:
        db.query("INSERT INTO items VALUES (4)")
    assert rows(at_work) == 1


def test_server_restarts_under_load(at_work: Twins) -> None:
    """While the only server restarts handlers wait for it; statements fail that were under way, and no handler."""
    start(entry(connection_retry_sleep=0.05), connection_count=4)
    stop = threading.Event()
    served: list[float] = []
    lost: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                with dbpool.Handler("auto") as db:
                    db.query("SELECT pg_sleep(0.001)")
                served.append(time.monotonic())
            except dbpool.DBQueryError:
                lost.append(1)
            except BaseException as error:  # noqa: BLE001  the test says which
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(served) > 50)
    at_work.first.restart()
    back = time.monotonic()
    wait_until(lambda: sum(when > back for when in tuple(served)) > 50)
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert failures == []
    assert len(lost) <= len(threads)


def test_endpoint_down_at_the_start(at_work: Twins) -> None:
    """With one of two servers down `init` succeeds on the other; the first has its share again when it returns."""
    at_work.first.stop()
    start(entry(connection_retry_sleep=0.1), entry(SECOND_HOST))
    assert len(at_work.sessions(SECOND_HOST)) == 4
    with dbpool.Handler("auto") as db:
        assert value(db, "SELECT 1") == 1
    at_work.first.start()

    def use_all() -> None:
        for group in ("auto", "auto", "tx", "tx"):
            with dbpool.Handler(group) as db:
                assert value(db, "SELECT 1") == 1

    def is_shared() -> bool:
        use_all()
        return [len(at_work.sessions(host)) for host in (HOST, SECOND_HOST)] == [2, 2]

    wait_until(is_shared)


def test_endpoint_that_goes_down_is_left_for_the_other(at_work: Twins) -> None:
    """Handlers of a server that stopped are served by the other one, without an error."""
    start(entry(connection_retry_sleep=0.1), entry(SECOND_HOST))
    at_work.first.stop("immediate")
    for group in ("auto", "auto", "tx", "tx"):
        with dbpool.Handler(group) as db:
            assert db.conn_ref.info.host == SECOND_HOST
            assert value(db, "SELECT 1") == 1


def test_no_server_at_the_start(at_work: Twins, caplog: pytest.LogCaptureFixture) -> None:
    """`init` names every server and the driver's reason, and never the password; handlers work once one is back."""
    caplog.set_level(logging.DEBUG)
    for server in at_work:
        server.stop()
    hidden: dict[str, Any] = {"pass": "not-to-be-seen", "connection_retry_sleep": 0.05}
    with pytest.raises(dbpool.DBConnectionError) as caught:
        start(entry(**hidden), entry(SECOND_HOST, **hidden))
    for host in (HOST, SECOND_HOST):
        assert f"'postgres' at {host}: connection to server at" in str(caught.value)
    assert str(caught.value).count("Connection refused") == 2
    assert "not-to-be-seen" not in f"{caught.value!r} {caplog.text}"
    with pytest.raises(dbpool.DBOfflineError, match=r"no server can be reached.*Connection refused"):
        dbpool.Handler("auto")
    at_work.first.start()
    with dbpool.Handler("auto") as db:
        assert value(db, "SELECT 1") == 1


def test_reconnect(at_work: Twins) -> None:
    """`reconnect` leaves a connection that answers, and replaces one that does not, in which nothing is open then."""
    start(connection_count=1)
    with dbpool.Handler("tx") as db:
        before = backend(db)
        dbpool.Connection.reconnect(("tx", 0))
        assert backend(db) == before
        assert db.conn_ref.get_transaction_status() == 0
        db.query("INSERT INTO items VALUES (1)")
        at_work.end(before)
        with pytest.raises(dbpool.DBOfflineError, match="does not answer"):
            dbpool.Query.check_db(("tx", 0))
        dbpool.Connection.reconnect(("tx", 0))
        assert backend(db) != before
        db.query("INSERT INTO items VALUES (2)")
    assert rows(at_work) == 1


def test_second_init_closes_the_sessions_of_the_first(at_work: Twins) -> None:
    """Sessions of an earlier `init` end at once, or when their handlers are left."""
    start()
    before = at_work.sessions()
    with dbpool.Handler("auto") as db:
        start()
        wait_until(lambda: before & at_work.sessions() == {backend(db)})
        assert value(db, "SELECT 1") == 1
    wait_until(lambda: not before & at_work.sessions())
    assert len(at_work.sessions()) == 4


def test_threads_share_connections_one_at_a_time(at_work: Twins) -> None:
    """Many threads on few connections: none is used by two at once, and the server never sees more than configured."""
    start(connection_count=3)
    busy: set[int] = set()
    served: list[int] = []

    def work() -> None:
        for _ in range(20):
            with dbpool.Handler("auto") as db:
                pid = backend(db)
                assert pid not in busy
                busy.add(pid)
                assert value(db, "SELECT pg_backend_pid()") == pid
                busy.remove(pid)
            served.append(pid)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert (len(served), len(set(served))) == (240, 3)
    assert len(at_work.sessions()) == 6


def fork_without_handlers() -> int:
    """Fork as a C program does: no at-fork handler of Python runs."""
    return int(ctypes.PyDLL(None).fork())


FORKS = pytest.mark.parametrize("fork", [os.fork, fork_without_handlers])


@FORKS
@pytest.mark.parametrize("kind", ["threaded", "non-threaded"])
def test_child_makes_connections_of_its_own(at_work: Twins, kind: str, fork: Callable[[], int]) -> None:
    """A child works with connections of its own, and neither its work nor its end harms the parent's."""
    start(kind=kind, connection_count=1)
    with dbpool.Handler("auto") as db:
        mine = backend(db)

    def work() -> list[Any]:
        with dbpool.Handler("auto") as db:
            found = [backend(db), value(db, "SELECT pg_backend_pid()")]
        dbpool.Connection.init({"db": entry(), "groups": {"other": {"connection_count": 1}}})
        with dbpool.Handler("other") as db:
            found.append(value(db, "SELECT 1"))
        gc.collect()
        return found

    child = in_child(work, fork)
    assert child[0] == child[1] != mine
    assert child[2] == 1
    with dbpool.Handler("auto") as db:
        assert value(db, "SELECT pg_backend_pid()") == mine


@FORKS
def test_handler_does_not_cross_a_fork(at_work: Twins, fork: Callable[[], int]) -> None:
    """A child can do nothing with its parent's handler, and leaving the block there does not end the transaction."""
    start(connection_count=1)
    with dbpool.Handler("tx") as db:
        db.query("INSERT INTO items VALUES (1)")
        raw = db.conn_ref

        def work() -> list[str]:
            told = []
            for use in (lambda: db.query("SELECT 1"), db.commit, lambda: db.conn_ref, lambda: db.query_prepared(())):
                try:
                    use()
                    told.append("worked")
                except dbpool.DBConnectionError as error:
                    told.append(str(error))
            db.__exit__(None, None, None)
            db.__exit__(KeyError, None, None)
            with dbpool.Handler("tx") as mine:
                told.append(f"own {value(mine, 'SELECT 1')}")
            try:
                raw.commit()
                told.append("worked")
            except psycopg2.OperationalError as error:
                told.append(str(error))
            return told

        told = in_child(work, fork)
        assert all("belongs to the parent process" in one for one in told[:4])
        assert told[4] == "own 1"
        assert "server closed the connection" in told[5]
        db.query("INSERT INTO items VALUES (2)")
    assert rows(at_work) == 2


def test_fork_beside_busy_threads(at_work: Twins) -> None:
    """A fork while other threads take, use and wait for connections leaves a child that can use the pool at once."""
    start(connection_count=2)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                with dbpool.Handler("auto") as db:
                    db.query("SELECT 1")
            except BaseException as error:  # noqa: BLE001  the test says which
                failures.append(error)

    def child() -> int:
        with dbpool.Handler("auto") as db:
            return int(value(db, "SELECT 1"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert [in_child(child) for _ in range(10)] == [1] * 10
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert failures == []


def test_prepared_queries(at_work: Twins) -> None:
    """Queries of the prep_queries extension are prepared with each connection, later ones included, and return rows."""
    start(sqlprepare=True, connection_count=1)
    request = ["S", "double", json.dumps({"number": 21}), ["number"]]
    for group in ("auto", "tx"):
        with dbpool.Handler(group) as db:
            assert db.conn_ref.get_transaction_status() == 0
            assert db.query_prepared(request) == [{"answer": 42}]
            pid = backend(db)
        at_work.end(pid)
        with dbpool.Handler(group) as db:
            assert db.query_prepared(request) == [{"answer": 42}]


def test_prepared_query_that_fails(at_work: Twins) -> None:
    """A failing prepared query returns JSON text with the server's reason."""
    start(sqlprepare=True, connection_count=1)
    with dbpool.Handler("auto") as db:
        told = json.loads(db.query_prepared(["S", "triple", json.dumps({"number": 1}), ["number"]]))
    assert (told["error"], told["exception"]) == (True, "InvalidSqlStatementName")
    assert 'prepared statement "triple" does not exist' in told["exceptionCause"]


def test_queries_that_cannot_be_prepared(at_work: Twins) -> None:
    """A server without the extension cannot serve a group with `sqlprepare`, and says why."""
    with pytest.raises(dbpool.DBConnectionError, match="SQLPrepare"):
        start(entry(SECOND_HOST), sqlprepare=True)
    assert at_work.sessions(SECOND_HOST) == set()
