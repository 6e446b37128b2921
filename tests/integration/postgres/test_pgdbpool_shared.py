"""pgdbpool's interface on a budget of the whole host, against real servers that want a password."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, make_dsn

from shmpool import pgdbpool as dbpool
from shmpool.cli import main
from shmpool.control_client import ControlError, request
from shmpool.control_client import tell as tell_coordinator
from shmpool.launch import serving_pid
from shmpool.names import Names
from shmpool.pgdbpool.configuration import parse
from shmpool.pgdbpool.shared import SharedPool, translate
from tests.support.gunicorn import stop_coordinator
from tests.support.pgdbpool import forgotten
from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tests.support.workers import in_child, is_connected, is_whole, lease_of, read_line, worker
from tools.pg_cluster import HOST, Cluster, Server

ROLE = "pgdbpool_user"
FIRST, SECOND = "first-not-to-be-seen", "second-not-to-be-seen"
CAP = 5
WORKER = """
import json, os, sys, threading, time
import shmpool.background
shmpool.background.ALONE_S = 0.1  # before a worker starts a coordinator that is missing
from shmpool import attachment, pgdbpool as dbpool

if "without-threads" in sys.argv:
    attachment.be_without_threads()  # as in uWSGI; what is due is done after each query
dbpool.Connection.init(json.loads(sys.stdin.readline()))
served, failures = [], []

def use(until):
    while time.monotonic() < until:
        try:
            with dbpool.Handler("g") as db:
                db.query("select pg_sleep(0.005)")
            served.append(1)
        except Exception as error:
            failures.append(repr(error))

for line in sys.stdin:
    if line == "load\\n":
        threads = [threading.Thread(target=use, args=(time.monotonic() + 1.5,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps([len(served), failures]), flush=True)
    elif line == "query\\n":
        with dbpool.Handler("g") as db:
            print(db.query("select current_user").fetchone()[0], flush=True)
        attachment.do_rounds()
"""
PREPARED = """
CREATE SCHEMA "SQLPrepare";
CREATE TABLE "SQLPrepare".calls (backend int);
CREATE FUNCTION "SQLPrepare"."PrepareQueries"() RETURNS void LANGUAGE sql
    AS 'INSERT INTO "SQLPrepare".calls VALUES (pg_backend_pid())';
CREATE FUNCTION "SQLPrepare"."ExecuteQuery"(text) RETURNS text LANGUAGE sql AS 'SELECT upper($1)';
GRANT USAGE ON SCHEMA "SQLPrepare" TO pgdbpool_user;
GRANT ALL ON "SQLPrepare".calls TO pgdbpool_user;
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that asks one role for its password."""
    require_postgres()
    with Cluster(settings={"password_encryption": "scram-sha-256"}) as cluster:
        primary = cluster.primary
        rules = primary.data / "pg_hba.conf"
        rules.write_text(f"host all {ROLE} all scram-sha-256\n{rules.read_text()}")
        primary.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{FIRST}'")
        primary.execute(f"CREATE TABLE notes (text text); GRANT ALL ON notes TO {ROLE}")
        primary.execute(PREPARED)
        primary.execute("SELECT pg_reload_conf()")
        primary.execute(f"GRANT pg_monitor TO {ROLE}")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(make_dsn(primary.conninfo(user=ROLE, password="wrong")))
        yield primary


@pytest.fixture
def password(server: Server) -> Iterator[None]:
    """The role has its first password again, and an empty table."""
    yield
    server.execute(f"ALTER ROLE {ROLE} PASSWORD '{FIRST}'")
    server.execute("TRUNCATE notes")


Configure = Callable[..., dict[str, Any]]


@pytest.fixture
def configure(server: Server, password: None) -> Iterator[Configure]:
    """A function that makes dictionaries; coordinators that were started on them are ended afterwards."""
    made: list[dict[str, Any]] = []

    def config(**keys: Any) -> dict[str, Any]:
        made.append(dictionary(server, **keys))
        return made[-1]

    with forgotten():
        yield config
    gc.collect()
    for one in made:
        stop_coordinator(names_of(one))


GROUPS: dict[str, Any] = {
    "one": {"connection_count": 1, "autocommit": True},
    "two": {"connection_count": 2, "autocommit": True},
    "tx": {"connection_count": 1},
    "hurry": {"connection_count": 1, "autocommit": True, "timeout": 0.3},
    "ready": {"connection_count": 1, "sqlprepare": True},
}


@pytest.fixture(scope="module")
def running(server: Server) -> Iterator[dict[str, Any]]:
    """A dictionary with GROUPS whose coordinator runs, for tests that need no pool of their own."""
    config = dictionary(server, groups=GROUPS, linger=60)
    try:
        with forgotten():
            dbpool.Connection.init(config)
            with dbpool.Handler("one"):
                pass
        yield config
    finally:
        stop_coordinator(names_of(config))


@pytest.fixture
def connected(running: dict[str, Any], password: None) -> Iterator[None]:
    """This process uses the pool of `running`; afterwards nothing of it is in use."""
    with forgotten():
        dbpool.Connection.init(running)
        yield
    gc.collect()
    wait_until(lambda: is_whole(names_of(running).pool), within=10)


def dictionary(
    server: Server, *, secret: str = FIRST, groups: dict[str, Any] | None = None, linger: float = 1, **entry: Any
) -> dict[str, Any]:
    """Return a dictionary; `entry` has further keys of its one `db`."""
    return {
        "type": "shared",
        "linger": linger,
        "db": {"host": HOST, "port": server.port, "name": "postgres", "user": ROLE, "pass": secret} | entry,
        "groups": groups or {"g": {"connection_count": CAP, "autocommit": True}},
    }


def names_of(config: dict[str, Any]) -> Names:
    """Return the names of the pool that a dictionary stands for."""
    return Names.of(translate(parse(config))[0]["name"])


@contextmanager
def working(config: dict[str, Any], *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the pool; `tell` has it do something."""
    with worker(WORKER, *options) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(config) + "\n")
        process.stdin.flush()
        yield process


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def ask(process: subprocess.Popen[str]) -> str:
    """Have a process run a query; return what it printed."""
    tell(process, "query")
    return read_line(process)


def sessions(server: Server, names: Names) -> int:
    """Return how many sessions workers of a pool have at the server."""
    pattern = f"%shmpool:{names.pool}:%:%"
    return len(server.execute(f"SELECT 1 FROM pg_stat_activity WHERE application_name LIKE '{pattern}'"))


def verdict(names: Names) -> str:
    """Return what the coordinator thinks of the one endpoint, and have it look again soon."""
    try:
        tell_coordinator(names, "evidence", 1.0, endpoint=0, error="")
        return str(request(names, "info")["endpoints"]["db1"]["verdict"])
    except ControlError:
        return "no coordinator"


def fail_after(_: object) -> None:
    raise ZeroDivisionError


# -- One budget ----------------------------------------------------------------------------------------------------


def test_connection_count_is_that_of_the_whole_host(server: Server, configure: Configure) -> None:
    """Four processes with three threads each never have more sessions at the server, and all of them are served."""
    config = configure()
    names, most = names_of(config), 0
    with ExitStack() as stack:
        processes = [stack.enter_context(working(config)) for _ in range(4)]
        for process in processes:
            tell(process, "load")
        until = time.monotonic() + 2
        while time.monotonic() < until:
            most = max(most, sessions(server, names))
        reports = [json.loads(read_line(process)) for process in processes]
    assert most == CAP
    assert all(served for served, _ in reports), reports
    assert [failures for _, failures in reports] == [[]] * 4


def test_each_distinct_dictionary_has_a_coordinator(configure: Configure) -> None:
    """Equal ones share it; the next number of connections is another budget."""
    one, other = configure(), configure(groups={"g": {"connection_count": 2}})
    with working(one) as first, working(one) as second, working(other) as third:
        assert [ask(process) for process in (first, second, third)] == [ROLE] * 3
        infos = [request(names_of(config), "info") for config in (one, other)]
        assert infos[0]["pid"] != infos[1]["pid"]
        wait_until(lambda: [request(names_of(c), "info")["workers"] for c in (one, other)] == [2, 1])


def test_coordinator_ends_after_the_last_worker(configure: Configure) -> None:
    """Nothing is left, `linger` after it."""
    config = configure()
    with working(config) as process:
        assert ask(process) == ROLE
        assert names_of(config).leftovers()
    wait_until(lambda: not names_of(config).leftovers(), within=10)


def test_killed_coordinator_is_started_again(configure: Configure) -> None:
    """By a process that used it, with all that it needs to know: the password, too."""
    config = configure()
    names = names_of(config)
    with working(config) as process:
        assert ask(process) == ROLE
        wait_until(lambda: verdict(names) == "OK")
        pid = serving_pid(names)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert ask(process) == ROLE
        wait_until(lambda: serving_pid(names, is_fresh=True) not in (None, pid), within=10)
        wait_until(lambda: verdict(names) == "OK")
        with working(config) as newcomer:
            assert ask(newcomer) == ROLE


def test_init_starts_and_attaches_nothing(configure: Configure) -> None:
    """A master that loads the application holds nothing; each child that needs a connection has its own."""
    config = configure()
    dbpool.Connection.init(config)
    assert not names_of(config).leftovers()

    def query() -> tuple[int, int]:
        with dbpool.Handler("g") as db:
            return os.getpid(), db.query("select pg_backend_pid()").fetchone()[0]

    answers = [in_child(query) for _ in range(2)]
    assert len({pid for pid, _ in answers}) == len({backend for _, backend in answers}) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 and newer: fork beside threads
def test_child_of_a_process_that_holds_a_connection(configure: Configure) -> None:
    """It has one of its own, and nothing that it does reaches its parent's."""
    dbpool.Connection.init(configure())
    with dbpool.Handler("g") as db:
        mine = db.query("select pg_backend_pid()").fetchone()[0]

        def query() -> int:
            with pytest.raises(dbpool.DBConnectionError, match="parent"):
                db.query("select 1")
            with dbpool.Handler("g") as own:
                return int(own.query("select pg_backend_pid()").fetchone()[0])

        assert in_child(query) != mine
        assert db.query("select pg_backend_pid()").fetchone()[0] == mine


def test_without_a_coordinator_the_error_says_why(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be started is a DBConnectionError, soon and not a timeout."""
    config = configure()
    dbpool.Connection.init(config)
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    began = time.monotonic()
    with pytest.raises(dbpool.DBConnectionError, match=r"/nowhere/python3") as caught:
        dbpool.Handler("g")
    assert not isinstance(caught.value, dbpool.DBTimeoutError)
    assert time.monotonic() - began < 5
    assert not names_of(config).leftovers()


# -- Passwords -----------------------------------------------------------------------------------------------------


def test_password_is_nowhere_to_be_seen(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in shared memory, nor in what the coordinator was started with, nor in what it says of itself."""
    config = configure()
    names = names_of(config)
    with working(config) as process:
        assert ask(process) == ROLE
        wait_until(lambda: verdict(names) == "OK")
        pid = serving_pid(names)
        proc = Path(f"/proc/{pid}")
        assert b"--config-stdin" in (proc / "cmdline").read_bytes()
        seen = [path.read_bytes() for path in names.leftovers() if not path.is_socket()]
        seen += [(proc / name).read_bytes() for name in ("cmdline", "environ", "comm")]
        seen += [os.readlink(fd).encode() for fd in (proc / "fd").iterdir()]
        seen.append(json.dumps(request(names, "info")).encode())
        assert main(["status", names.pool, "--json"]) == 0
        assert main(["slots", names.pool]) == 0
        seen.append("".join(capsys.readouterr()).encode())
        assert any(ROLE.encode() in one for one in seen)  # it is looked at where something can be seen
        assert not [one for one in seen if FIRST.encode() in one]


def test_password_is_not_logged(server: Server, configure: Configure, tmp_path: Path) -> None:
    """Neither when all goes well, nor when the server refuses it, nor when another one is handed over."""
    config = configure()
    tables, passwords, _ = translate(parse(config))
    names, log = names_of(config), tmp_path / "log"
    command = [sys.executable, "-m", "shmpool_coordinator", "run", "--config-stdin", "--log-level", "debug"]
    process = subprocess.Popen([*command, "--log-file", str(log)], stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"config": tables, "passwords": passwords}))
        process.stdin.close()
        wait_until(lambda: verdict(names) == "OK", within=10)
        server.execute(f"ALTER ROLE {ROLE} PASSWORD '{SECOND}'")
        server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
        wait_until(lambda: verdict(names) == "MISCONFIGURED", within=10)
        assert request(names, "passwords", passwords={"db1": SECOND})["type"] == "taken"
        wait_until(lambda: verdict(names) == "OK", within=10)
    finally:
        process.terminate()
        assert process.wait(10) == 0
    told = log.read_text()
    assert "authentication failed" in told
    assert f"pid {os.getpid()} gave another password" in told
    assert FIRST not in told
    assert SECOND not in told


@pytest.mark.parametrize("option", ["with-threads", "without-threads"])
def test_changed_password_comes_with_the_next_process(server: Server, configure: Configure, option: str) -> None:
    """The living coordinator takes it over, and one that still has the old one does not undo that."""
    old, new = configure(), configure(secret=SECOND)
    names = names_of(old)
    assert names_of(new) == names
    with working(old) as before:
        assert ask(before) == ROLE
        pid = serving_pid(names)
        server.execute(f"ALTER ROLE {ROLE} PASSWORD '{SECOND}'")
        server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
        wait_until(lambda: verdict(names) == "MISCONFIGURED", within=10)
        with working(new, option) as after:
            assert ask(after) == ROLE
            wait_until(lambda: verdict(names) == "OK", within=10)
            request(names, "passwords", passwords={"db1": FIRST})  # as a process that comes late
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
            wait_until(lambda: verdict(names) == "MISCONFIGURED", within=10)
            wait_until(lambda: verdict(names) == "OK", within=10)
            assert serving_pid(names) == pid


# -- As with connections of one's own --------------------------------------------------------------------------------


def test_handler_commits_on_success_and_rolls_back_on_an_exception(server: Server, connected: None) -> None:
    """In a group without autocommit; the connection comes back in no transaction either way."""
    with dbpool.Handler("tx") as db:
        db.query("INSERT INTO notes VALUES (%s)", ("kept",))
        row = db.query("SELECT text, 1 AS one FROM notes").fetchone()
        assert (row["text"], row[1]) == ("kept", 1)
    with pytest.raises(ZeroDivisionError), dbpool.Handler("tx") as db:
        fail_after(db.query("INSERT INTO notes VALUES ('dropped')"))
    with dbpool.Handler("tx") as db:
        db.query("INSERT INTO notes VALUES ('committed')")
        db.commit()
        with pytest.raises(dbpool.DBQueryError) as caught:
            db.query("SELECT nonsense")
        assert caught.value.pgcode == "42703"
        assert db.conn_ref.get_transaction_status() != TRANSACTION_STATUS_IDLE
    assert server.execute("SELECT text FROM notes ORDER BY text") == [("committed",), ("kept",)]
    with dbpool.Handler("tx") as db:
        assert db.conn_ref.get_transaction_status() == TRANSACTION_STATUS_IDLE


def test_sign_of_life_leaves_no_transaction(connected: None) -> None:
    """Asking for one before the first statement begins nothing."""
    with dbpool.Handler("tx") as db:
        dbpool.Query.check_db(("tx", 0))
        assert db.conn_ref.get_transaction_status() == TRANSACTION_STATUS_IDLE


def test_failed_commit_is_told_and_gives_the_connection_back(server: Server, connected: None) -> None:
    """An end of the block that could not commit is a DBQueryError."""
    handler = dbpool.Handler("tx")
    backend = handler.query("SELECT pg_backend_pid()").fetchone()[0]
    server.execute(f"SELECT pg_terminate_backend({backend})")
    wait_until(lambda: not is_connected(server, backend))
    with pytest.raises(dbpool.DBQueryError, match="not committed"), handler:
        pass
    assert dbpool.Connection.get_connection_count(("tx", 0)) == 0
    with dbpool.Handler("tx") as db:
        assert db.query("SELECT pg_backend_pid()").fetchone()[0] != backend


def test_settings_are_those_of_the_entry(configure: Configure) -> None:
    """Time for a query and room for temporary tables, from the first statement on, whatever PGOPTIONS says."""
    dbpool.Connection.init(configure(query_timeout=1234, session_tmp_buffer=9))
    with dbpool.Handler("g") as db:
        shown = [db.query(f"SHOW {name}").fetchone()[0] for name in ("statement_timeout", "temp_buffers")]
    assert shown == ["1234ms", "9MB"]


def test_short_query_timeout_does_not_take_the_server_out(configure: Configure) -> None:
    """It bounds the application's statements, not the coordinator's looks."""
    config = configure(query_timeout=1)
    dbpool.Connection.init(config)
    with dbpool.Handler("g") as db, pytest.raises(dbpool.DBQueryError, match="timeout"):
        db.query("SELECT pg_sleep(5)")
    wait_until(lambda: verdict(names_of(config)) == "OK")


def test_queries_are_prepared_once_per_connection_and_only_where_wanted(server: Server, connected: None) -> None:
    """A group with `sqlprepare` and one without share a pool."""
    backends = {}
    for group in ("tx", "ready", "tx", "ready"):
        with dbpool.Handler(group) as db:
            backends[group] = db.query("SELECT pg_backend_pid()").fetchone()[0]
    assert server.execute('SELECT backend FROM "SQLPrepare".calls') == [(backends["ready"],)]
    with dbpool.Handler("ready") as db:
        assert db.query_prepared(("text",)) == "TEXT"


def test_who_waits_too_long_is_told_who_holds_what(connected: None) -> None:
    """Also across processes: all connections of the host are in use."""
    with dbpool.Handler("hurry"):
        with pytest.raises(dbpool.DBTimeoutError, match="group 'hurry'"):
            dbpool.Handler("hurry")

        def in_vain() -> str:
            with pytest.raises(dbpool.DBTimeoutError) as caught:
                dbpool.Handler("hurry")
            return str(caught.value)

        assert str(os.getpid()) in in_child(in_vain)
        assert next(dbpool.conn_iter("hurry")) is None


def test_thread_that_waits_gets_the_connection_that_comes_back(connected: None) -> None:
    """A handler in another thread is served as soon as one is left."""
    answers: list[int] = []

    def query() -> None:
        with dbpool.Handler("one") as db:
            answers.append(db.query("SELECT 1").fetchone()[0])

    with dbpool.Handler("one"):
        thread = threading.Thread(target=query)
        thread.start()
        backend = dbpool.Connection._current
        assert isinstance(backend, SharedPool)
        wait_until(lambda: backend._pools["one"].statistics()["one"]["waiting"])
        assert not answers
        assert dbpool.Connection.get_connection_count(("one", 0)) == 1
        assert dbpool.Connection.get_connection(("one", 1)) == (None, "free")
    thread.join(10)
    assert answers == [1]


def test_dropped_handler_gives_its_connection_back(connected: None) -> None:
    """Without a block, and without any other call."""
    db: Any = dbpool.Handler("one")
    assert db.query("SELECT 1").fetchone() == [1]
    del db
    with dbpool.Handler("one") as db:
        assert db.query("SELECT 1").fetchone() == [1]


def test_rows_can_be_read_after_the_block(connected: None) -> None:
    """By position and by name, from where reading stopped; but the cursor has no connection any more."""
    sql = "SELECT n AS number FROM generate_series(1, 7) AS n"
    with dbpool.Handler("one") as db:
        whole, one, many, steps = (db.query(sql) for _ in range(4))
        assert one.fetchone()["number"] == 1
        begun = iter(steps)
        assert next(begun) == [1]
        nothing = db.query("DROP TABLE IF EXISTS nowhere")
    assert [row["number"] for row in whole] == list(range(1, 8))
    assert whole.fetchone() is None
    assert (one.fetchone()[0], one.fetchmany(2), len(one.fetchall()), one.fetchall()) == (2, [[3], [4]], 3, [])
    assert (many.fetchmany(), many.rowcount) == ([[1]], 7)
    assert [row["number"] for row in begun] == list(range(2, 8))
    for use in (nothing.fetchone, lambda: whole.execute("SELECT 1")):
        with pytest.raises(psycopg2.InterfaceError):
            use()


def test_rows_stay_although_the_connection_is_given_up(configure: Configure) -> None:
    """One that another process waits for is closed at the end of the block."""
    config = configure(groups={"g": {"connection_count": 1, "autocommit": True}})
    dbpool.Connection.init(config)
    with working(config) as other:
        with dbpool.Handler("g") as db:
            rows = db.query("SELECT n FROM generate_series(1, 3) AS n")
            lease, conn = lease_of(db.conn_ref), rows.connection
            tell(other, "query")
            wait_until(lambda: lease.words[lease.recall_at] == lease.words[lease.word_at])
        assert read_line(other) == ROLE
        assert conn.closed
        assert rows.fetchall() == [[1], [2], [3]]


def test_conn_ref_is_dead_after_the_block(connected: None) -> None:
    """What was kept of it never reaches the next holder; closing it gives it back."""
    with dbpool.Handler("one") as db:
        kept = db.conn_ref
        assert not kept.closed
    with dbpool.Handler("one") as other:
        with pytest.raises(psycopg2.InterfaceError, match="given back"):
            kept.cursor()
        with pytest.raises(dbpool.DBConnectionError, match="was left"):
            db.query("SELECT 1")
        other.conn_ref.close()
        assert other.query("SELECT 1").fetchone() == [1]
    with dbpool.Handler("one") as third:
        dbpool.Connection.set_connection_status(("one", 0), "free")
        assert third.conn_ref is None


def test_lost_connection_is_replaced_outside_a_transaction(server: Server, connected: None) -> None:
    """Under the same handler; within a transaction that is an error, and the next handler works."""
    for group in ("one", "tx"):
        with dbpool.Handler(group) as db:
            backend = db.query("SELECT pg_backend_pid()").fetchone()[0]
            server.execute(f"SELECT pg_terminate_backend({backend})")
            wait_until(lambda backend=backend: not is_connected(server, backend))  # type: ignore[misc]
            if group == "one":
                assert db.query("SELECT pg_backend_pid()").fetchone()[0] != backend
                assert db.conn_ref.get_backend_pid() != backend
            else:
                with pytest.raises(dbpool.DBQueryError):
                    db.query("SELECT 1")
                with pytest.raises(dbpool.DBOfflineError, match="in a transaction"):
                    db.query("SELECT 1")
        with dbpool.Handler(group) as db:
            assert db.query("SELECT 1").fetchone() == [1]


def test_server_that_is_away_is_told(configure: Configure) -> None:
    """After the group's time, as the driver says it."""
    groups = {"g": {"connection_count": 1, "timeout": 0.5}}
    dbpool.Connection.init(configure(port=1, groups=groups))
    with pytest.raises(dbpool.DBOfflineError, match="refused"):
        dbpool.Handler("g")


def test_wrong_password_is_told_at_once(configure: Configure) -> None:
    """It does not pass by itself; the message has no password."""
    dbpool.Connection.init(configure(secret="wrong-not-to-be-seen"))
    began = time.monotonic()
    with pytest.raises(dbpool.DBOfflineError, match="authentication failed") as caught:
        dbpool.Handler("g")
    assert time.monotonic() - began < 5
    assert "not-to-be-seen" not in str(caught.value)


def test_class_methods_name_what_is_in_use(server: Server, connected: None) -> None:
    """Connections that this process uses have numbers, counted from 0; the rest of the interface takes those."""
    get, set_status = dbpool.Connection.get_connection, dbpool.Connection.set_connection_status
    steps = dbpool.Connection.get_connection_iter_container("two")
    first, second = next(steps), dbpool.Connection.get_next_connection("two")
    assert first is not None
    assert second is not None
    assert (first[0], second[0]) == (0, 1)
    assert next(steps) is None
    assert get(("two", 1)) == (second[1], "occupied")
    assert dbpool.Connection.get_connection_count(("two", 0)) == 2
    assert dbpool.Query.execute(("two", 1), "SELECT %s", (5,)).fetchone() == [5]
    dbpool.Query.check_db(("two", 0))
    assert first[1].get_transaction_status() == TRANSACTION_STATUS_IDLE
    backend = first[1].get_backend_pid()
    dbpool.Connection.connect(("two", 0))
    assert get(("two", 0))[0].get_backend_pid() != backend
    backend = get(("two", 0))[0].get_backend_pid()
    dbpool.Connection.reconnect(("two", 0))
    assert get(("two", 0))[0].get_backend_pid() == backend
    server.execute(f"SELECT pg_terminate_backend({backend})")
    dbpool.Connection.reconnect(("two", 0))
    assert get(("two", 0))[0].get_backend_pid() != backend
    set_status(("two", 0), "free")
    assert get(("two", 0)) == (None, "free")
    third = next(steps)
    assert third is not None
    assert third[0] == 0
    for number in (0, 1):
        set_status(("two", number), "free")
    assert dbpool.Connection.get_connection_count(("two", 0)) == 0


def test_init_anew_gives_up_what_was_there(configure: Configure) -> None:
    """What is in use stays until it is left; the rest of the process goes on with the new dictionary."""
    one, other = configure(), configure(groups={"g": {"connection_count": 2, "autocommit": True}})
    dbpool.Connection.init(one)
    with dbpool.Handler("g") as db:
        dbpool.Connection.init(other)
        assert db.query("SELECT 1").fetchone() == [1]
        with dbpool.Handler("g") as newer:
            assert newer.query("SELECT 1").fetchone() == [1]
    wait_until(lambda: request(names_of(other), "info")["workers"] == 1)
    wait_until(lambda: not names_of(one).leftovers(), within=10)
