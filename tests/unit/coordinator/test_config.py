"""The configuration: the sample, values, findings and what is published to workers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgpack
import pytest
from pydantic import BaseModel

from shmpool.settings import PoolSettings
from shmpool_coordinator.config import (
    CONNECT_DEFAULTS,
    Config,
    ConfigError,
    Endpoint,
    Group,
    MaxLag,
    describe,
    duration_text,
    find,
    load,
    parse,
    warnings_of,
)
from shmpool_coordinator.probe import parse_conninfo

SAMPLE = Path(__file__).parents[3] / "coordinator" / "shmpool.example.toml"


def raw_config(**tables: Any) -> dict[str, Any]:
    """Return the smallest valid configuration, with top-level keys replaced."""
    smallest = {
        "name": "web",
        "endpoints": {"pg1": {"conninfo": "host=h", "max_connections": 10}},
        "groups": {"read": {"connections": 5}},
    }
    return smallest | tables


def with_endpoint(**keys: Any) -> dict[str, Any]:
    return raw_config(endpoints={"pg1": {"conninfo": "host=h", "max_connections": 10} | keys})


def with_group(**keys: Any) -> dict[str, Any]:
    return raw_config(groups={"read": {"connections": 5} | keys})


def findings(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the findings of a configuration, none for a valid one."""
    try:
        parse(raw, "test.toml")
    except ConfigError as error:
        return error.findings
    return ()


def only_finding(raw: Mapping[str, Any]) -> str:
    (finding,) = findings(raw)
    return finding


def keys_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's keys as nested dictionaries, with one name for tables of tables."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        candidates = (field.annotation, *get_args(field.annotation))
        tables = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        keys[name] = keys_of(tables[0]) if tables else None
    return keys


def test_sample_has_every_key_and_no_other() -> None:
    """The sample shows exactly the keys of the model, in every table."""
    raw = tomllib.loads(SAMPLE.read_text())
    shown = {name: dict.fromkeys(table) if isinstance(table, dict) else None for name, table in raw.items()}
    endpoint, group = raw["endpoints"]["pg1"], raw["groups"]["read"]
    shown["endpoints"] = dict.fromkeys(endpoint) | {"credentials": dict.fromkeys(endpoint["credentials"])}
    shown["groups"] = dict.fromkeys(group)
    assert shown == keys_of(Config)


def test_sample_shows_the_defaults() -> None:
    """What the sample shows is what a file without these keys gets."""
    sample = load(SAMPLE)
    raw = tomllib.loads(SAMPLE.read_text())
    bare = parse(
        {
            "name": raw["name"],
            "endpoints": {"pg1": {key: raw["endpoints"]["pg1"][key] for key in ("conninfo", "max_connections")}},
            "groups": {
                "read": {"connections": raw["groups"]["read"]["connections"]},
                "write": raw["groups"]["write"],
            },
        },
        str(SAMPLE),
    )
    rows = {"pg1": 0}, {"read": 0, "write": 1}
    assert sample.settings(*rows) == bare.settings(*rows)
    everything_else = {"endpoints", "groups"}
    assert sample.model_dump(exclude=everything_else) == bare.model_dump(exclude=everything_else)


def test_sample_has_no_warnings() -> None:
    """The sample can be taken as a start without being scolded."""
    assert warnings_of(load(SAMPLE)) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("30s", 30),
        ("1h", 3600),
        ("5m", 300),
        ("5min", 300),
        ("2d", 172800),
        ("0.5s", 0.5),
        (" 3 s ", 3),
        (7, 7),
        (0.25, 0.25),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    """A duration is a text with a unit, or a number of seconds."""
    config = parse(with_group(timeout=text), "test.toml")
    assert config.groups["read"].timeout == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    ["", "30", "5 parsecs", "-1s", -1, True, float("nan"), float("inf"), 10**400, [], "9" * 400 + "s"],
)
def test_no_durations(value: object) -> None:
    """What is no duration is told with its key and an example."""
    assert only_finding(with_group(timeout=value)).startswith("groups.read.timeout: found ")
    assert 'expected a duration such as "30s"' in only_finding(with_group(timeout=value))


def test_empty_means_off_only_where_the_sample_shows_it() -> None:
    """An empty text switches an optional bound off; zero, which servers read as off, is refused."""
    assert parse(with_group(query_timeout=""), "").groups["read"].query_timeout is None
    assert findings(with_group(statement_timeout="0s"))
    assert findings(with_group(max_idle=""))
    assert findings(with_group(statement_timeout="30d"))


@pytest.mark.parametrize(
    ("value", "max_lag"),
    [
        ("", MaxLag()),
        ("16MB", MaxLag(bytes=16 << 20)),
        ("64kB", MaxLag(bytes=64 << 10)),
        ("1.5GB", MaxLag(bytes=3 << 29)),
        ("5s", MaxLag(seconds=5)),
        ("5m", MaxLag(seconds=300)),
    ],
)
def test_max_lag(value: str, max_lag: MaxLag) -> None:
    """A lag is a size or a duration, told apart by its unit."""
    assert parse(with_group(max_lag=value), "").groups["read"].max_lag == max_lag


@pytest.mark.parametrize("value", [5, "5", "16XB", "mb", True, None])
def test_no_max_lag(value: object) -> None:
    """A lag without a known unit is refused."""
    assert "groups.read.max_lag" in only_finding(with_group(max_lag=value))


def test_modes() -> None:
    """A mode is private or for one group; decimal slips are shown as what they are."""
    assert parse(raw_config(access={"mode": "0600"}), "").access.effective_mode == 0o600
    assert parse(raw_config(access={"group": "web"}), "").access.effective_mode == 0o660
    assert "found 0o1130" in only_finding(raw_config(access={"mode": 600}))
    assert "without a group" in only_finding(raw_config(access={"mode": 0o660}))


@pytest.mark.parametrize(
    ("table", "key", "low", "high"),
    [
        ("limits", "workers", 1, 4096),
        ("limits", "slots_per_worker", 8, 256),
        ("limits", "endpoints", 1, 64),
        ("limits", "groups", 1, 64),
        ("probe", "rise", 1, 100),
        ("probe", "fall", 1, 100),
    ],
)
def test_ranges(table: str, key: str, low: int, high: int) -> None:
    """The bounds of a number are allowed and the next ones are not."""
    for value in (low, high):
        assert findings(raw_config(**{table: {key: value}})) == ()
    for bad in (low - 1, high + 1, True, "1", 1.0):
        assert findings(raw_config(**{table: {key: bad}})), bad


def test_caps_fit_a_control_word() -> None:
    """Caps are counted in 16 bits."""
    assert findings(with_group(connections=65535)) == ()
    assert "from 1 to 65535" in only_finding(with_group(connections=65536))
    assert "from 1 to 65535" in only_finding(with_endpoint(max_connections=0))


def test_all_findings_at_once() -> None:
    """Errors of all kinds in all tables are told together, each on a line of its own."""
    raw = raw_config(
        name="Web",
        limits={"workers": 0},
        endpoints={"pg1": {"conninfo": "host=a,b", "max_connections": 0}},
        groups={"read": {"connections": "4", "endpoints": ["pg2"], "conninfo": "port=1"}},
    )
    with pytest.raises(ConfigError) as caught:
        parse(raw, "test.toml")
    paths = [finding.split(":")[0] for finding in caught.value.findings]
    assert sorted(paths) == [
        "endpoints.pg1.conninfo",
        "endpoints.pg1.max_connections",
        "groups.read.connections",
        "groups.read.conninfo",
        "groups.read.endpoints",
        "limits.workers",
        "name",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == "test.toml: 7 errors"
    assert all(any(line.strip().startswith(path) for line in lines) for path in paths)


def test_wrong_values_do_not_cause_further_findings() -> None:
    """A comparison with a value that is itself wrong is left out."""
    assert only_finding(with_group(per_worker_min=9, per_worker_max="x")).startswith("groups.read.per_worker_max")
    assert only_finding(raw_config(limits={"slots_per_worker": 4, "workers": 0})).startswith("limits.workers")


def test_unknown_keys() -> None:
    """An unknown key is an error with the nearest known one, or all of them."""
    assert 'did you mean "connections"?' in findings(with_group(conections=5))[0]
    assert "expected one of conninfo, max_connections" in only_finding(with_endpoint(zzz=5))
    assert 'did you mean "limits"?' in only_finding(raw_config(limit={}))
    assert 'did you mean "password_env"?' in only_finding(with_endpoint(credentials={"pasword_env": "X"}))


@pytest.mark.parametrize("missing", ["name", "endpoints", "groups"])
def test_required_keys(missing: str) -> None:
    """A missing key is told as required."""
    raw = raw_config()
    del raw[missing]
    assert only_finding(raw) == f"{missing}: found nothing, expected a value, this key is required"


def test_at_least_one_endpoint_and_group_and_no_more_than_the_limits() -> None:
    """Tables of tables are neither empty nor larger than their limit."""
    assert "expected at least one [groups.<name>] table" in only_finding(raw_config(groups={}))
    assert any("expected at least one" in f for f in findings(raw_config(endpoints={})))
    two = {"a": {"connections": 1}, "b": {"connections": 1}}
    assert only_finding(raw_config(groups=two, limits={"groups": 1})).startswith("groups: found 2")


@pytest.mark.parametrize("name", ["", "PG", "-a", "_a", "a.b", "a b", "a" * 49, "ä"])
def test_names(name: str) -> None:
    """A name that does not fit a file name or a conninfo is refused, wherever it stands."""
    assert findings(raw_config(name=name))
    assert findings(raw_config(endpoints={name: {"conninfo": "host=h", "max_connections": 1}}))
    assert findings(raw_config(groups={name: {"connections": 1}}))


def test_a_table_is_expected() -> None:
    """A value in the place of a table is told without showing it."""
    finding = only_finding(raw_config(endpoints={"pg1": "host=h password=hunter2"}))
    assert finding == "endpoints.pg1: found a text, expected a table"


def test_group_names_only_configured_endpoints() -> None:
    """A group's endpoints exist, once each."""
    assert 'did you mean "pg1"?' in only_finding(with_group(endpoints=["pg2"]))
    assert "each name once" in only_finding(with_group(endpoints=["pg1", "pg1"]))


def test_per_worker_bounds() -> None:
    """A worker's least is not above its most, and its most not above its slots."""
    assert "at most per_worker_max, 8" in only_finding(with_group(per_worker_min=9))
    assert only_finding(with_group(connections=4, reserve=4)).endswith("less than connections, 4")
    assert "at most limits.slots_per_worker, 32" in only_finding(with_group(per_worker_max=33))


@pytest.mark.parametrize("secret", ["password=hunter2", "sslpassword=hunter2"])
@pytest.mark.parametrize("place", ["endpoint", "group", "probe"])
def test_no_secret_in_a_conninfo(secret: str, place: str) -> None:
    """A password in a conninfo is refused with the ways to give one, and not shown."""
    raw = {
        "endpoint": with_endpoint(conninfo=f"host=h {secret}"),
        "group": with_group(conninfo=secret),
        "probe": raw_config(probe={"conninfo": secret}),
    }[place]
    finding = only_finding(raw)
    for way in ("password_file", "password_command", "password_env", "passfile"):
        assert way in finding
    assert "hunter2" not in finding


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=h password=a hunter2",
        "host=h password='hunter2",
        "postgresql://u:hunter2@[h/d",
        "postgresql://u:hunter2@h/d",
        "host=h\x00password=hunter2",
        "host=a,b password=hunter2",
    ],
)
def test_no_message_shows_a_password(conninfo: str) -> None:
    """However a conninfo with a password is broken, no part of it is shown."""
    with pytest.raises(ConfigError) as caught:
        parse(with_endpoint(conninfo=conninfo), "test.toml")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__suppress_context__


def test_unparsable_conninfo_shows_the_reason() -> None:
    """What libpq says is passed on where it cannot be a secret."""
    assert 'invalid connection option "hst"' in only_finding(with_endpoint(conninfo="hst=a"))


@pytest.mark.parametrize(
    ("conninfo", "tables"),
    [
        ("host=a,b port=1,2 dbname=app", ({"host": "a", "port": "1"}, {"host": "b", "port": "2"})),
        ("host=a,b port=1 dbname=app", ({"host": "a", "port": "1"}, {"host": "b", "port": "1"})),
        ("host=a port=1,2 dbname=app", ({"host": "a", "port": "1"}, {"host": "a", "port": "2"})),
        ("hostaddr=::1,::2 dbname=app", ({"hostaddr": "::1"}, {"hostaddr": "::2"})),
        (
            "host=a,b hostaddr=::1,::2 port=1,2 dbname=app",
            ({"host": "a", "hostaddr": "::1", "port": "1"}, {"host": "b", "hostaddr": "::2", "port": "2"}),
        ),
        ("postgresql://a:1,b:2/app", ({"host": "a", "port": "1"}, {"host": "b", "port": "2"})),
        ("postgresql://u@[::1],b:2/app", ({"host": "::1", "user": "u"}, {"host": "b", "port": "2", "user": "u"})),
    ],
)
def test_several_hosts_show_the_tables_to_write(conninfo: str, tables: tuple[dict[str, str], ...]) -> None:
    """A conninfo with several hosts is answered with one table for each, which together are a valid configuration."""
    (finding,) = findings(with_endpoint(conninfo=conninfo))
    asked = "expected one; write a table for each, with a max_connections of its own:"
    assert finding.splitlines()[0] == f"endpoints.pg1.conninfo: found 2 hosts, {asked}"
    written = tomllib.loads("\n".join(finding.splitlines()[1:]))["endpoints"]
    told = {name: parse_conninfo(table["conninfo"]) for name, table in written.items()}
    assert told == {name: {"dbname": "app"} | table for name, table in zip(("pg1", "pg1-2"), tables, strict=True)}
    assert findings(raw_config(endpoints=written)) == ()


def test_several_hosts_and_further_errors() -> None:
    """What else is wrong is told beside it, a secret is not repeated, and lists that do not fit get no tables."""
    raw = with_endpoint(conninfo="host=a,b password=geheim target_session_attrs=any load_balance_hosts=random")
    told = findings(raw)
    assert len(told) == 4
    assert "geheim" not in "".join(told)
    (tables,) = (finding for finding in told if "[endpoints.pg1-2]" in finding)
    assert "target_session" not in tables
    assert "load_balance" not in tables
    assert only_finding(with_endpoint(conninfo="host=a,b port=1,2,3")) == (
        "endpoints.pg1.conninfo: found several hosts (2 in `host` and 3 in `port`, which do not belong together),"
        " expected one host and one port"
    )


def test_a_service_with_several_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service file is looked into; what the conninfo says itself counts, and the file's secrets are not shown."""
    file = tmp_path / "pg_service.conf"
    file.write_text("# services\n[one]\nhost=a\n[both]\nhost=a,b\nport=1,2\npassword=geheim\n[last]\nhost=c,d\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    assert findings(with_endpoint(conninfo="service=one")) == ()
    assert findings(with_endpoint(conninfo="service=unknown")) == ()
    assert findings(with_endpoint(conninfo="service=both host=c port=3")) == ()
    finding = only_finding(with_endpoint(conninfo="service=both dbname=app"))
    assert "found 2 hosts, in the service both" in finding
    assert "geheim" not in finding
    written = tomllib.loads("\n".join(finding.splitlines()[1:]))["endpoints"]
    assert [parse_conninfo(table["conninfo"]) for table in written.values()] == [
        {"service": "both", "dbname": "app", "host": "a", "port": "1"},
        {"service": "both", "dbname": "app", "host": "b", "port": "2"},
    ]
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "missing"))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    assert "found 2 hosts" in only_finding(with_endpoint(conninfo="service=last"))


def test_load_balance_hosts() -> None:
    """It belongs to a name of several servers; elsewhere the group's policy does it."""
    keywords = "host=h load_balance_hosts=random"
    assert "`policy`" in only_finding(with_endpoint(conninfo=keywords))
    assert findings(with_endpoint(conninfo=keywords, address="service")) == ()
    assert "`policy`" in only_finding(with_group(conninfo="load_balance_hosts=random"))


def test_warnings_about_poolers_and_names() -> None:
    """What a pooler refuses, forgets or passes on, and what a name of several servers has not, is told."""
    endpoints = {
        "bouncer": {"conninfo": "host=h options=-cwork_mem=1MB", "max_connections": 10, "via": "pooler"},
        "name": {"conninfo": "host=h", "max_connections": 10, "address": "service"},
    }
    groups = {
        "a": {"connections": 1, "endpoints": ["bouncer"], "statement_timeout": "1s", "readonly": True},
        "b": {"connections": 1, "endpoints": ["bouncer"], "autocommit": False, "readonly": True},
        "c": {"connections": 1, "endpoints": ["bouncer"], "conninfo": "options=-cwork_mem=1MB"},
        "d": {"connections": 1, "endpoints": ["name"], "statement_timeout": "1s", "max_lag": "1s"},
    }
    told = warnings_of(parse(raw_config(endpoints=endpoints, groups=groups), ""))
    assert [warning.split(": ")[0] for warning in told] == [
        "endpoints.bouncer.conninfo",
        "groups.a",
        "groups.c.conninfo",
        "groups.d.max_lag",
    ]
    assert "statement_timeout, readonly behind bouncer" in told[1]


@pytest.mark.parametrize("key", ["host", "hostaddr", "port", "service"])
def test_overlays_have_no_place(key: str) -> None:
    """Where a server is belongs to its endpoint alone."""
    for raw in (with_group(conninfo=f"{key}=1"), raw_config(probe={"conninfo": f"{key}=1"})):
        assert f"found `{key}`" in only_finding(raw)


def test_keywords_that_work_against_the_pool() -> None:
    """application_name and target_session_attrs are refused with the key to use."""
    for key, place in (("application_name", "application_name"), ("target_session_attrs", "target")):
        finding = only_finding(with_endpoint(conninfo=f"host=h {key}=any"))
        assert f"[groups.<name>] {place}" in finding


def test_an_endpoint_says_where_it_is() -> None:
    """A conninfo without a place would lead each process elsewhere."""
    assert "found no host" in only_finding(with_endpoint(conninfo="dbname=app"))
    for conninfo in ("service=s", "hostaddr=127.0.0.1", "host=/run/postgresql", "postgresql://h/d"):
        assert findings(with_endpoint(conninfo=conninfo)) == ()


def test_credentials() -> None:
    """One source at most, with a path that is the same for everyone."""
    two = {"password_env": "A", "password_file": "/run/a"}
    assert "found password_file and password_env" in only_finding(with_endpoint(credentials=two))
    relative = only_finding(with_endpoint(credentials={"password_file": "hunter2"}))
    assert "absolute path" in relative
    assert "hunter2" not in relative


def test_enumerations() -> None:
    """A choice is told with all its values."""
    for key in ("target", "policy", "reset", "isolation_level"):
        assert 'expected one of "' in only_finding(with_group(**{key: "foo"}))
    for key in ("address", "via"):
        assert 'expected one of "' in only_finding(with_endpoint(**{key: "foo"}))


@pytest.mark.parametrize(
    ("target", "autocommit"),
    [("primary", False), ("replica", True), ("prefer-replica", True), ("any", False)],
)
def test_autocommit_follows_the_target(target: str, autocommit: bool) -> None:
    """Without a value, groups that only read commit by themselves; a value wins."""
    for value, expected in ((None, autocommit), (True, True), (False, False)):
        keys = {} if value is None else {"autocommit": value}
        config = parse(with_group(target=target, **keys), "")
        assert config.groups["read"].effective_autocommit is expected


def test_server_settings() -> None:
    """Server settings become texts; those with a key of their own are refused."""
    given = {"search_path": "app", "work_mem": 64, "jit": False, "my.flag": 1.5}
    settings = parse(with_group(settings=given), "").groups["read"].settings
    assert settings == {"search_path": "app", "work_mem": "64", "jit": "off", "my.flag": "1.5"}
    own = only_finding(with_group(settings={"Lock_Timeout": "1s"}))
    assert "groups.read.lock_timeout" in own
    assert findings(with_group(settings={"a; b": "1"}))


def test_settings_for_workers() -> None:
    """Workers get rows, derived values and connect defaults, and msgpack carries them whole."""
    raw = with_group(max_lag="5s") | {
        "endpoints": {"pg1": {"conninfo": "host=h connect_timeout=9", "max_connections": 3}}
    }
    settings = parse(raw, "/etc/web.toml").settings({"pg1": 4}, {"read": 2})
    assert PoolSettings.from_dict(msgpack.unpackb(msgpack.packb(settings.as_dict()))) == settings
    assert settings.config_file == "/etc/web.toml"
    (endpoint,), (group,) = settings.endpoints, settings.groups
    assert (endpoint.index, group.index) == (4, 2)
    assert (group.autocommit, group.max_lag_s, group.max_lag_bytes) == (True, 5.0, None)
    assert parse_conninfo(endpoint.conninfo) == {
        **CONNECT_DEFAULTS,
        "host": "h",
        "connect_timeout": "9",
    }


def test_warnings() -> None:
    """What is allowed but hardly meant is told."""
    raw = raw_config(
        probe={"inter": "1s", "fastinter": "2s"},
        limits={"slots_per_worker": 10},
        groups={
            "big": {"connections": 11, "target": "replica", "fallback_connections": 1},
            "other": {"connections": 1},
            "warm": {"connections": 9, "reserve": 2, "per_worker_min": 2},
        },
    )
    keys = [warning.split(":")[0] for warning in warnings_of(parse(raw, ""))]
    assert keys == [
        "probe.fastinter",
        "groups.big.connections",
        "groups.big.target",
        "groups.big.fallback_connections",  # not with this target
        "groups.warm.per_worker_min",  # for three workers
        "limits.slots_per_worker",
    ]


def test_groups_may_share_more_than_an_endpoint_allows() -> None:
    """Caps of groups that add up to more than the endpoint's are the point of sharing."""
    two = {"a": {"connections": 10}, "b": {"connections": 10}}
    assert warnings_of(parse(raw_config(groups=two), "")) == []


def test_description() -> None:
    """The description has every endpoint and group with its effective values."""
    text = describe(load(SAMPLE))
    assert "endpoint pg1: at most 60 connections of the groups and 2 sessions of the coordin" in text
    assert "tcp_user_timeout=30000" in text
    assert "group write: at most 10 connections, target primary, on pg1\n  autocommit=false" in text
    for key in set(Group.model_fields) - {"connections", "target", "endpoints"}:
        assert f"{key}=" in text
    for key in set(Endpoint.model_fields) - {"conninfo", "max_connections", "credentials"}:
        assert f"{key}=" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (0.5, "500ms"), (90, "90s"), (300, "5m"), (7200, "2h")])
def test_duration_text(seconds: float, text: str) -> None:
    """A duration is shown as one would write it."""
    assert duration_text(seconds) == text


def test_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The argument goes before the environment; neither is an error that names the variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHMPOOL_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="SHMPOOL_CONFIG"):
        find(None)
    monkeypatch.setenv("SHMPOOL_CONFIG", "env.toml")
    assert find(None) == tmp_path / "env.toml"
    assert find("arg.toml") == tmp_path / "arg.toml"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        (b"a = \n", "line 1"),
        (b"name = 'a'\n\xff", "not UTF-8 (at line 2)"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, told: str) -> None:
    """A file that cannot be read or is not TOML is told in one line with its name."""
    path = tmp_path / "web.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """A directory is told as such."""
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_configuration_is_frozen() -> None:
    """A configuration does not change once it was checked."""
    config = load(SAMPLE)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"
