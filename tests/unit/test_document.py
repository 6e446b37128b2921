"""A configuration that a process carries itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shmpool import Pool
from shmpool.document import END, MAX_CONFIG_BYTES, MAX_PASSWORDS_BYTES, Document, digest_of
from shmpool.frames import encode

SECRET = "not-to-be-seen"
CONFIG: dict[str, Any] = {"name": "web", "groups": {"g": {"connections": 1}}, "endpoints": {"pg1": {}, "pg2": {}}}


def test_digest_tells_configurations_apart_and_nothing_of_passwords() -> None:
    """Order of keys and passwords do not matter, any value does; the coordinator computes the same of what it reads."""
    one = Document(CONFIG, {"pg1": SECRET})
    again = Document(dict(reversed(CONFIG.items())), {"pg1": "another"})
    assert one.digest == again.digest == digest_of(json.loads(json.dumps(CONFIG)))
    assert Document(CONFIG | {"groups": {"g": {"connections": 2}}}).digest != one.digest


def test_encoded_it_is_one_document_with_an_end() -> None:
    """What goes through the pipe holds everything, and ends where a reader can tell."""
    text = Document(CONFIG, {"pg1": SECRET}).encode()
    assert text.endswith(END)
    assert text.count(END) == 1
    assert json.loads(text.removesuffix(END)) == {"config": CONFIG, "passwords": {"pg1": SECRET}}


def test_what_it_was_made_from_may_change() -> None:
    """Neither a changed dictionary nor a changed copy of the passwords reaches it."""
    config, passwords = {"name": "web", "groups": {"g": {"connections": 1}}}, {"pg1": SECRET}
    document = Document(config, passwords)
    before = document.encode()
    config["name"] = "other"
    passwords["pg1"] = "other"
    document.read_passwords()["pg1"] = "other"
    assert document.encode() == before
    assert document.password("pg1") == SECRET


def test_endpoints_without_a_password_are_left_to_libpq() -> None:
    """No password and an empty one are the same."""
    document = Document(CONFIG, {"pg1": ""})
    assert document.read_passwords() == {}
    assert document.password("pg1") == {}
    assert document.password("pg2") == {}


@pytest.mark.parametrize(
    ("config", "passwords"),
    [
        ("name", {}),
        ({"name": object()}, {}),
        ({"name": float("nan")}, {}),
        (CONFIG, {"pg1": SECRET.encode()}),
        (CONFIG, {1: SECRET}),
        ({"name": "web", "groups": {"g": "x" * MAX_CONFIG_BYTES}}, {}),
        (CONFIG, {"pg1": SECRET * MAX_PASSWORDS_BYTES}),
    ],
    ids=["no tables", "no value", "no number", "bytes", "no name", "large", "large password"],
)
def test_what_cannot_be_written_down_is_refused_without_showing_it(config: Any, passwords: Any) -> None:
    """A clear error, in which no password is."""
    with pytest.raises((TypeError, ValueError), match=r"^(config|passwords)\b") as caught:
        Document(config, passwords)
    assert SECRET not in str(caught.value)


def test_passwords_that_are_allowed_fit_into_a_message() -> None:
    """They are handed over to a living coordinator in one message."""
    assert encode("passwords", passwords=Document(CONFIG, {"pg1": "x" * (MAX_PASSWORDS_BYTES - 50)}).read_passwords())


def test_no_repr_shows_a_password() -> None:
    """Neither the document's, nor that of a pool that carries it."""
    pool = Pool(config=CONFIG, passwords={"pg1": SECRET})
    assert "1 passwords" in repr(pool._document)
    assert SECRET not in repr(pool._document) + repr(pool) + repr(vars(pool))


def test_pool_takes_its_name_from_the_configuration() -> None:
    """Another name beside it, or passwords without it, is a mistake."""
    assert Pool(config=CONFIG).name == "web"
    assert Pool("web", config=CONFIG).name == "web"
    with pytest.raises(ValueError, match="config has 'web'"):
        Pool("other", config=CONFIG)
    with pytest.raises(TypeError, match="only together with config"):
        Pool("web", passwords={"pg1": SECRET})
    with pytest.raises(ValueError, match="name"):
        Pool(config={"groups": {}})
