"""The comparison with other pools runs: real Gunicorns, a real server, PgBouncer where it is."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg2
import pytest

from tests.support.postgres import require_postgres
from tools.bench.peers import pgbouncer
from tools.bench.peers.cases import CASES, Effort, compare
from tools.bench.peers.measure import refusals
from tools.bench.peers.sites import Shape, prepare, role_of
from tools.bench.peers.workloads import ACCOUNTS
from tools.pg_cluster import Cluster, Server

PEERS = ("raw", "shmpool", *(("pgbouncer", "pgbouncer-unix") if pgbouncer.PROGRAM else ()))
EFFORT = Effort(0.2, 1, 2, PEERS, ("transaction",), lambda _: None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with the table and the peers' roles."""
    require_postgres()
    with Cluster() as cluster:
        prepare(cluster.primary, PEERS, ACCOUNTS)
        yield cluster.primary


def test_every_peer_serves_within_the_same_number_of_sessions(server: Server) -> None:
    """Two workers on two connections: every request is answered, by both, and what it cost is known."""
    found = compare(server, Shape("transaction", 2, 1, 2, 4), PEERS, EFFORT)
    assert list(found.series) == list(PEERS)
    for series in found.series.values():
        assert [one.told.first_error for one in series.rounds] == ["", ""]
        (served,) = series.served
        assert (series.errors, series.refusals, len({worker for worker, _ in served})) == (0, 0, 2)
        assert 1 <= series.sessions <= 2
        assert series.cpu("server").median > 0
        assert series.cpu("workers").median > 0
        assert sum(served.values()) >= sum(one.told.requests for one in series.rounds)
    group = found.series["shmpool"].group
    assert group is not None
    assert (group.target, group.timeouts, group.errors) == (2, 0, 0)
    assert group.checkouts > 0


def test_the_server_counts_what_exceeds_a_peers_sessions(server: Server) -> None:
    """A session beyond the role's limit is refused, and found in the server's log."""
    role = role_of("raw")
    before = refusals(server, role)
    server.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")
    with pytest.raises(psycopg2.OperationalError, match="too many connections for role"):
        psycopg2.connect(server.conninfo(user=role))
    assert refusals(server, role) == before + 1


def test_a_connection_moves_between_two_masters(server: Server) -> None:
    """The time until an idle worker's connection is here is told beside that of a connect."""
    _, (connect, move) = CASES["moves"].measure(server, EFFORT)
    assert connect.found.endswith(" ms")
    assert move.is_met is not None
