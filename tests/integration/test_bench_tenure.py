"""The table of tenures: real processes, a real server, and a coordinator whose tenure is told."""

from __future__ import annotations

from tests.support.postgres import require_postgres
from tools.bench.rounds import alternate
from tools.bench.tenure import HEADS, OWN, crew, rows
from tools.pg_cluster import Cluster

SECONDS = 0.25


def test_a_longer_tenure_makes_for_fewer_opens() -> None:
    """One crew works under one tenure after the other; the coordinator's own is told, and the table has a line each."""
    require_postgres()
    with Cluster() as cluster, crew(cluster.primary.conninfo(), processes=3, connections=1) as found:
        turns = alternate(
            {
                "20 ms": lambda: found.turn("SELECT 1", 0.02, SECONDS),
                "200 ms": lambda: found.turn("SELECT 1", 0.2, SECONDS),
                OWN: lambda: found.turn("SELECT 1", 0.0, SECONDS),
            },
            2,
        )
    for short, long in zip(turns["20 ms"], turns["200 ms"], strict=True):
        assert short.opens > long.opens
        assert 0 < short.mean <= short.p99 <= short.longest
    assert all(0 < turn.tenure < 1 for turn in turns[OWN])
    lines = rows(turns)
    assert [line[0].split(":")[0] for line in lines] == list(turns)
    assert {len(line) for line in lines} == {len(HEADS)}
