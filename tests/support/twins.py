"""Two servers on one port of two loopback addresses: pgdbpool's configuration knows hosts and no ports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg2
import pytest

from tests.support.pgdbpool import forgotten
from tests.support.postgres import require_postgres
from tests.support.waiting import wait_until
from tools.pg_cluster import HOST, Cluster, Server

SECOND_HOST = "127.0.0.2"

PREPARED = """
CREATE SCHEMA "SQLPrepare";
CREATE FUNCTION "SQLPrepare"."PrepareQueries"() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN EXECUTE 'PREPARE "double" (int) AS SELECT $1 * 2'; RETURN true; END $$;
CREATE FUNCTION "SQLPrepare"."ExecuteQuery"(kind char, name varchar, request json, names varchar[]) RETURNS json
LANGUAGE plpgsql AS $$
DECLARE answer int;
BEGIN
    EXECUTE format('EXECUTE %I (%s)', name, request ->> names[1]) INTO answer;
    RETURN json_build_array(json_build_object('answer', answer));
END $$
"""


class Twins(NamedTuple):
    """Two servers that know nothing of each other."""

    first: Server
    second: Server

    def ask(self, host: str, sql: str) -> Any:
        """Ask one of them for a value, beside the pool."""
        conn = psycopg2.connect(self.first.conninfo(host=host))
        try:
            conn.autocommit = True
            with conn.cursor() as cur:
                cur.execute(sql)
                return cur.fetchone()[0] if cur.description else None  # type: ignore[index]
        finally:
            conn.close()

    def sessions(self, host: str = HOST) -> set[int]:
        """Return the server processes of clients, but for who asks."""
        mine = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        return set(self.ask(host, f"SELECT array_agg(pid) FROM pg_stat_activity WHERE {mine}") or ())

    def end(self, pid: int) -> None:
        """Terminate a session of the first server and wait for its end."""
        self.ask(HOST, f"SELECT pg_terminate_backend({pid})")
        wait_until(lambda: pid not in self.sessions())


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    """Two servers on one port; the first logs every statement and has `items` and the prepared queries."""
    require_postgres()
    with (
        Cluster(settings={"log_statement": "all"}) as first,
        Cluster(settings={"listen_addresses": SECOND_HOST}) as second,
    ):
        second.primary.stop()
        second.primary.port = first.primary.port
        second.primary.start()
        first.primary.execute(PREPARED)
        first.primary.execute("CREATE TABLE items (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        yield Twins(first.primary, second.primary)


@pytest.fixture
def at_work(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twins]:
    """The servers, reached by what pgdbpool's configuration says; `items` is empty; no session is left afterwards."""
    monkeypatch.setenv("PGPORT", str(twins.first.port))
    twins.first.execute("TRUNCATE items")
    with forgotten():
        yield twins
    for server in twins:
        server.start()
    gc.collect()
    left: dict[str, set[int]] = {HOST: set(), SECOND_HOST: set()}

    def are_gone() -> bool:
        left.update({host: twins.sessions(host) for host in left})
        return not any(left.values())

    wait_until(are_gone, what=lambda: f"no session left, but: {left}")
