"""What a lost connection is told as, whichever call notices it: killed backends, lost answers, every cursor class."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import errors
from psycopg2.extensions import cursor
from psycopg2.extras import DictConnection, DictCursor, NamedTupleCursor, RealDictCursor

from shmpool import Connection, ConnectionLost, Handle, Pool, PoolError, TransactionOutcomeUnknown
from shmpool.losses import PlainCursor, TellingCursor
from tests.support.losing import end, execute, losing_coordinator
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from tests.support.workers import is_whole, one_value, pool_of
from tools.pg_cluster import Cluster, Server

SUICIDE = "SELECT pg_terminate_backend(pg_backend_pid())"
TRAP = """
CREATE TABLE marked (number int);
CREATE TABLE trapped (number int);
CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(10); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER trap AFTER INSERT ON trapped DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION trap();
"""


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Iterator[Server]:
    """A primary with a table whose rows end the session that commits them."""
    cluster.primary.execute(TRAP)
    yield cluster.primary
    cluster.primary.execute("DROP TABLE marked, trapped; DROP FUNCTION trap")


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[Relay]:
    """What stands between the pool and the primary."""
    with Relay(server.port) as relay:
        yield relay


@pytest.fixture(scope="module")
def name(cluster: Cluster, relay: Relay) -> Iterator[str]:
    """The name of a coordinated pool."""
    name = f"l{os.getpid()}"
    with losing_coordinator(name, cluster, relay):
        yield name


@pytest.fixture
def pool(name: str) -> Iterator[Pool]:
    """A pool of this process; every permit is back afterwards."""
    with pool_of(name) as pool:
        yield pool


def lost_by(call: Callable[[], Any]) -> ConnectionLost:
    """Return the error of a call that notices a loss."""
    with pytest.raises(ConnectionLost) as caught:
        call()
    assert isinstance(caught.value, PoolError)
    assert isinstance(caught.value.__cause__, psycopg2.OperationalError)
    assert not isinstance(caught.value.__cause__, PoolError)
    return caught.value


def test_killed_before_the_first_statement(pool: Pool, server: Server) -> None:
    """In a transaction group it is known that nothing was sent: the BEGIN failed."""
    with pool.connection("tx") as conn:
        end(server, conn)
        lost = lost_by(lambda: execute(conn, "SELECT 1"))
        conn.close()
    assert (lost.endpoint, lost.was_in_transaction, lost.was_sent) == ("pg1", False, False)
    assert str(lost).startswith("endpoint 'pg1': connection lost before a statement was sent: ")
    assert str(lost.__cause__).strip() in str(lost)


def test_killed_in_mid_query_in_autocommit(pool: Pool) -> None:
    """The statement's own outcome is unknown, and the error says so."""
    with pool.connection("auto") as conn:
        lost = lost_by(lambda: execute(conn, SUICIDE))
    assert (lost.was_in_transaction, lost.was_sent) == (False, True)
    assert "whether the server carried that one out is unknown" in str(lost)


def test_killed_in_a_transaction(pool: Pool, server: Server) -> None:
    """In mid-query or between two: the transaction is rolled back."""
    with pytest.raises(ConnectionLost, match="in an open transaction, which the server rolls back"):  # noqa: SIM117
        with pool.connection("tx") as conn:
            execute(conn, SUICIDE)
    with pool.connection("tx") as conn:
        execute(conn, "INSERT INTO marked VALUES (1)")
        end(server, conn)
        lost = lost_by(lambda: execute(conn, "SELECT 1"))
        assert (lost.was_in_transaction, lost.was_sent) == (True, True)
        conn.close()
    assert server.execute("SELECT count(*) FROM marked") == [(0,)]


def test_lost_answer_of_a_commit(pool: Pool, server: Server, relay: Relay) -> None:
    """The commit was carried out and nobody can know: at the end of a block, and by call."""
    relay.lose_answer_to(b"COMMIT")
    with pytest.raises(TransactionOutcomeUnknown, match="whether it took effect is unknown") as caught:  # noqa: SIM117
        with pool.connection("tx") as conn:
            execute(conn, "INSERT INTO marked VALUES (1)")
    assert isinstance(caught.value.__cause__, psycopg2.OperationalError)
    assert not isinstance(caught.value, ConnectionLost)
    assert server.execute("DELETE FROM marked RETURNING number") == [(1,)]


def test_server_process_that_ends_while_it_commits(pool: Pool, server: Server) -> None:
    """Killed inside of COMMIT: unknown to this side, rolled back in truth."""
    with pool.connection("tx") as conn:
        execute(conn, "INSERT INTO trapped VALUES (1)")
        with pytest.raises(TransactionOutcomeUnknown):
            conn.commit()
        conn.close()
    assert server.execute("SELECT count(*) FROM trapped") == [(0,)]


def test_commit_as_a_statement(pool: Pool, server: Server, relay: Relay) -> None:
    """A COMMIT that is sent as text is one: with a comment before it, among others, and in autocommit."""
    for group, sql in (("tx", "/* end */ commit"), ("tx", "SELECT 1; COMMIT"), ("auto", "COMMIT")):
        with pool.connection(group) as conn:
            execute(conn, "BEGIN" if group == "auto" else "SELECT 1")
            relay.lose_answer_to(sql.encode())
            with pytest.raises(TransactionOutcomeUnknown):
                execute(conn, sql)
            conn.close()


def test_commit_with_nothing_at_stake(pool: Pool, server: Server) -> None:
    """A transaction that had failed already cannot have been committed."""
    with pool.connection("tx") as conn:
        with pytest.raises(errors.UndefinedColumn):
            execute(conn, "SELECT nothing")
        end(server, conn)
        assert lost_by(conn.commit).was_in_transaction
        conn.close()


def test_two_phase_commit(pool: Pool, server: Server, relay: Relay) -> None:
    """Whether a transaction was prepared, or committed then, is unknown; both were."""
    for request, count in ((b"PREPARE TRANSACTION", 1), (b"COMMIT PREPARED", 0)):
        with pool.connection("tx") as conn:
            xid = conn.xid(1, request.decode(), "branch")
            conn.tpc_begin(xid)
            execute(conn, "SELECT txid_current()")
            relay.lose_answer_to(request)

            def prepare_and_commit(conn: Handle = conn) -> None:
                conn.tpc_prepare()
                conn.tpc_commit()

            with pytest.raises(TransactionOutcomeUnknown):
                prepare_and_commit()
            conn.close()
        found = server.execute("SELECT gid FROM pg_prepared_xacts")
        assert len(found) == count
        for (gid,) in found:
            server.execute(f"ROLLBACK PREPARED '{gid}'")


def named(conn: Handle) -> Callable[[], Any]:
    """Fetch from a server-side cursor."""
    cur = conn.cursor("named", cursor_factory=NamedTupleCursor)
    cur.execute("SELECT 1 AS one")
    return cur.fetchone


def stepping(conn: Handle) -> Callable[[], Any]:
    """Iterate over a server-side cursor."""
    cur = conn.cursor(name="named")
    cur.execute("SELECT 1")
    return lambda: next(iter(cur))


CALLS: dict[str, Callable[[Handle], Callable[[], Any]]] = {
    "execute": lambda conn: lambda: execute(conn, "SELECT 1"),
    "callproc": lambda conn: lambda: conn.cursor().callproc("now"),
    "executemany": lambda conn: lambda: conn.cursor().executemany("SELECT %s", [(1,), (2,)]),
    "copy_to": lambda conn: lambda: conn.cursor().copy_to(io.StringIO(), "marked"),
    "copy_from": lambda conn: lambda: conn.cursor().copy_from(io.StringIO("1\n"), "marked"),
    "copy_expert": lambda conn: lambda: conn.cursor().copy_expert("COPY marked TO STDOUT", io.BytesIO()),
    "fetch": named,
    "iterate": stepping,
    "rollback": lambda conn: conn.rollback,
    "reset": lambda conn: conn.reset,
    "set_client_encoding": lambda conn: lambda: conn.set_client_encoding("latin1"),
    "lobject": lambda conn: lambda: conn.lobject(1, "r"),
    "commit_position": lambda conn: conn.commit_position,
}


@pytest.mark.parametrize("way", CALLS)
def test_every_call_tells(pool: Pool, server: Server, way: str) -> None:
    """Whatever notices the loss raises the same class, and later use is refused as by psycopg2."""
    with pool.connection("tx") as conn:
        if way != "commit_position":
            execute(conn, "SELECT 1")
        call = CALLS[way](conn)
        end(server, conn)
        lost = lost_by(call)
        assert lost.was_in_transaction is (way != "commit_position")
        for later in (conn.cursor, conn.commit):
            with pytest.raises(psycopg2.InterfaceError, match="connection already closed"):
                later()
        assert conn.closed
        conn.close()


def test_loss_within_a_transaction_block(pool: Pool) -> None:
    """`with conn:` tells of the loss, not that it could not roll back afterwards."""
    with pool.connection("tx") as conn:
        with pytest.raises(ConnectionLost), conn:
            execute(conn, SUICIDE)
        conn.close()


def test_loss_costs_no_permit(pool: Pool) -> None:
    """The error may be kept: neither connection nor permit hang on it."""
    with pool.connection("auto") as conn:
        kept = lost_by(lambda: execute(conn, SUICIDE))
    pool.rest()
    wait_until(lambda: is_whole(pool.name), within=10)
    assert kept.endpoint == "pg1"


def test_other_errors_stay_what_they_are(pool: Pool) -> None:
    """An error of a statement is psycopg2's own, and the connection goes on."""
    with pool.connection("tx") as conn:
        with pytest.raises(errors.SyntaxError) as caught:
            execute(conn, "SELEKT")
        assert caught.value.cursor is not None
        assert caught.value.__cause__ is None
        conn.rollback()
        assert one_value(conn, "SELECT 1") == 1


class Tagged(DictCursor):
    """An application's cursor with a method of another shape."""

    def execute(self, query: Any, vars: Any = None, *, tag: str = "") -> Any:  # noqa: A002  psycopg2's name
        """Run a query with a tag."""
        return super().execute(f"/* {tag} */ {query}", vars)  # type: ignore[no-untyped-call]  # the stubs'


def made_by_function(conn: Any, name: str | None = None) -> cursor:
    """Make a cursor without being a class."""
    return RealDictCursor(conn, name)


@pytest.mark.parametrize("kind", [DictCursor, NamedTupleCursor, RealDictCursor, Tagged, cursor])
def test_cursor_classes_stay_what_they_are(name: str, kind: type[cursor]) -> None:
    """Named or not, asked for at the call, the pool or the connection: the application's class, and it tells."""
    with pool_of(name, cursor_factory=kind) as pool, pool.connection("auto") as conn:
        assert conn.cursor_factory is kind
        for cur in (conn.cursor(), conn.cursor(cursor_factory=kind), conn.cursor(None, kind)):
            assert isinstance(cur, kind)
            assert isinstance(cur, TellingCursor)
            assert cur.name is None
            cur.execute("SELECT 7 AS seven")
            row: Any = cur.fetchone()
            assert row["seven" if isinstance(row, dict) else 0] == 7
        conn.autocommit = False
        cur = conn.cursor("named", cursor_factory=kind)
        assert isinstance(cur, kind)
        cur.execute("SELECT 7 AS seven UNION ALL SELECT 8")
        assert len(list(cur)) == 2
        conn.rollback()
        conn.cursor_factory = None
        assert type(conn.cursor()) is PlainCursor
        assert conn.cursor_factory is None
        cur = conn.cursor(cursor_factory=kind)
        lost_by(lambda: cur.execute(SUICIDE))
        conn.close()


def test_extra_arguments_reach_the_application_s_cursor(pool: Pool) -> None:
    """A method that takes more than psycopg2's is called as it was."""
    with pool.connection("auto") as conn:
        cur: Any = conn.cursor(cursor_factory=Tagged)
        cur.execute("SELECT %s AS one", (1,), tag="mine")
        assert cur.query == b"/* mine */ SELECT 1 AS one"


def test_function_as_cursor_factory(pool: Pool) -> None:
    """It is called, and its cursors raise what psycopg2 raises."""
    with pool.connection("auto") as conn:
        assert type(conn.cursor(cursor_factory=made_by_function)) is RealDictCursor
        conn.cursor_factory = made_by_function
        assert type(conn.cursor()) is RealDictCursor
    with pool.connection("auto") as conn:
        assert type(conn.cursor()) is PlainCursor


class Before(DictConnection, Connection):
    """An application's connection that chooses the cursor class itself."""


class After(Connection, DictConnection):
    """The same, with the classes the other way round."""


@pytest.mark.parametrize("factory", [Before, After])
def test_connection_classes_choose_their_cursors(name: str, factory: type[Connection]) -> None:
    """A connection class that has a cursor class of its own gets it, and it tells."""
    with pool_of(name, connection_factory=factory) as pool, pool.connection("tx") as conn:
        for cur in (conn.cursor(), conn.cursor("named")):
            assert isinstance(cur, DictCursor)
            assert isinstance(cur, TellingCursor)
            cur.execute("SELECT 7 AS seven")  # type: ignore[no-untyped-call]  # the stubs'
            row: Any = cur.fetchone()
            assert row["seven"] == 7
