"""Where a configuration comes from: what a process gives, and what is said about it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmpool.document import END, MAX_BYTES, Document
from shmpool_coordinator.config import ConfigError
from shmpool_coordinator.origin import KEPT, File, Passwords, given_by, parse_document
from tests.support.secrets import is_shown

SECRET = "not-to-be-seen"
CONFIG: dict[str, Any] = {
    "name": "web",
    "endpoints": {
        "pg1": {"conninfo": "host=h", "max_connections": 10},
        "pg2": {"conninfo": "host=i", "max_connections": 10},
    },
    "groups": {"read": {"connections": 5}},
}


def text_of(config: Any = CONFIG, passwords: Any = None, **more: Any) -> bytes:
    return json.dumps({"config": config, "passwords": passwords or {}} | more).encode()


@contextmanager
def pipe_with(text: bytes) -> Iterator[int]:
    """A pipe that holds a text and is still open for writing."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, text)
    try:
        yield read_fd
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_it_is_the_configuration_that_a_file_would_be() -> None:
    """Checked and completed alike; workers are told its digest instead of a file."""
    given = parse_document(text_of(passwords={"pg1": SECRET}))
    config = given.read()
    assert config.groups["read"].timeout == 5.0
    assert config.source == ""
    settings = config.settings({"pg1": 0, "pg2": 1}, {"read": 0})
    assert (settings.config_file, settings.document) == ("", Document(CONFIG).digest)
    assert given.passwords is not None
    assert given.passwords("pg1") == SECRET
    assert given.passwords("pg2") == {}


def test_all_findings_come_at_once() -> None:
    """Those of the configuration and those of the passwords, in one error."""
    config = CONFIG | {"groups": {"read": {"connections": 0, "nonsense": 1}}}
    with pytest.raises(ConfigError) as caught:
        parse_document(text_of(config, {"pg1": 5, "pg3": SECRET}))
    told = "\n".join(caught.value.findings)
    for part in ("groups.read.connections", "groups.read.nonsense", "passwords.pg1", "a name that no endpoint has"):
        assert part in told
    assert caught.value.source == "standard input"


@pytest.mark.parametrize(
    "text",
    [
        b"{" + SECRET.encode(),
        b"[" * 10_000,
        b"",
        text_of(5),
        text_of(password=SECRET),
        text_of(passwords=[SECRET]),
        text_of(passwords={SECRET: "pg1"}),
        text_of(passwords={"pg1": [SECRET]}),
        text_of(passwords={"pg1": SECRET + "\0"}),
        text_of(passwords={"pg1": SECRET + "\ud800"}),
        text_of(CONFIG | {"endpoints": {"pg1": {"conninfo": f"host=h password={SECRET}", "max_connections": 1}}}),
        text_of(CONFIG | {"endpoints": {"pg1": {"conninfo": "host=h", "max_connections": 1, "pass": SECRET}}}),
        text_of(
            CONFIG
            | {
                "endpoints": {
                    "pg1": {"conninfo": "host=h", "max_connections": 1},
                    "pg2": {"conninfo": "host=h", "max_connections": 1, "credentials": {"password_env": "P"}},
                }
            },
            {"pg1": SECRET},
        ),
    ],
    ids=range(13),
)
def test_wrong_documents_are_refused_without_showing_a_password(text: bytes) -> None:
    """Whatever is wrong with it and wherever the password was put by mistake."""
    with pytest.raises(ConfigError) as caught:
        parse_document(text)
    assert caught.value.findings
    assert not is_shown(caught.value.with_traceback(None), SECRET)


def test_reading_ends_with_the_document() -> None:
    """A pipe that a forked process keeps open does not hold it up, and nothing can be read there afterwards."""
    with pipe_with(text_of(passwords={"pg1": SECRET}) + END + b"more") as fd:
        assert given_by(fd, within=5).read().name == "web"
        assert os.read(fd, 100) == b""


def test_reading_is_bounded_in_time() -> None:
    """A document that does not end is an error, soon."""
    began = time.monotonic()
    with pipe_with(text_of()) as fd, pytest.raises(ConfigError, match=r"no end after 0\.05 s"):
        given_by(fd, within=0.05)
    assert time.monotonic() - began < 2


def test_reading_is_bounded_in_size() -> None:
    """What never ends is not read for ever."""
    with open("/dev/zero", "rb") as zeros, pytest.raises(ConfigError, match="not a JSON document"):
        given_by(zeros.fileno())
    with pytest.raises(ConfigError, match=f"more than {MAX_BYTES} bytes"), endless() as fd:
        given_by(fd)


@contextmanager
def endless() -> Iterator[int]:
    """A file that is larger than any document."""
    fd = os.memfd_create("endless")
    os.write(fd, b" " * (MAX_BYTES + 1))
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_reload_has_nothing_to_read() -> None:
    """It says so; a successor of a retired segment is made with what was given."""
    given = parse_document(text_of())
    with pytest.raises(ConfigError, match="no file to read again"):
        given.read_again()
    assert given.read() is given.read()


def test_a_file_is_read_each_time(tmp_path: Path) -> None:
    """Also for a successor; passwords are where the file says."""
    path = tmp_path / "web.toml"
    origin = File(path)
    for cap in (3, 4):
        path.write_text(
            f'name = "web"\nendpoints.pg1 = {{conninfo = "host=h", max_connections = {cap}}}\n'
            "groups.read.connections = 1\n"
        )
        assert origin.read().endpoints["pg1"].max_connections == cap
        assert origin.read_again().endpoints["pg1"].max_connections == cap
    assert origin.passwords is None


def test_a_configuration_that_names_its_credentials_takes_no_passwords() -> None:
    """They would be asked instead of what it names."""
    endpoint = {"conninfo": "host=h", "max_connections": 1, "credentials": {"password_env": "P"}}
    assert parse_document(text_of(CONFIG | {"endpoints": {"pg1": endpoint}})).passwords is None


def test_the_newest_password_goes_first_and_the_one_before_it_is_tried_after_a_refusal() -> None:
    """A process that started before a change comes back last: what it gives must not keep the right one away."""
    passwords = Passwords({"pg1": "old"})
    assert passwords.take("pg1", "new")
    assert not passwords.take("pg1", "new")
    assert passwords("pg1") == "new"
    assert passwords.take("pg1", "old")
    assert passwords("pg1") == "old"
    passwords.refused("pg1")
    assert passwords("pg1") == "new"
    passwords.refused("pg1")
    assert passwords("pg1") == "old"
    passwords.refused("pg2")
    assert passwords("pg2") == {}


def test_no_more_than_two_passwords_are_kept() -> None:
    """Whatever is given again and again."""
    passwords = Passwords({})
    for number in range(5):
        passwords.take("pg1", f"password {number}")
    seen = set()
    for _ in range(5):
        seen.add(passwords("pg1"))
        passwords.refused("pg1")
    assert seen == {"password 4", "password 3"}
    assert len(seen) == KEPT


def test_passwords_are_not_drawn() -> None:
    """A `repr` counts them."""
    given = parse_document(text_of(passwords={"pg1": SECRET}))
    assert SECRET not in repr(given.passwords) + repr(given) + repr(given.read())
