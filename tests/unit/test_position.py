"""Positions as text, and which servers show them."""

from __future__ import annotations

from typing import Any

import pytest

from shmpool.position import CommitPosition, Standing, end_of_records, is_void, shows
from shmpool.states import Role

AFTER = CommitPosition(system_identifier=7, timeline=2, lsn=1000)
PAGE, SEGMENT = 8192, 16 << 20


def standing(**changes: Any) -> Standing:
    """Return a replica that has come exactly to AFTER, but for the changes."""
    return Standing(Role.REPLICA, AFTER.system_identifier, AFTER.timeline, AFTER.lsn)._replace(**changes)


@pytest.mark.parametrize("position", [AFTER, CommitPosition(2**64 - 1, 2**32 - 1, 2**64 - 1), CommitPosition(0, 0, 0)])
def test_text_leads_back(position: CommitPosition) -> None:
    """A position survives a cookie: its text has only characters that are allowed there, and is parsed to the same."""
    assert CommitPosition.parse(str(position)) == position
    assert set(str(position)) <= set("0123456789abcdef.")


@pytest.mark.parametrize(
    "text", ["", "1.2", "1.2.3.4", "7.2.3e8 ", "7.2.0x3", "-7.2.3", "7.2.3\n", "1.123456789.1", "x"]
)
def test_text_that_is_no_position(text: str) -> None:
    """What comes back from a client may be anything: all but a position is a ValueError."""
    with pytest.raises(ValueError, match="expected three hexadecimal numbers"):
        CommitPosition.parse(text)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"lsn": 1001}, True),
        ({"lsn": 999}, False),
        ({"lsn": 0}, False),
        ({"timeline": 3}, True),
        ({"timeline": 3, "lsn": 999}, False),
        ({"timeline": 1, "lsn": 5000}, False),
        ({"timeline": 0, "lsn": 5000}, False),
        ({"system_identifier": 8, "lsn": 5000}, False),
        ({"system_identifier": 0, "lsn": 5000}, False),
        ({"role": Role.UNKNOWN}, True),
        ({"role": Role.PRIMARY, "lsn": 999}, True),
        ({"role": Role.PRIMARY, "timeline": 3}, True),
        ({"role": Role.PRIMARY, "timeline": 1, "lsn": 5000}, False),
        ({"role": Role.PRIMARY, "system_identifier": 8}, False),
    ],
)
def test_which_servers_show_a_position(changes: dict[str, Any], shown: bool) -> None:
    """Replay must have passed it in the same history; the primary of that history shows it; the unknown does not."""
    assert shows(standing(**changes), AFTER) is shown


@pytest.mark.parametrize(
    ("systems", "void"), [((8, 9), True), ((8, 7), False), ((8, 0), False), ((0,), False), ((7,), False), ((), False)]
)
def test_position_of_a_system_that_is_gone(systems: tuple[int, ...], void: bool) -> None:
    """A position means nothing only where every server is known to be of another system."""
    assert is_void(AFTER, [standing(system_identifier=system) for system in systems]) is void


@pytest.mark.parametrize(
    ("insert", "end"),
    [
        (5 * PAGE + 24, 5 * PAGE),
        (5 * PAGE + 40, 5 * PAGE + 40),  # a record's last 16 bytes
        (5 * PAGE + 32, 5 * PAGE + 32),
        (3 * SEGMENT + 40, 3 * SEGMENT),
        (3 * SEGMENT + 48, 3 * SEGMENT + 48),
        (5 * PAGE, 5 * PAGE),
    ],
)
def test_end_of_records(insert: int, end: int) -> None:
    """Behind a page's header there is no record yet: a replica that has everything has come to the page's start."""
    assert end_of_records(insert, PAGE, SEGMENT) == end
