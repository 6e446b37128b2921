"""What a connection has when it was just opened: the group's settings, and a socket that notices a dead network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Final

import pytest

from shmpool import Handle, Pool
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.waiting import wait_until
from tests.support.workers import PROBE, is_ready, one_value, pool_of
from tools.pg_cluster import Server

KEYS = 'connections = 2\ntarget = "primary"\nendpoints = '
SETTINGS = """
isolation_level = "repeatable read"
readonly = true
statement_timeout = "7s"
lock_timeout = "6s"
idle_in_transaction_session_timeout = "90s"
settings = { search_path = "app, public", work_mem = "5MB", "shmpool.told" = "a b\\\\c" }
"""
IN_EFFECT: Final = {
    "default_transaction_isolation": "repeatable read",
    "default_transaction_read_only": "on",
    "transaction_isolation": "repeatable read",
    "transaction_read_only": "on",
    "statement_timeout": "7s",
    "lock_timeout": "6s",
    "idle_in_transaction_session_timeout": "90s",
    "search_path": "app, public",
    "work_mem": "5MB",
    "shmpool.told": "a b\\c",
}
GROUPS = {
    "bounded": f'{KEYS}["pg1"]\nautocommit = true{SETTINGS}',
    "bounded-tx": f'{KEYS}["pg1"]\nautocommit = false{SETTINGS}',
    "plain": f'{KEYS}["pg1"]',
    "tuned": f'{KEYS}["pg2"]',
}


@pytest.fixture(scope="module")
def coordinator(primary: Server) -> Iterator[CoordinatorProcess]:
    """A coordinator of one server as two endpoints, `pg2` with keepalives of its own."""
    tuned = primary.conninfo(keepalives_idle=7, tcp_user_timeout=8000)
    endpoints = {"pg1": endpoint_keys(primary.conninfo()), "pg2": endpoint_keys(tuned)}
    name = f"open{os.getpid()}"
    with running_coordinator(pool_config(name, endpoints, GROUPS, PROBE), name) as coordinator:
        wait_until(lambda: is_ready(name), within=10, what=lambda: coordinator.log)
        yield coordinator


@pytest.fixture
def pool(coordinator: CoordinatorProcess) -> Iterator[Pool]:
    """A pool of this process."""
    with pool_of(coordinator.names.pool) as pool:
        yield pool


@pytest.mark.parametrize("group", ["bounded", "bounded-tx"])
def test_settings_are_in_effect(pool: Pool, group: str) -> None:
    """Each bound and setting of a group is what its connections SHOW, from the first statement on."""
    with pool.connection(group) as conn:
        assert {name: one_value(conn, f"SHOW {name}") for name in IN_EFFECT} == IN_EFFECT


def test_a_group_without_settings_leaves_the_servers(pool: Pool, primary: Server) -> None:
    """What a group does not name is as the server has it."""
    with pool.connection("plain") as conn:
        for name in set(IN_EFFECT) - {"shmpool.told"}:
            assert [(one_value(conn, f"SHOW {name}"),)] == primary.execute(f"SHOW {name}")


def socket_options(conn: Handle) -> dict[str, int]:
    """Return how the kernel watches over a connection."""
    with closing(socket.socket(fileno=os.dup(conn.fileno()))) as twin:
        own = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        options = {name: twin.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in own}
        return options | {"SO_KEEPALIVE": twin.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)}


def test_a_dead_network_is_noticed(pool: Pool) -> None:
    """Keepalives and the bound of unacknowledged data are on without being asked for, and as the conninfo has them."""
    defaults = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30000}
    with pool.connection("plain") as conn:
        assert socket_options(conn) == defaults | {"SO_KEEPALIVE": 1}
    with pool.connection("tuned") as conn:
        assert socket_options(conn) == defaults | {"TCP_KEEPIDLE": 7, "TCP_USER_TIMEOUT": 8000, "SO_KEEPALIVE": 1}
