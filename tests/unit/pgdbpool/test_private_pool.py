"""The pool of one process: waiting, endpoints that are away, holders that vanish."""

from __future__ import annotations

import gc
import re
import threading
import time
from typing import Any

import psycopg2
import pytest

from shmpool.pgdbpool import Connection, DBConnectionError, DBOfflineError, DBTimeoutError, Handler, Query, private_pool
from tests.support.pgdbpool import Full, Servers, config_of, entry
from tests.support.waiting import wait_until


def waiting() -> int:
    """Return how many threads wait for a connection."""
    current: Any = Connection._current
    return len(current._groups["g"].waiters)


def run(*threads: threading.Thread) -> None:
    """Wait for threads that were started."""
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def use_of(servers: Servers, count: int) -> list[str]:
    """Return the hosts that serve so many handlers in a row."""
    hosts = []
    for _ in range(count):
        with Handler("g") as db:
            hosts.append(db.conn_ref.host)
    return hosts


def test_connection_is_handed_over_in_order(servers: Servers) -> None:
    """Threads are served in the order in which they came, without a pause between checkin and hand-over."""
    Connection.init(config_of(connection_count=1))
    order: list[int] = []
    held = Handler("g")

    def work(number: int) -> None:
        with Handler("g"):
            order.append(number)

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        wait_until(lambda n=number: waiting() == n + 1)  # type: ignore[misc]
    began = time.monotonic()
    held.__exit__(None, None, None)
    run(*threads)
    assert order == list(range(5))
    assert time.monotonic() - began < 0.5  # five slices would be five seconds
    assert (waiting(), Connection.get_connection_count(("g", 0))) == (0, 0)


def test_no_connection_has_two_holders(servers: Servers) -> None:
    """Under many threads each connection has one holder at a time, and all threads are served."""
    Connection.init(config_of())
    busy: set[int] = set()
    served: list[int] = []

    def work() -> None:
        for _ in range(200):
            with Handler("g") as db:
                key = id(db.conn_ref)
                assert key not in busy
                busy.add(key)
                time.sleep(0)
                busy.remove(key)
                served.append(1)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    run(*threads)
    assert len(served) == 12 * 200


def test_wait_ends_and_says_who_holds_what(servers: Servers) -> None:
    """A wait ends after the group's `timeout`, with an error that names the holders and for how long they have held."""
    Connection.init(config_of(connection_count=2, timeout=0.1))
    with Handler("g"), Handler("g"):
        began = time.monotonic()
        with pytest.raises(DBTimeoutError) as caught:
            Handler("g")
        assert 0.1 <= time.monotonic() - began < 0.5
    told = str(caught.value)
    assert "group 'g': none of its 2 connections came free within 0.1 s" in told
    assert re.search(r"held: 0 by thread 'MainThread' for 0\.\d s, 1 by thread 'MainThread'", told)
    assert "waiting: 1 threads" in told
    assert waiting() == 0
    with Handler("g"):
        pass


def test_thread_that_gave_up_is_not_served(servers: Servers) -> None:
    """A connection that comes back after a wait has ended goes to the next in the queue."""
    Connection.init(config_of(connection_count=1, timeout=0.1))
    outcomes = []
    with Handler("g"):

        def work() -> None:
            with pytest.raises(DBTimeoutError):
                Handler("g")
            outcomes.append("timeout")

        thread = threading.Thread(target=work)
        thread.start()
        run(thread)
    assert outcomes == ["timeout"]
    assert Connection.get_connection_count(("g", 0)) == 0


def test_single_thread_does_not_wait_for_itself(servers: Servers) -> None:
    """With 'non-threaded' nobody else could give a connection back: the error comes at once."""
    Connection.init(config_of(kind="non-threaded", connection_count=1, timeout=30))
    with Handler("g"):
        began = time.monotonic()
        with pytest.raises(DBTimeoutError, match=r"no other thread.*held: 0 by thread 'MainThread'"):
            Handler("g")
        assert time.monotonic() - began < 1


def test_single_thread_takes_no_lock(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """'non-threaded' has no lock to take; 'threaded' has one."""

    class Lock:
        taken = 0

        def __enter__(self) -> None:
            Lock.taken += 1

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(threading, "Lock", Lock)
    for kind, takes in (("non-threaded", False), ("threaded", True)):
        Lock.taken = 0
        Connection.init(config_of(kind=kind))
        with Handler("g") as db:
            db.query("one")
        assert bool(Lock.taken) is takes


@pytest.mark.parametrize("kind", ["threaded", "non-threaded"])
def test_dropped_handler_keeps_no_connection(servers: Servers, kind: str) -> None:
    """A handler that was dropped without being left keeps no connection from those who come."""
    Connection.init(config_of(kind=kind, connection_count=1))
    held = [Handler("g")]
    held.clear()
    gc.collect()
    with Handler("g"):
        pass


def test_dropped_handler_keeps_no_connection_from_who_waits(servers: Servers) -> None:
    """A thread that already waits gets the connection of a handler that is dropped."""
    Connection.init(config_of(connection_count=1))
    held = [Handler("g")]
    outcomes: list[str] = []

    def work() -> None:
        with Handler("g"):
            outcomes.append("served")

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: waiting() == 1)
    held.clear()
    run(thread)
    assert outcomes == ["served"]


def test_one_endpoint_away_does_not_fail_the_start(servers: Servers) -> None:
    """With one endpoint that can be reached `init` succeeds, and all connections lead there."""
    servers.down["h1"] = "refused"
    Connection.init(config_of(entry("h1", connection_retry_sleep=60), entry("h2"), connection_count=4))
    assert servers.attempts == ["h1", "h2", "h2", "h2", "h2"]
    assert use_of(servers, 4) == ["h2"] * 4


def test_some_connections_refused_at_the_start(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes some connections and refuses the rest does not fail the start."""
    connect = servers.connect

    def take_two(**keywords: Any) -> Any:
        if len(servers.made) == 2:
            servers.down["h1"] = "too many clients"
        return connect(**keywords)

    monkeypatch.setattr(psycopg2, "connect", take_two)
    Connection.init(config_of(connection_count=4))
    assert [Connection.get_connection(("g", number))[0] is None for number in range(4)] == [False, False, True, True]


def test_no_endpoint_at_the_start(servers: Servers) -> None:
    """With none, `init` raises and tells each endpoint's reason; handlers work as soon as one is back."""
    servers.down |= {"h1": "refused", "h2": "no route"}
    config = config_of(entry("h1", connection_retry_sleep=0), entry("h2", connection_retry_sleep=0))
    with pytest.raises(DBConnectionError, match="'app' at h1: refused; 'app' at h2: no route"):
        Connection.init(config)
    servers.down.clear()
    wait_until(lambda: set(use_of(servers, 3)) == {"h1", "h2"})


def test_load_returns_to_an_endpoint_that_is_back(servers: Servers) -> None:
    """Connections that belong to an endpoint go back to it one by one when it serves again, and not a moment before."""
    servers.kind = Full
    servers.down["h1"] = "refused"
    Connection.init(config_of(entry("h1", connection_retry_sleep=0.05), entry("h2"), connection_count=4))
    assert use_of(servers, 4) == ["h2"] * 4
    servers.down.clear()
    wait_until(lambda: "h1" in use_of(servers, 4))
    assert use_of(servers, 8) == ["h1", "h2"] * 4 or use_of(servers, 8) == ["h2", "h1"] * 4
    assert [conn.host for conn in servers.made if conn.closed] == ["h2", "h2"]


def test_failed_endpoint_is_left_alone_for_its_retry_sleep(servers: Servers) -> None:
    """Handlers with a connection elsewhere do not try an endpoint that failed, before its retry sleep is over."""
    servers.down["h1"] = "refused"
    Connection.init(config_of(entry("h1", connection_retry_sleep=60), entry("h2"), connection_count=4))
    servers.attempts.clear()
    use_of(servers, 20)
    assert servers.attempts == []


def test_dead_connection_is_replaced_when_a_handler_starts(servers: Servers) -> None:
    """A connection that is known to have ended is replaced before the handler sees it, elsewhere if need be."""
    servers.kind = Full
    Connection.init(config_of(entry("h1", connection_retry_sleep=60), entry("h2"), connection_count=2))
    for conn in servers.made:
        conn.closed = 2
    servers.down["h1"] = "shutting down"
    assert use_of(servers, 2) == ["h2", "h2"]


def test_offline_error_after_ten_tries(servers: Servers) -> None:
    """When no endpoint comes back a handler gives up after ten tries and says why; its connection is not lost."""
    servers.kind = Full
    Connection.init(config_of(entry(connection_retry_sleep=0.01), connection_count=1))
    servers.attempts.clear()
    servers.made[0].closed = 2
    servers.down["h1"] = "connection refused"
    with pytest.raises(DBOfflineError, match="group 'g': no server can be reached: 'app' at h1: connection refused"):
        Handler("g")
    assert len(servers.attempts) == private_pool.TRIES
    assert Connection.get_connection_count(("g", 0)) == 0
    servers.down.clear()
    assert use_of(servers, 1) == ["h1"]


def test_handler_waits_for_a_server_that_restarts(servers: Servers) -> None:
    """A handler that finds no server tries again after the retry sleep, and gets a connection once it is back."""
    servers.kind = Full
    Connection.init(config_of(entry(connection_retry_sleep=0.05), connection_count=1))
    servers.made[0].closed = 2
    servers.down["h1"] = "starting up"
    timer = threading.Timer(0.12, servers.down.clear)
    timer.start()
    assert use_of(servers, 1) == ["h1"]
    timer.join()


def test_wait_for_a_server_is_bounded_by_the_timeout(servers: Servers) -> None:
    """A handler does not sleep beyond the group's `timeout`."""
    servers.kind = Full
    Connection.init(config_of(entry(connection_retry_sleep=60), connection_count=1, timeout=0.2))
    servers.made[0].closed = 2
    servers.down["h1"] = "refused"
    began = time.monotonic()
    with pytest.raises(DBOfflineError):
        Handler("g")
    assert time.monotonic() - began < 1


def test_one_refused_group_setting_is_an_endpoint_s_failure(servers: Servers) -> None:
    """An endpoint that connects and then cannot prepare the group's queries counts as one that failed."""
    servers.kind = Full
    servers.failure = psycopg2.ProgrammingError("no such function")
    with pytest.raises(DBConnectionError, match="no such function"):
        Connection.init(config_of(sqlprepare=True))
    assert all(conn.closed for conn in servers.made)


def test_connection_lost_in_a_transaction_is_not_replaced_in_it(servers: Servers) -> None:
    """Without autocommit the rest of a transaction never runs on another connection; after its end work goes on."""
    servers.kind = Full
    Connection.init(config_of(connection_count=1))
    with Handler("g") as db:
        db.query("first half")
        db.conn_ref.closed = 2
        with pytest.raises(DBOfflineError, match="lost in a transaction"):
            db.query("second half")
        db.commit()
        db.query("a new one")
    assert [conn.statements for conn in servers.made] == [["first half", "commit"], ["a new one", "commit"]]
    with Handler("g") as db:
        assert db.conn_ref is servers.made[1]


def test_connection_lost_in_autocommit_is_replaced(servers: Servers) -> None:
    """With autocommit the next statement runs on a new connection, and conn_ref is that one."""
    servers.kind = Full
    Connection.init(config_of(connection_count=1, autocommit=True))
    with Handler("g") as db:
        db.query("one")
        db.conn_ref.closed = 2
        db.query("two")
        assert db.conn_ref is servers.made[1]
        Query.execute(("g", 0), "three")
    assert servers.made[1].statements == ["isolation level 0", "two", "three", "commit"]
