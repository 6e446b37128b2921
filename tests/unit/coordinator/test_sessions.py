"""When an orphan's server session counts as gone."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from shmpool.clock import monotonic
from shmpool_coordinator import sessions
from shmpool_coordinator.sessions import EndpointSessions, SessionLook
from tests.support.desk import config_of
from tests.support.waiting import wait_until

ROW, PLACE = 3, 1
NAME = f"shmpool:some:{ROW}.7:{PLACE}"
KEY = (13, 99)


class Server(SessionLook):
    """A server of the test's making: its sessions, and what it was told."""

    def __init__(self, started_s: float | None) -> None:
        self.sessions: list[tuple[int, str, bool, bool]] = []
        self.asked = 0
        self.connects = 0
        self.terminated: list[object] = []
        self._is_open = False
        self._started_s = started_s

    def open(self) -> None:
        if not self._is_open:
            self._is_open, self.opened_at, self.started_s = True, monotonic(), self._started_s
            self.connects += 1

    def close(self) -> None:
        self._is_open = False

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        if query == sessions.TERMINATE_QUERY:
            self.terminated += parameters
            self.sessions = [row for row in self.sessions if row[0] not in parameters]
            return []
        self.asked += 1
        return list(self.sessions)


def asking(server: Server, woken: threading.Event | None = None) -> EndpointSessions:
    """Return the questions about an endpoint, answered by a made-up server."""
    settings = config_of("some").settings({"pg1": 0}, {"read": 0}).endpoints[0]
    wake = (woken or threading.Event()).set
    return EndpointSessions("some", settings, server, 60.0, wake)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread end soon after its last answer."""
    monkeypatch.setattr(sessions, "FORGET_S", 0.2)


def settled(endpoint: EndpointSessions) -> None:
    """Wait for the thread's end."""
    wait_until(lambda: endpoint._thread is None)


def test_busy_session_is_ended_and_its_end_is_told_at_once() -> None:
    """A session that runs a query is terminated; the loop is woken as soon as it is gone."""
    server, woken = Server(None), threading.Event()
    server.sessions = [(42, NAME, True, False), (43, f"shmpool:some:{ROW}.7:2", True, False)]
    endpoint, began = asking(server, woken), monotonic()
    assert not endpoint.ask(KEY, ROW, PLACE, 42)
    assert woken.wait(5)
    assert monotonic() - began < sessions.LOOK_EVERY_S
    assert endpoint.ask(KEY, ROW, PLACE, 42)
    assert server.terminated == [42]
    settled(endpoint)


def test_unknown_session_waits_for_the_connect_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where server processes show only with their names, an unseen session is waited for as a connect may take."""
    endpoint = asking(Server(None))
    monkeypatch.setattr(endpoint, "_connect_s", 0.15)
    began = monotonic()
    wait_until(lambda: endpoint.ask(KEY, ROW, PLACE, 0))
    assert monotonic() - began >= 0.15
    settled(endpoint)


def test_unknown_session_is_gone_once_every_earlier_connection_has_told_its_name() -> None:
    """A server that shows nameless processes answers early, over a connection that is newer than the question."""
    server = Server(0.02)
    endpoint = asking(server)
    wait_until(lambda: endpoint.ask((1, 1), 0, 0, 77))  # opens a connection that is older than what comes
    server.sessions = [(42, "", True, True)]
    asked = server.asked
    assert not endpoint.ask(KEY, ROW, PLACE, 0)
    wait_until(lambda: endpoint.ask(KEY, ROW, PLACE, 0) or server.asked > asked + 5)
    assert not endpoint.ask(KEY, ROW, PLACE, 0)  # somebody is still starting
    assert server.connects == 2
    server.sessions = [(42, NAME, True, False)]
    asked = server.asked
    wait_until(lambda: endpoint.ask(KEY, ROW, PLACE, 0) or server.asked > asked + 3)
    assert not endpoint.ask(KEY, ROW, PLACE, 0)  # it was this one
    server.sessions = []
    wait_until(lambda: endpoint.ask(KEY, ROW, PLACE, 0))
    settled(endpoint)


def test_thread_keeps_its_connection_for_the_next_death() -> None:
    """Questions that follow each other are answered over one connection; it is closed when none is left."""
    server = Server(None)
    endpoint = asking(server)
    for slot in range(3):
        wait_until(lambda slot=slot: endpoint.ask((slot, 1), 0, slot, 77))  # type: ignore[misc]
    assert server.connects == 1
    settled(endpoint)
    assert not server._is_open
