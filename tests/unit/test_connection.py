"""What a connection is opened with: names, options, keywords; no server."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from psycopg2.extensions import cursor, parse_dsn

from shmpool.connection import APPLICATION_NAME_BYTES, Connection, Recipe, application_name, make_recipe
from tests.support.pools import endpoint_settings, group_settings


def recipe(server: str = "host=db user=app", **group: Any) -> Recipe:
    """Return the recipe of an endpoint with a conninfo and a group with changes."""
    settings = group_settings()._replace(**{"settings": {}, **group})
    return make_recipe(endpoint_settings()._replace(conninfo=server), settings, Connection, None, None)


def options(made: Recipe) -> str:
    """Return the start-up options of a recipe."""
    found: str = parse_dsn(made.dsn).get("options", "")
    return found


@pytest.mark.parametrize("prefix", ["", "web", "x" * 200, "ü" * 200, "€" * 30 + " tail", "  "])
@pytest.mark.parametrize("pool", ["web", "p" * 32])
@pytest.mark.parametrize("numbers", [(0, 1, 0), (4095, 2**32, 255)])
def test_application_name_keeps_the_mark_whole(prefix: str, pool: str, numbers: tuple[int, int, int]) -> None:
    """However long the prefix, what names the slot is whole, within what PostgreSQL keeps, and valid UTF-8."""
    name = application_name(prefix, pool, *numbers)
    row, generation, slot = numbers
    assert len(name.encode()) <= APPLICATION_NAME_BYTES
    assert name.endswith(f"shmpool:{pool}:{row}.{generation}:{slot}")
    assert name == name.strip()


def test_application_name_with_a_prefix() -> None:
    """A prefix that fits stands in front."""
    assert application_name("billing", "web", 3, 9, 1) == "billing shmpool:web:3.9:1"


@pytest.mark.parametrize("value", ["app", "a b", "a\\b", "a\\ b", "it's", '"$user", public', "x -c y=z", ""])
def test_option_values_survive_the_server_s_splitting(value: str) -> None:
    """A setting's value reaches the server as it is written, also with spaces, quotes and backslashes."""
    made = options(recipe(settings={"search_path": value}))
    assert split_as_the_server(made) == ["-c", f"search_path={value}"]


def split_as_the_server(text: str) -> list[str]:
    """Split start-up options as PostgreSQL's `pg_split_opts` does: spaces separate, a backslash takes what follows."""
    words: list[str] = []
    current, escaped = "", False
    for char in text + " ":
        if escaped:
            current, escaped = current + char, False
        elif char == "\\":
            escaped = True
        elif char == " ":
            if current:
                words.append(current)
            current = ""
        else:
            current += char
    return words


def test_settings_become_options() -> None:
    """Timeouts go in milliseconds, isolation and read-only as defaults of the session; what is off is left out."""
    made = options(
        recipe(
            statement_timeout=1.5,
            lock_timeout=0.25,
            idle_in_transaction_session_timeout=60.0,
            isolation_level="repeatable read",
            readonly=True,
        )
    )
    assert set(split_as_the_server(made)) == {
        "-c",
        "statement_timeout=1500",
        "lock_timeout=250",
        "idle_in_transaction_session_timeout=60000",
        "default_transaction_isolation=repeatable read",
        "default_transaction_read_only=on",
    }
    assert options(recipe()) == ""


def test_group_is_laid_over_the_endpoint() -> None:
    """The group's conninfo wins keyword by keyword; options add up, the group's after the endpoint's."""
    made = recipe(
        "host=db dbname=a user=app options='-c geqo=off'",
        conninfo="dbname=b options='-c work_mem=5MB'",
        settings={"jit": "off"},
    )
    found = parse_dsn(made.dsn)
    assert (found["host"], found["dbname"], found["user"]) == ("db", "b", "app")
    assert shlex.split(found["options"]) == ["-c", "geqo=off", "-c", "work_mem=5MB", "-c", "jit=off"]


def test_recipes_compare_by_what_they_open() -> None:
    """Equal settings give equal recipes, so that a reload keeps connections; a changed one differs."""
    assert recipe() == recipe()
    assert recipe() != recipe(readonly=True)


def test_recipe_keeps_the_factories() -> None:
    """Classes and hook of the pool are those of the recipe."""

    class Mine(Connection):
        """Of the application."""

    made = make_recipe(endpoint_settings(), group_settings(), Mine, cursor, print)
    assert (made.factory, made.cursor_factory, made.on_connect) == (Mine, cursor, print)
