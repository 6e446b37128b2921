"""pgdbpool's dictionary as the configuration of a pool that the whole host shares."""

from __future__ import annotations

from typing import Any

import pytest

from shmpool.document import END, Document
from shmpool.names import Names
from shmpool.pgdbpool import Connection, DBConfigurationError, DBConnectionError, UnconfiguredGroupError
from shmpool.pgdbpool.configuration import parse
from shmpool.pgdbpool.shared import SharedPool, translate
from shmpool_coordinator.config import Config, warnings_of
from shmpool_coordinator.origin import parse_document
from shmpool_coordinator.probe import parse_conninfo
from tests.support.pgdbpool import config_of, entry, forgotten

PG_VARIABLES = ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own environment does not matter."""
    for name in PG_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def shared(*entries: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return a dictionary of type 'shared' with one group "g" of three connections."""
    return config_of(*entries, kind="shared", **keys)


def name_of(config: dict[str, Any]) -> str:
    """Return the name of the pool that a dictionary stands for."""
    return str(translate(parse(config))[0]["name"])


def checked(config: dict[str, Any]) -> Config:
    """Return what the coordinator makes of a dictionary."""
    tables, passwords, _ = translate(parse(config))
    return parse_document(Document(tables, passwords).encode().removesuffix(END)).read()


def test_every_key_has_its_place() -> None:
    """What the dictionary says is what the coordinator and the workers of the host act on."""
    keys: dict[str, Any] = {"connect_timeout": 7, "query_timeout": 1500, "session_tmp_buffer": 64, "ssl": "require"}
    one, two = entry("h1", port=5433, **keys), entry("h2", connection_retry_sleep=3)
    config = shared(one, two, autocommit=True, timeout=2.5) | {"linger": 4}
    config["groups"]["h"] = {"connection_count": 40}
    made = checked(config)
    assert parse_conninfo(made.endpoints["db1"].conninfo) == {
        "host": "h1",
        "port": "5433",
        "dbname": "app",
        "user": "me",
        "sslmode": "require",
        "connect_timeout": "7",
        "options": "-c statement_timeout=1500 -c temp_buffers=64MB",
    }
    assert parse_conninfo(made.endpoints["db2"].conninfo)["options"].startswith("-c statement_timeout=5000 ")
    assert [endpoint.max_connections for endpoint in made.endpoints.values()] == [43, 43]
    g, h = made.groups["g"], made.groups["h"]
    assert (g.connections, g.per_worker_max, g.autocommit, g.timeout) == (3, 3, True, 2.5)
    assert (h.connections, h.per_worker_max, h.autocommit, h.timeout) == (40, 40, False, 30)
    assert {group.target for group in (g, h)} == {"any"}
    assert {group.policy for group in (g, h)} == {"round-robin"}
    assert made.limits.slots_per_worker == 43
    assert made.coordinator.linger == 4
    assert made.probe.downinter == 1
    assert not warnings_of(made)


def test_passwords_stay_out_of_the_configuration() -> None:
    """Neither it nor the pool's name tells anything of them."""
    tables, passwords, _ = translate(parse(shared(entry("h1"), entry("h2", **{"pass": None}))))
    assert passwords == {"db1": "secret"}
    assert "secret" not in repr(tables)
    assert "secret" not in repr(SharedPool(parse(shared())))


def test_one_name_for_each_distinct_configuration() -> None:
    """Whatever matters makes another pool; a password, the order of keys, and what is a default anyway do not."""
    known = name_of(shared())
    assert Names.of(known).pool == known
    same = [shared(entry(**{"pass": "other"})), dict(reversed(shared().items())), shared(entry(ssl=False))]
    assert {name_of(config) for config in same} == {known}
    others = [
        shared(entry("h2")),
        shared(entry(name="other")),
        shared(entry(user="other")),
        shared(entry(port=5433)),
        shared(entry(query_timeout=1)),
        shared(connection_count=4),
        shared(autocommit=True),
        shared(timeout=6),
        shared(entry("h1"), entry("h2")),
        shared(entry("h2"), entry("h1")),
        shared() | {"linger": 1},
    ]
    names = {name_of(config) for config in others}
    assert len(names) == len(others)
    assert known not in names


def test_variables_of_libpq_count_as_if_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with other PGPORT and so on have another pool: the coordinator asks the servers that they use."""
    bare: dict[str, Any] = shared(entry() | dict.fromkeys(("host", "name", "user")))
    before = name_of(shared())
    for name, value in zip(PG_VARIABLES, ("h9", "5439", "you", "data"), strict=True):
        monkeypatch.setenv(name, value)
    keywords = parse_conninfo(checked(bare).endpoints["db1"].conninfo)
    assert [keywords[key] for key in ("host", "port", "user", "dbname")] == ["h9", "5439", "you", "data"]
    assert name_of(shared()) != before  # PGPORT


def test_any_name_of_a_group_is_taken() -> None:
    """Where shmpool does not allow it, another one stands for it, whatever the order."""
    groups = {name: {"connection_count": 1} for name in ("read", "Big Reports", "group-1", "Ä")}
    config = shared() | {"groups": groups}
    tables, _, names = translate(parse(config))
    assert names == {"read": "read", "group-1": "group-1", "Big Reports": "group-2", "Ä": "group-3"}
    assert set(tables["groups"]) == set(names.values())
    assert name_of(config) == name_of(config | {"groups": dict(reversed(groups.items()))})
    checked(config)


def test_two_entries_for_one_server_are_two_shares() -> None:
    """As in pgdbpool's rotation; the group's budget stays the bound for both together."""
    made = checked(shared(entry(), entry(), entry("h2")))
    assert list(made.endpoints) == ["db1", "db2", "db3"]
    assert made.groups["g"].connections == 3


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (shared() | {"groups": {}}, "groups: found 0"),
        (shared() | {"groups": {f"g{n}": {"connection_count": 1} for n in range(65)}}, "groups: found 65"),
        (shared(connection_count=65_536), "connection_count of all groups: found 65536"),
        (shared(*[entry()] * 65), "db: found 65"),
        (shared(entry() | {"host": None}), "db[0]: found host None"),
        (shared(entry("h1"), entry("h2,h3")), "db[1]: found host 'h2,h3'"),
    ],
)
def test_what_no_shared_pool_can_be_is_told_by_init(config: dict[str, Any], told: str) -> None:
    """All at once, and what was set up before stays."""
    with forgotten():
        Connection.init(shared())
        before = Connection._current
        with pytest.raises(DBConfigurationError) as caught:
            Connection.init(config)
        assert any(problem.startswith(told) for problem in caught.value.problems)
        assert Connection._current is before


def test_largest_shared_pools_are_accepted() -> None:
    """What `init` lets pass, the coordinator takes."""
    most = {f"g{n}": {"connection_count": 1023} for n in range(64)}
    checked(shared(*(entry(f"h{n}") for n in range(64))) | {"groups": most})


def test_nothing_is_looked_up_before_the_first_connection() -> None:
    """What needs no server works without one, and without a coordinator."""
    with forgotten():
        Connection.init(shared())
        assert Connection.get_threading_model() == "shared"
        assert Connection.get_max_pool_size("g") == 3
        assert Connection.get_connection_count(("g", 0)) == 0
        assert Connection.get_connection(("g", 0)) == (None, "free")
        with pytest.raises(UnconfiguredGroupError):
            Connection.get_connection(("other", 0))
        for use in (Connection.connect, lambda one: Connection.set_connection_status(one, "occupied")):
            with pytest.raises(DBConnectionError, match="not in use in this process"):
                use(("g", 0))
        assert not Names.of(name_of(shared())).leftovers()
