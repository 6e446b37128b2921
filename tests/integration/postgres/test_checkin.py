"""The checkin contract: what the next holder of a connection never sees."""

from __future__ import annotations

import contextlib
import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import sql
from psycopg2.extensions import (
    ISOLATION_LEVEL_SERIALIZABLE,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
)
from psycopg2.extras import DictCursor, NamedTupleCursor, execute_values

from shmpool import Connection, ConnectionGivenBackError, Handle, Pool
from shmpool.pool_errors import PoolTimeout
from tests.support.coordinator import CoordinatorProcess
from tests.support.waiting import wait_until
from tests.support.workers import backend, is_connected, lease_of, one_value, other_client, pool_of, sessions
from tools.pg_cluster import Cluster


@pytest.fixture(autouse=True)
def table(cluster: Cluster) -> Iterator[None]:
    """An empty table `t (n int)`, gone afterwards."""
    cluster.primary.execute("CREATE TABLE t (n int)")
    yield
    cluster.primary.execute("DROP TABLE t")


def rows(cluster: Cluster) -> list[int]:
    """Return what other clients see in the table."""
    return sorted(n for (n,) in cluster.primary.execute("SELECT n FROM t"))


# -- the public surface


def test_block_commits_on_success(pool: Pool, cluster: Cluster) -> None:
    """Without autocommit, leaving the block commits."""
    with pool.connection("tx", timeout=2.0) as conn, conn.cursor() as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        assert rows(cluster) == []
    assert rows(cluster) == [1]


def test_block_rolls_back_on_an_exception(pool: Pool, cluster: Cluster) -> None:
    """Without autocommit, an exception rolls back, passes on, and the connection is kept."""
    with pytest.raises(KeyError), pool.connection("tx") as conn:  # noqa: PT012  the block is what is tested
        pid = backend(conn)
        with conn.cursor() as cur:
            cur.execute("INSERT INTO t VALUES (1)")
        raise KeyError
    assert rows(cluster) == []
    with pool.connection("tx") as conn:
        assert backend(conn) == pid


def test_failed_commit_gives_the_connection_back(pool: Pool, cluster: Cluster) -> None:
    """A commit that fails raises, and the permit comes back."""
    cluster.primary.execute("ALTER TABLE t ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED")
    with pytest.raises(psycopg2.errors.UniqueViolation), pool.connection("tx") as conn, conn.cursor() as cur:
        cur.execute("INSERT INTO t VALUES (1), (1)")
    assert pool.statistics()["tx"]["idle"] == 1
    assert rows(cluster) == []


def test_autocommit_group_commits_each_statement(pool: Pool, cluster: Cluster) -> None:
    """With autocommit every statement counts at once, whatever happens to the block."""
    with pytest.raises(KeyError), pool.connection("auto") as conn:  # noqa: PT012  the block is what is tested
        with conn.cursor() as cur:
            cur.execute("INSERT INTO t VALUES (1)")
        assert rows(cluster) == [1]
        raise KeyError


def test_checkout_and_checkin_keep_the_connection(pool: Pool) -> None:
    """The same server process serves one checkout after the other; the statistics count them."""
    first = pool.checkout("auto", timeout=2.0)
    before = pool.statistics()["auto"]
    pid = backend(first)
    pool.checkin(first)
    second = pool.checkout("auto")
    assert backend(second) == pid
    second.close()
    with pool.connection("auto") as conn:
        assert one_value(conn, "SELECT 1") == 1
    numbers = pool.statistics()["auto"]
    assert (numbers["idle"], numbers["held"], numbers["opens"]) == (1, 1, before["opens"])
    assert numbers["checkouts"] == before["checkouts"] + 3


def test_transaction_block_of_the_handle(pool: Pool, cluster: Cluster) -> None:
    """`with conn:` is psycopg2's transaction block and keeps the connection."""
    with pool.connection("tx") as conn:
        with conn, conn.cursor() as cur:
            cur.execute("INSERT INTO t VALUES (1)")
        assert rows(cluster) == [1]
        with pytest.raises(KeyError), conn, conn.cursor() as cur:  # noqa: PT012  the block is what is tested
            cur.execute("INSERT INTO t VALUES (2)")
            raise KeyError
        assert conn.closed == 0
    assert rows(cluster) == [1]


def test_session_carries_name_and_settings(shared: CoordinatorProcess, pool: Pool) -> None:
    """The session tells pool, row, generation and slot; what the group sets is set."""
    with pool.connection("auto") as conn:
        name = one_value(conn, "SHOW application_name")
        row, generation, slot = lease_of(conn).group.attachment.slot_name(lease_of(conn))
        assert name == f"shmpool:{shared.names.pool}:{row}.{generation}:{slot}"


# -- transactions


def leave_open_transaction(conn: Handle) -> None:
    """Begin by psycopg2 and leave it so."""
    conn.cursor().execute("INSERT INTO t VALUES (1)")
    assert conn.get_transaction_status() == TRANSACTION_STATUS_INTRANS


def leave_error(conn: Handle) -> None:
    """Leave a failed transaction."""
    with pytest.raises(psycopg2.errors.DivisionByZero):
        conn.cursor().execute("SELECT 1/0")
    assert conn.get_transaction_status() == TRANSACTION_STATUS_INERROR


def leave_raw_begin(conn: Handle) -> None:
    """Begin in SQL, behind psycopg2's back."""
    conn.autocommit = True
    conn.cursor().execute("BEGIN")
    conn.cursor().execute("INSERT INTO t VALUES (1)")


def leave_raw_begin_without_cursor_left(conn: Handle) -> None:
    """Begin in SQL through a cursor that is closed again."""
    conn.autocommit = True
    with conn.cursor() as cur:
        cur.execute("BEGIN; INSERT INTO t VALUES (1)")


def leave_raw_commit(conn: Handle) -> None:
    """Commit in SQL: psycopg2 still believes itself in a transaction."""
    with conn.cursor() as cur:
        cur.execute("SELECT 1")
        cur.execute("COMMIT")
    assert conn.get_transaction_status() == TRANSACTION_STATUS_IDLE


@pytest.mark.parametrize(
    "leave",
    [leave_open_transaction, leave_error, leave_raw_begin, leave_raw_begin_without_cursor_left, leave_raw_commit],
)
def test_transaction_is_rolled_back(pool: Pool, cluster: Cluster, leave: Callable[[Handle], None]) -> None:
    """Whatever transaction was left, the next holder has the same session in none, and begins one of its own."""
    conn = pool.checkout("tx")
    pid = backend(conn)
    leave(conn)
    conn.close()
    assert rows(cluster) == []
    after = pool.checkout("tx")
    assert backend(after) == pid
    assert after.get_transaction_status() == TRANSACTION_STATUS_IDLE
    after.cursor().execute("INSERT INTO t VALUES (7)")
    assert after.get_transaction_status() == TRANSACTION_STATUS_INTRANS
    assert rows(cluster) == []
    after.commit()
    after.close()
    assert rows(cluster) == [7]


def test_raw_begin_in_an_autocommit_group(pool: Pool, cluster: Cluster) -> None:
    """A raw BEGIN is rolled back where psycopg2 itself never begins."""
    with pool.connection("auto") as conn, conn.cursor() as cur:
        cur.execute("BEGIN")
        cur.execute("INSERT INTO t VALUES (1)")
    assert rows(cluster) == []
    assert sum(numbers["held"] for numbers in pool.statistics().values()) == 1


def test_mutation_of_the_transaction_check(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction status decides: with it hidden, an open transaction would reach the next holder."""
    conn = pool.checkout("tx")
    conn.cursor().execute("SELECT 1")
    lease = lease_of(conn)
    lease.marks.clear()
    conn.close()
    assert lease.connection.get_transaction_status() == TRANSACTION_STATUS_IDLE


# -- beyond repair


def leave_copy(conn: Handle) -> None:
    """Leave the session waiting for COPY data."""
    with pytest.raises(psycopg2.ProgrammingError):
        conn.cursor().execute("COPY t FROM STDIN")


def leave_prepared(conn: Handle) -> None:
    """Leave a prepared two-phase transaction."""
    conn.tpc_begin(conn.xid(1, "gtrid", "bqual"))
    with conn.cursor() as cur:
        cur.execute("INSERT INTO t VALUES (1)")
    conn.tpc_prepare()


def leave_prepared_without_cursor(conn: Handle) -> None:
    """Leave a prepared two-phase transaction that no cursor worked in."""
    conn.tpc_begin(conn.xid(1, "gtrid", "bqual"))
    conn.tpc_prepare()


def leave_broken(conn: Handle) -> None:
    """Leave a session that its server ended."""
    with pytest.raises(psycopg2.OperationalError):
        conn.cursor().execute("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("leave", [leave_copy, leave_prepared, leave_prepared_without_cursor, leave_broken])
def test_connection_beyond_repair_is_closed(pool: Pool, cluster: Cluster, leave: Callable[[Handle], None]) -> None:
    """What cannot be brought back in order is closed, and its permits are back at once."""
    conn = pool.checkout("tx")
    pid = backend(conn)
    try:
        leave(conn)
        conn.close()
        assert pool.statistics()["tx"]["held"] == 0
        wait_until(lambda: not is_connected(cluster.primary, pid))
        with pool.connection("tx") as after:
            assert one_value(after, "SELECT 1") == 1
    finally:
        for (gid,) in cluster.primary.execute("SELECT gid FROM pg_prepared_xacts"):
            cluster.primary.execute(f"ROLLBACK PREPARED '{gid}'")


def test_unread_result_is_closed(pool: Pool) -> None:
    """A session that is executing when it comes back is closed."""
    conn = pool.checkout("auto")
    other = threading.Thread(target=suppress(lambda: conn.cursor().execute("SELECT pg_sleep(1)")))
    lease = lease_of(conn)
    other.start()
    wait_until(lambda: lease.connection.isexecuting() or lease.connection.get_transaction_status() == 1)
    conn.close()
    other.join()
    assert pool.statistics()["auto"]["held"] == 0


def suppress(work: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that does the work and swallows psycopg2's errors."""

    def run() -> None:
        with contextlib.suppress(psycopg2.Error):
            work()

    return run


# -- session properties


def change_autocommit(conn: Handle) -> None:
    conn.autocommit = not conn.autocommit


def change_isolation(conn: Handle) -> None:
    conn.isolation_level = ISOLATION_LEVEL_SERIALIZABLE


def change_isolation_by_method(conn: Handle) -> None:
    conn.set_isolation_level(ISOLATION_LEVEL_SERIALIZABLE)


def change_readonly(conn: Handle) -> None:
    conn.readonly = True


def change_deferrable(conn: Handle) -> None:
    conn.deferrable = True


def change_session(conn: Handle) -> None:
    conn.set_session(isolation_level="SERIALIZABLE", readonly=True, deferrable=True, autocommit=True)


def change_cursor_factory(conn: Handle) -> None:
    conn.cursor_factory = DictCursor


def change_encoding(conn: Handle) -> None:
    conn.set_client_encoding("LATIN1")


def change_notices(conn: Handle) -> None:
    with conn.cursor() as cur:
        cur.execute("DO $$ BEGIN RAISE NOTICE 'private'; END $$")
    assert conn.notices


def change_notices_list(conn: Handle) -> None:
    conn.notices = KeptNotices()


class KeptNotices(list[str]):
    """A list of notices of the holder's own."""


def properties(conn: Handle) -> tuple[object, ...]:
    """Return everything that a checkin puts back."""
    with conn.cursor() as cur:
        cur.execute(
            "SELECT current_setting('default_transaction_isolation'), current_setting('transaction_isolation'),"
            " current_setting('default_transaction_read_only'), current_setting('transaction_read_only'),"
            " current_setting('default_transaction_deferrable'), current_setting('client_encoding')"
        )
        seen = cur.fetchone()
    return (
        seen and tuple(seen),
        type(cur),
        conn.autocommit,
        conn.isolation_level,
        conn.readonly,
        conn.deferrable,
        conn.cursor_factory,
        conn.encoding,
        list(conn.notices),
        type(conn.notices),
    )


@pytest.mark.parametrize("group", ["auto", "tx"])
@pytest.mark.parametrize(
    "change",
    [
        change_autocommit,
        change_isolation,
        change_isolation_by_method,
        change_readonly,
        change_deferrable,
        change_session,
        change_cursor_factory,
        change_encoding,
        change_notices,
        change_notices_list,
    ],
)
def test_session_properties_are_restored(pool: Pool, group: str, change: Callable[[Handle], None]) -> None:
    """What a holder changed is as it was for the next one, who gets the same session."""
    conn = pool.checkout(group)
    pid = backend(conn)
    before = properties(conn)
    conn.rollback()
    change(conn)
    conn.close()
    with pool.connection(group) as after:
        assert backend(after) == pid
        assert properties(after) == before


def test_factories_of_the_pool(shared: CoordinatorProcess) -> None:
    """Connection class, cursor class and `on_connect` are the application's; a change is put back to them."""
    connected: list[Any] = []
    with pool_of(
        shared.names.pool,
        connection_factory=CountingConnection,
        cursor_factory=NamedTupleCursor,
        on_connect=connected.append,
    ) as pool:
        conn = pool.checkout("auto")
        assert conn.answer() == 42
        conn.cursor_factory = DictCursor
        conn.close()
        with pool.connection("auto") as conn, conn.cursor() as cur:
            cur.execute("SELECT 5 AS five")
            assert cur.fetchone().five == 5  # type: ignore[union-attr]
        assert [type(one) for one in connected] == [CountingConnection]


class CountingConnection(Connection):
    """A connection with a method of the application's."""

    def answer(self) -> int:
        return 42


def test_on_connect_may_leave_a_transaction(shared: CoordinatorProcess) -> None:
    """What `on_connect` leaves open or changes is rolled back, or belongs to the connection."""

    def on_connect(conn: Any) -> None:
        conn.cursor().execute("SET work_mem = '5MB'")
        conn.commit()
        conn.cursor().execute("INSERT INTO t VALUES (3)")

    with pool_of(shared.names.pool, on_connect=on_connect) as pool, pool.connection("tx") as conn:
        assert conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
        assert one_value(conn, "SHOW work_mem") == "5MB"
        assert one_value(conn, "SELECT count(*) FROM t") == 0


@pytest.mark.parametrize("group", ["session", "discard"])
def test_reset_removes_what_sql_left(pool: Pool, cluster: Cluster, group: str) -> None:
    """With `reset`, settings, listens, advisory locks and held cursors of a holder are gone."""
    conn = pool.checkout(group)
    pid = backend(conn)
    with conn.cursor() as cur:
        cur.execute("SET work_mem = '7MB'")
        cur.execute("LISTEN shmpool_test")
        cur.execute("SELECT pg_advisory_lock(4711)")
    conn.close()
    with pool.connection(group) as after:
        assert backend(after) == pid
        assert one_value(after, "SHOW work_mem") != "7MB"
        assert one_value(after, "SELECT count(*) FROM pg_listening_channels()") == 0
        with other_client(cluster.primary) as other, other.cursor() as cur:
            cur.execute("SELECT pg_try_advisory_lock(4711)")
            assert cur.fetchone() == (True,)


# -- dead handles


def test_handle_is_dead_after_checkin(pool: Pool) -> None:
    """Every use of a handle that was given back raises; a second close and checkin do nothing."""
    conn = pool.checkout("auto")
    commit, cancel = conn.commit, conn.cancel
    cur = conn.cursor()
    conn.close()
    holder = pool.checkout("auto")
    conn.close()
    pool.checkin(conn)
    assert conn.closed == 1
    for use in (
        conn.cursor,
        lambda: conn.commit(),
        lambda: conn.rollback(),
        lambda: conn.autocommit,
        lambda: setattr(conn, "autocommit", False),
        lambda: conn.encoding,
        lambda: conn.__enter__(),
        commit,
        cancel,
    ):
        with pytest.raises(ConnectionGivenBackError):
            use()
    for method in (lambda: cur.execute("SELECT 1"), cur.fetchone, lambda: cur.copy_from(io.StringIO(), "t")):
        with pytest.raises(psycopg2.InterfaceError, match="closed"):
            method()
    cur.close()
    assert one_value(holder, "SELECT 1") == 1
    assert "given back" in repr(conn)
    holder.close()
    assert pool.statistics()["auto"]["idle"] == 1


def test_many_cursors_are_all_dead(pool: Pool) -> None:
    """However many cursors a holder made, none of them survives the checkin."""
    conn = pool.checkout("auto")
    kept = [conn.cursor() for _ in range(200)]
    for _ in range(200):
        conn.cursor().execute("SELECT 1")
    conn.close()
    assert all(cur.closed for cur in kept)


def test_server_side_cursors_are_dead(pool: Pool) -> None:
    """Named cursors, also those WITH HOLD and those closed behind their back, are gone for holder and server."""
    conn = pool.checkout("tx")
    held = conn.cursor("held", withhold=True)
    held.execute("SELECT generate_series(1, 100)")
    conn.commit()
    plain = conn.cursor("plain")
    plain.execute("SELECT generate_series(1, 100)")
    plain.fetchone()
    ghost = conn.cursor("ghost")
    ghost.execute("SELECT generate_series(1, 100)")
    conn.cursor().execute("CLOSE ghost")
    conn.close()
    with pool.connection("tx") as after:
        assert one_value(after, "SELECT count(*) FROM pg_cursors WHERE name <> ''") == 0
        for cur in (held, plain, ghost):
            assert cur.closed
            with pytest.raises(psycopg2.InterfaceError):
                cur.fetchone()
        assert after.get_transaction_status() == TRANSACTION_STATUS_INTRANS


def test_cursors_made_around_the_handle_are_dead(pool: Pool) -> None:
    """A cursor made from `cursor.connection` dies at checkin as well."""
    conn = pool.checkout("auto")
    raw = conn.cursor().connection
    around = raw.cursor()
    conn.close()
    with pytest.raises(psycopg2.InterfaceError):
        around.execute("SELECT 1")


def test_checkin_in_another_thread(pool: Pool) -> None:
    """A handle may be given back by another thread (streamed responses); it is dead for both."""
    conn = pool.checkout("auto")
    cur = conn.cursor()
    other = threading.Thread(target=conn.close)
    other.start()
    other.join()
    with pytest.raises(ConnectionGivenBackError):
        conn.cursor()
    with pytest.raises(psycopg2.InterfaceError):
        cur.execute("SELECT 1")
    assert pool.statistics()["auto"]["idle"] == 1


def test_raw_connection_refuses_close(pool: Pool) -> None:
    """The connection behind a cursor does not let itself be closed around the pool."""
    with pool.connection("auto") as conn:
        raw = conn.cursor().connection
        with pytest.raises(psycopg2.InterfaceError, match="close the handle"):
            raw.close()


def test_dropped_handle_is_closed_and_its_permits_come_back(pool: Pool, cluster: Cluster) -> None:
    """A connection that nobody gave back is closed, in its open transaction, and its permit serves another."""
    conn = pool.checkout("one")
    pid = backend(conn)
    conn.cursor().execute("BEGIN; INSERT INTO t VALUES (1)")
    del conn
    gc.collect()
    with pool.connection("one", timeout=2.0) as after:
        assert backend(after) != pid
    assert not is_connected(cluster.primary, pid)
    assert rows(cluster) == []


def test_dropped_handle_serves_a_thread_that_waits_already(pool: Pool) -> None:
    """A thread that waits while a handle is dropped elsewhere gets the permit, within a bounded time."""
    conn = pool.checkout("one")
    got: list[float] = []

    def wait() -> None:
        with pool.connection("one", timeout=8.0):
            got.append(1)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: pool.statistics()["one"]["waiting"] == 1)
    del conn
    thread.join()
    assert got == [1]


def test_psycopg2_helpers_work_on_cursors(pool: Pool, cluster: Cluster) -> None:
    """Composed SQL, execute_values, COPY and dictionary cursors work as with a plain connection."""
    with pool.connection("tx") as conn, conn.cursor(cursor_factory=DictCursor) as cur:
        execute_values(cur, "INSERT INTO t VALUES %s", [(n,) for n in range(5)])
        query = sql.SQL("SELECT n AS {} FROM {} WHERE n = {}").format(
            sql.Identifier("My n"), sql.Identifier("t"), sql.Literal(3)
        )
        assert query.as_string(cur) == 'SELECT n AS "My n" FROM "t" WHERE n = 3'
        cur.execute(query)
        assert cur.fetchone()["My n"] == 3  # type: ignore[call-overload,index]
        cur.copy_expert("COPY t FROM STDIN", io.StringIO("10\n11\n"))
    assert rows(cluster) == [0, 1, 2, 3, 4, 10, 11]


def test_handle_of_a_timeout_leaves_nothing(pool: Pool, shared: CoordinatorProcess, cluster: Cluster) -> None:
    """A checkout in vain holds nothing and names the holder."""
    with pool.connection("one"):
        with pytest.raises(PoolTimeout):
            pool.checkout("one", timeout=0)
        assert len(sessions(cluster.primary, shared.names.pool)) == 1
