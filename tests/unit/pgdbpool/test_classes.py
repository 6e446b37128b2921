"""pgdbpool's classes as its users call them, on stand-ins that have no more than pgdbpool asks of the driver."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import psycopg2
import pytest

import shmpool
from shmpool import pgdbpool
from shmpool.pgdbpool import (
    Connection,
    DBConfigurationError,
    DBConnectionError,
    DBOfflineError,
    DBQueryError,
    Handler,
    Query,
    UnconfiguredGroupError,
    conn_iter,
    conn_iter_locked,
    pool,
)
from tests.support.pgdbpool import Full, Servers, StandIn, config_of, entry, forgotten

KINDS = pytest.mark.parametrize("kind", ["threaded", "non-threaded"])
UNUSABLE = psycopg2.OperationalError("it broke")


def conn_of(handler: Handler) -> Any:
    """Return the connection behind a handler, once it has been used."""
    with handler as db:
        return db.conn_ref


def fail_after(statement: str, db: Handler) -> None:
    """Run a statement and raise."""
    db.query(statement)
    raise KeyError


def test_both_imports_offer_the_interface() -> None:
    """The package and its module `pool` offer the same classes, functions and exceptions."""
    for name in pool.__all__:
        assert getattr(pgdbpool, name) is getattr(pool, name)
    assert pgdbpool.pool is pool


@KINDS
def test_rotation(servers: Servers, kind: str) -> None:
    """With five connections the sixth handler gets the first one's again, and so on."""
    Connection.init(config_of(kind=kind, connection_count=5))
    used = [conn_of(Handler("g")) for _ in range(12)]
    assert len(set(map(id, used[:5]))) == 5
    assert used[5:10] == used[:5]
    assert used[10:] == used[:2]


@KINDS
def test_rotation_skips_what_is_occupied(servers: Servers, kind: str) -> None:
    """Handlers that overlap have connections of their own; the rotation goes on behind the last one given out."""
    Connection.init(config_of(kind=kind))
    with Handler("g") as first, Handler("g") as second:
        assert first.conn_ref is not second.conn_ref
        third = [conn_of(Handler("g")) for _ in range(2)]
        assert third[0] is third[1]
        assert third[0] not in (first.conn_ref, second.conn_ref)


def test_unknown_group(servers: Servers) -> None:
    """A group that is not configured is an error that names those that are, everywhere."""
    Connection.init(config_of())
    for use in (
        Handler,
        Connection.get_next_connection,
        Connection.get_max_pool_size,
        lambda group: Connection.get_connection((group, 0)),
        lambda group: next(conn_iter(group)),
    ):
        with pytest.raises(UnconfiguredGroupError, match="no group 'h'; it has g"):
            use("h")


def test_connect_keywords(servers: Servers) -> None:
    """The driver is given pgdbpool's keywords and no others."""
    Connection.init(config_of(entry(ssl="require", connect_timeout=3), connection_count=1))
    assert servers.made[0].keywords == {
        "dbname": "app",
        "user": "me",
        "host": "h1",
        "password": "secret",
        "sslmode": "require",
        "connect_timeout": 3,
    }


def test_port_is_passed_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`port`, which pgdbpool does not know, reaches the driver; without it the keyword is absent."""
    seen: list[dict[str, Any]] = []

    def connect(**keywords: Any) -> Any:
        seen.append(keywords)
        raise UNUSABLE

    monkeypatch.setattr(psycopg2, "connect", connect)
    with forgotten():
        for port in (5433, None):
            with pytest.raises(DBConnectionError):
                Connection.init(config_of(entry(port=port), connection_count=1))
    assert seen[0]["port"] == 5433
    assert "port" not in seen[1]


def test_connections_are_made_at_init_and_dealt_out(servers: Servers) -> None:
    """`init` connects every group in full, to the entries of `db` in turn."""
    config = config_of(entry("h1"), entry("h2"), connection_count=3)
    config["groups"]["other"] = {"connection_count": 2}
    Connection.init(config)
    assert servers.attempts == ["h1", "h2", "h1", "h2", "h1"]


@KINDS
def test_statements_are_all_that_is_sent(servers: Servers, kind: str) -> None:
    """No ping goes before a statement, nor at the begin of a handler: the server sees the statements and the commit."""
    Connection.init(config_of(kind=kind))
    for _ in range(4):
        with Handler("g") as db:
            db.query("one")
            db.query("two", (1,))
    assert servers.statements == ["one", "two", "commit"] * 4


def test_environment_is_not_touched(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGOPTIONS is the user's own."""
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    before = dict(os.environ)
    Connection.init(config_of(entry(query_timeout=1)))
    assert dict(os.environ) == before


def test_autocommit(servers: Servers) -> None:
    """Groups with autocommit are put into it when they connect; without the key a group has none."""
    servers.kind = Full
    config = config_of(connection_count=1)
    config["groups"]["auto"] = {"connection_count": 1, "autocommit": True}
    Connection.init(config)
    plain, auto = servers.made
    assert (plain.statements, auto.statements) == ([], ["isolation level 0"])


def test_queries_are_prepared_where_it_is_wanted(servers: Servers) -> None:
    """A group with `sqlprepare` has its queries prepared on each new connection."""
    Connection.init(config_of(sqlprepare=True, connection_count=2))
    assert servers.statements == ['call "SQLPrepare"."PrepareQueries"'] * 2


@pytest.mark.parametrize("kind", [StandIn, Full])
def test_exception_rolls_back(servers: Servers, kind: type[StandIn]) -> None:
    """A block that an exception leaves is not committed; what cannot roll back is replaced by a new connection."""
    servers.kind = kind
    Connection.init(config_of(connection_count=1))
    db = Handler("g")
    first = db.conn_ref
    with pytest.raises(KeyError), db:
        fail_after("one", db)
    assert servers.statements == ["one", "rollback"][: 2 if kind is Full else 1]
    assert (conn_of(Handler("g")) is first) is (kind is Full)


def test_commit_that_fails_is_an_error(servers: Servers) -> None:
    """A block whose end could not be committed raises, and its connection serves nobody else."""
    Connection.init(config_of(connection_count=1))
    db = Handler("g")
    first = db.conn_ref
    servers.failure = UNUSABLE
    with pytest.raises(DBQueryError, match="not committed") as caught, db:
        pass
    assert caught.value.__cause__ is UNUSABLE
    servers.failure = None
    assert conn_of(Handler("g")) is not first


def test_handler_commit(servers: Servers) -> None:
    """`commit` commits, and fails with the driver's own exception."""
    Connection.init(config_of())
    with Handler("g") as db:
        db.commit()
        assert servers.statements == ["commit"]
        servers.failure = UNUSABLE
        with pytest.raises(psycopg2.OperationalError, match="it broke"):
            db.commit()
        servers.failure = None


def test_query_error(servers: Servers) -> None:
    """A failing statement raises DBQueryError with the driver's exception as its cause."""
    Connection.init(config_of())
    servers.failure = UNUSABLE
    with pytest.raises(DBQueryError, match=r"OperationalError\('it broke'\)") as caught:
        Query.execute(("g", 0), "one")
    assert caught.value.__cause__ is UNUSABLE
    assert caught.value.pgcode is None


def test_exceptions_and_the_driver_s_family() -> None:
    """What keeps a handler from a connection is the pool's and the driver's kind of error; a failing query is not."""
    for kind in (DBConnectionError, DBOfflineError, UnconfiguredGroupError, pgdbpool.DBTimeoutError):
        assert issubclass(kind, shmpool.PoolError)
        assert issubclass(kind, psycopg2.OperationalError)
    assert issubclass(pgdbpool.DBTimeoutError, shmpool.PoolTimeout)
    assert not issubclass(DBQueryError, psycopg2.Error)
    assert not issubclass(DBConnectionError, DBOfflineError)
    assert not issubclass(DBOfflineError, DBConnectionError)


def test_prepared_query_that_fails_returns_its_cause(servers: Servers) -> None:
    """A failing prepared query returns the documented JSON text with the driver's exception and its message."""
    Connection.init(config_of())
    servers.failure = UNUSABLE
    told = json.loads(Query.execute_prepared(("g", 0), ()))
    assert told == {"error": True, "exception": "OperationalError", "exceptionCause": "it broke"}


def test_prepared_query_needs_parameters(servers: Servers) -> None:
    """Parameters of a prepared query must be given."""
    Connection.init(config_of())
    with pytest.raises(ValueError, match="sql_params"):
        Query.execute_prepared(("g", 0), None)


def test_methods_of_the_connection_class(servers: Servers) -> None:
    """The class methods tell type, size, connections and their status, and set the latter."""
    Connection.init(config_of(kind="non-threaded"))
    assert Connection.get_threading_model() == "non-threaded"
    assert Connection.get_max_pool_size("g") == 3
    assert Connection.get_connection_container(("g", 1)) == (servers.made[1], "free")
    assert Connection.get_next_connection("g") == (0, servers.made[0])
    assert Connection.get_connection(("g", 0)) == (servers.made[0], "occupied")
    Connection.set_connection_status(("g", 1), "occupied")
    assert Connection.get_connection_count(("g", 2)) == 2
    with Handler("g") as db:
        assert db.conn_ref is servers.made[2]
    Connection.set_connection_status(("g", 0), "free")
    Connection.set_connection_status(("g", 1), "free")
    assert Connection.get_connection_count(("g", 0)) == 0
    with pytest.raises(ValueError, match="expected 'free' or 'occupied'"):
        Connection.set_connection_status(("g", 0), "connecting")


@KINDS
def test_iterators(servers: Servers, kind: str) -> None:
    """An iterator takes connections in rotation, yields None while all are occupied, and never ends."""
    Connection.init(config_of(kind=kind))
    iterator = conn_iter_locked(conn_iter("g"))
    other = Connection.get_connection_iter_container("g")
    assert [next(one) for one in (iterator, iter(other), iterator, other)] == [*enumerate(servers.made), None]
    assert Connection.get_next_connection("g") is None
    Connection.set_connection_status(("g", 1), "free")
    assert next(iterator) == (1, servers.made[1])
    for number in range(3):
        Connection.set_connection_status(("g", number), "free")
    assert next(other) == (2, servers.made[2])
    assert next(iterator) == (0, servers.made[0])


def test_connect_replaces_and_keeps_the_status(servers: Servers) -> None:
    """`connect` makes a new connection, which a handler sees in `conn_ref`; the handler still has it for itself."""
    Connection.init(config_of(connection_count=1))
    with Handler("g") as db:
        first = db.conn_ref
        Connection.connect(("g", 0))
        assert db.conn_ref is servers.made[-1] is not first
        assert Connection.get_connection(("g", 0)) == (db.conn_ref, "occupied")
        db.query("one")
        assert servers.made[-1].statements == ["one"]
        servers.down["h1"] = "refused"
        with pytest.raises(DBConnectionError, match="at h1: refused"):
            Connection.connect(("g", 0))
        assert db.conn_ref is servers.made[-1]


def test_check_and_reconnect(servers: Servers) -> None:
    """`check_db` asks the server; `reconnect` does, and makes a new connection if there is no answer."""
    Connection.init(config_of(connection_count=1))
    Query.check_db(("g", 0))
    Connection.reconnect(("g", 0))
    assert len(servers.made) == 1
    servers.failure = UNUSABLE
    with pytest.raises(DBOfflineError, match="it broke"):
        Query.check_db(("g", 0))
    Connection.reconnect(("g", 0))
    assert len(servers.made) == 2


def test_handler_that_was_left(servers: Servers) -> None:
    """A handler that was left still shows its connection, and does nothing with it any more."""
    Connection.init(config_of(connection_count=1))
    with Handler("g") as db:
        conn = db.conn_ref
    assert db.conn_ref is conn
    for use in (lambda: db.query("one"), db.commit, lambda: db.query_prepared(()), db.__enter__):
        with pytest.raises(DBConnectionError, match="was left"):
            use()
    db.__exit__(None, None, None)
    assert servers.statements == ["commit"]


def test_nothing_works_before_init() -> None:
    """Without `init` there is an error that says to call it."""
    with forgotten():
        for use in (lambda: Handler("g"), Connection.get_threading_model):
            with pytest.raises(DBConnectionError, match=r"Connection\.init"):
                use()


def test_second_init_replaces_the_first(servers: Servers) -> None:
    """A second `init`, also with the same dictionary, closes what is idle at once and the rest when it comes back."""
    servers.kind = Full
    config = config_of()
    before = copy.deepcopy(config)
    Connection.init(config)
    first = list(servers.made)
    with Handler("g") as db:
        Connection.init(config)
        assert [conn.closed for conn in first] == [0, 1, 1]
        db.query("one")
        assert first[0].statements == ["one"]
        with Handler("g") as other:
            assert other.conn_ref is servers.made[3]
    assert [conn.closed for conn in first] == [1, 1, 1]
    assert config == before
    assert len(servers.made) == 6


def test_bad_configuration_changes_nothing(servers: Servers) -> None:
    """A configuration that cannot be used leaves what was set up before as it was."""
    Connection.init(config_of())
    with pytest.raises(DBConfigurationError):
        Connection.init(config_of(autocommit="yes"))
    assert conn_of(Handler("g")) is servers.made[0]


def test_configuration_is_not_changed_by_use(servers: Servers) -> None:
    """Connections and their status are kept apart from the caller's dictionary."""
    config = config_of(entry(), entry("h2"))
    before = copy.deepcopy(config)
    Connection.init(config)
    with Handler("g") as db:
        db.query("one")
    assert config == before
