"""One short run of the failover benchmark: what it measures, on this pool alone."""

from __future__ import annotations

from tests.support.postgres import require_postgres
from tools.bench.failover import figures, runs

SHORT = runs.Lengths(steady=0.5, dead=0.8, returned=0.3, frozen=1, promoted=1, counted=1)


def test_a_killed_replica_costs_one_use_per_connection_at_most() -> None:
    """A replica killed under load fails what was in use there, once; no idle connection, and no later use."""
    require_postgres()
    with runs.servers() as cluster:
        run = runs.killed_and_returned("shmpool", cluster, SHORT)
    row = figures.killed(run)
    in_use, idle = figures.sessions(run)
    assert row.failed <= len(in_use), row
    assert idle or in_use
    assert "0 of idle ones" in row.further, row
    assert not any(use.began > run.at["gone"] + 0.5 for use in run.uses if not use.is_good), row
    assert any(use.host == cluster.standbys[1].host and use.began > run.at["gone"] for use in run.uses)
