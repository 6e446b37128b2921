"""pgdbpool's configuration: defaults, accepted forms, errors."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import pytest

from shmpool.pgdbpool import DBConfigurationError
from shmpool.pgdbpool.configuration import EndpointSettings, GroupSettings, parse
from tests.support.pgdbpool import config_of, entry


def endpoint_of(**keys: Any) -> EndpointSettings:
    """Return the settings of a single endpoint."""
    return parse(config_of(entry(**keys))).endpoints[0]


def problems_of(config: object) -> tuple[str, ...]:
    """Return what is wrong with a configuration."""
    with pytest.raises(DBConfigurationError) as caught:
        parse(config)
    return caught.value.problems


def test_defaults() -> None:
    """What is left out has the value that pgdbpool's code gives it, not the one of its documentation."""
    settings = parse({"db": entry(), "groups": {"g": {"connection_count": 2}}})
    assert settings.type == "threaded"
    assert settings.endpoints == (EndpointSettings("h1", "app", "me", "secret", "disable", 10, 1.0, 5000, 128, None),)
    assert dict(settings.groups) == {"g": GroupSettings("g", 2, autocommit=False, sqlprepare=False, timeout=30.0)}


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (False, "disable"),
        (True, "require"),
        ("off", "disable"),
        ("on", "require"),
        ("prefer", "prefer"),
        ("verify-full", "verify-full"),
    ],
)
def test_ssl(given: object, mode: str) -> None:
    """`ssl` takes libpq's words and the forms that pgdbpool's documentation and tests show."""
    assert endpoint_of(ssl=given).ssl == mode


def test_numbers_as_text() -> None:
    """Numbers from the environment are text: what pgdbpool hands on to libpq or the server is accepted so."""
    settings = endpoint_of(connect_timeout="4", query_timeout="250", session_tmp_buffer="8")
    assert (settings.connect_timeout, settings.query_timeout, settings.session_tmp_buffer) == (4, 250, 8)


def test_absent_values_are_libpq_s_own() -> None:
    """None for host, name, user or password leaves the choice to libpq, as with psycopg2."""
    assert endpoint_of(host=None, **{"pass": None}).password is None


def test_one_or_several_entries() -> None:
    """`db` is a dictionary or a list of them; each has settings of its own."""
    assert len(parse(config_of(entry("h1"), entry("h2", query_timeout=7))).endpoints) == 2
    first, second = parse(config_of(entry("h1"), entry("h2", query_timeout=7))).endpoints
    assert (first.query_timeout, second.query_timeout) == (5000, 7)


def test_everything_wrong_is_said_at_once() -> None:
    """One error names every key that is wrong, what was found and what is expected."""
    told = problems_of(
        {
            "type": "shard",
            "db": [
                {"host": 7, "name": "app", "user": "me", "pass": "x", "ssl": "maybe", "colour": "red"},
                entry(query_timeout=-1, connect_timeout=1.5, session_tmp_buffer=True),
                "host=h1",
            ],
            "groups": {"g": {"autocommit": 1, "timeout": "soon"}, "h": {"connection_count": 0}},
        }
    )
    for where, found, expected in (
        ("configuration", "type = 'shard'", "'threaded' or 'non-threaded'"),
        ("db[0]", "host = 7", "a text"),
        ("db[0]", "ssl = 'maybe'", "one of disable, allow"),
        ("db[0]", "the key 'colour'", "one of host, name, user, pass"),
        ("db[1]", "query_timeout = -1", "milliseconds"),
        ("db[1]", "connect_timeout = 1.5", "a whole number of seconds"),
        ("db[1]", "session_tmp_buffer = True", "megabytes"),
        ("db[2]", "'host=h1'", "a dictionary"),
        ("groups['g']", "no key 'connection_count'", "1 or more"),
        ("groups['g']", "autocommit = 1", "True or False"),
        ("groups['g']", "timeout = 'soon'", "seconds"),
        ("groups['h']", "connection_count = 0", "1 or more"),
    ):
        assert any(
            one.startswith(f"{where}: found ") and found in one and expected in one.partition("expected")[2]
            for one in told
        ), (where, found, told)
    assert len(told) == 12


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "expected a dictionary"),
        ({}, "no key 'db'"),
        ({"db": [], "groups": {}}, "a list of at least one"),
        ({"db": entry(), "groups": []}, "a dictionary of groups by name"),
        ({"db": entry(), "groups": {1: {}}}, "a dictionary of groups by name"),
        ({"db": entry(), "groups": {"g": 5}}, "groups['g']: found 5, expected a dictionary"),
        ({"db": entry(), "groups": {}, "group": {}}, "the key 'group'"),
    ],
)
def test_wrong_shapes(config: object, told: str) -> None:
    """What is no configuration at all is an error that says so, not an exception from inside."""
    assert any(told in problem for problem in problems_of(config))


def test_password_is_never_shown() -> None:
    """Neither an error nor the settings' repr shows a password, wherever it was put."""
    told = problems_of(config_of(entry(**{"pass": b"hidden"}), entry(host={"password": "hidden"}), ("hidden",)))  # type: ignore[arg-type]
    assert "pass = a value of type bytes" in told[0]
    assert "hidden" not in "".join(told)
    assert "secret" not in repr(parse(config_of()))


def test_configuration_is_not_changed() -> None:
    """The dictionary is as it was afterwards, whatever pgdbpool would have written into it; it may be read-only."""
    config = config_of(entry(), entry("h2"))
    before = copy.deepcopy(config)
    parse(config)
    assert config == before
    frozen = MappingProxyType({key: MappingProxyType(v) if isinstance(v, dict) else v for key, v in config.items()})
    assert parse(frozen) == parse(config)


def test_dictionary_that_pgdbpool_used() -> None:
    """A dictionary that pgdbpool has written its own state into is accepted."""
    config = config_of(connections=[(None, "free")], connection_iter=iter(()))
    assert parse(config).groups["g"].connection_count == 3
