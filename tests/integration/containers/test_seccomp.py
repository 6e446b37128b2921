"""A coordinator under a seccomp filter that refuses pidfds."""

from __future__ import annotations

import os
import platform
import socket

import pytest

from tests.integration.containers.conftest import CAP, Host
from tests.support.coordinator import watched_by
from tests.support.waiting import wait_until
from tests.support.without_pidfd import GETSOCKOPT, SO_PEERPIDFD

BACK_S = 2.0
TOLD = "no pidfd of a worker"


def has_peerpidfd() -> bool:
    """Whether a pidfd of a peer can be had, in whatever pid namespace it is."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True


@pytest.mark.skipif(platform.machine() not in GETSOCKOPT, reason="system call numbers are known for x86-64 and arm64")
@pytest.mark.parametrize("refusal", ["EPERM", "ENOSYS"])
def test_permits_come_back_without_pidfd(host: Host, refusal: str) -> None:
    """The log says once what is missing, and a dead worker is noticed although a child of it keeps all it had open."""
    container = host.coordinator("tests.support.without_pidfd", refusal)
    doomed, other = host.worker_beside(container), host.worker_beside(container)
    doomed.ask("hold", group="read", count=CAP - 1)
    other.ask("hold", group="read", count=1)
    wait_until(lambda: TOLD in host.log.read_text())
    doomed.ask("fork")
    doomed.kill()
    assert len(other.ask("hold", group="read", count=CAP - 1, timeout=BACK_S)) == CAP
    told = [line for line in host.log.read_text().splitlines() if TOLD in line]
    assert len(told) == 1
    assert {"EPERM": "Operation not permitted", "ENOSYS": "Function not implemented"}[refusal] in told[0]


@pytest.mark.skipif(not has_peerpidfd(), reason="Linux before 6.5 has no SO_PEERPIDFD")
def test_workers_of_other_containers_are_watched_by_pidfd(host: Host) -> None:
    """Without a filter the coordinator watches every worker, seen or not, and the log does not complain."""
    container = host.coordinator()
    host.worker_beside(container).ask("hold", group="read", count=1)
    elsewhere, worker = host.worker()
    worker.ask("hold", group="read", count=1)
    wait_until(lambda: len(watched_by(container.pid)) == 2)
    assert elsewhere.pid in watched_by(container.pid)
    assert TOLD not in host.log.read_text()
