"""The demonstration: requests all the time, one fault after another, and whether each ended as promised."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shmpool.observation import observe
from shmpool.status import EndpointReport, GroupReport, RowState
from tools.pg_cluster import HOST
from tools.stage import Stage, StageError, say

CLIENTS: Final = 6
WRITE_SHARE: Final = 0.2
PAUSE_S: Final = 0.01  # between a client's requests: the point is the faults, not the load
REQUEST_TIMEOUT_S: Final = 10.0
PERMITS_BACK_S: Final = 15.0  # longest for an attempt to connect that nobody knows the end of: connect_timeout
ROLE_SEEN_S: Final = 10.0


@dataclass
class Phase:
    """What the clients saw between two faults.  One thread writes each field's entries at a time, under `Load.lock`."""

    title: str
    served: Counter[tuple[str, str]] = field(default_factory=Counter)  # (read or write, role of the server)
    errors: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0

    @property
    def requests(self) -> int:
        """How many there were."""
        return self.served.total() + self.errors.total()


class Load:
    """Client threads that read and write until they are stopped."""

    def __init__(self, port: int) -> None:
        self.lock = threading.Lock()
        self.phases: list[Phase] = []
        self._port = port
        self._is_over = False
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]

    @property
    def phase(self) -> Phase:
        """The phase that requests count for now."""
        return self.phases[-1]

    def begin(self, title: str) -> Phase:
        """Begin the next phase; the first starts the clients."""
        with self.lock:
            self.phases.append(Phase(title))
        if len(self.phases) == 1:
            for thread in self._threads:
                thread.start()
        print(flush=True)
        say(f"== {title}")
        return self.phase

    def stop(self) -> None:
        """End the clients after the request they are in."""
        self._is_over = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(REQUEST_TIMEOUT_S)

    def _run(self, seed: int) -> None:
        choice = random.Random(seed)
        while not self._is_over:
            kind = "write" if choice.random() < WRITE_SHARE else "read"
            began, phase = time.monotonic(), self.phase  # a request counts for the phase it began in
            try:
                status, answer = self._request(kind)
            except (OSError, http.client.HTTPException) as error:
                outcome = f"connection to Gunicorn lost ({type(error).__name__})"
            else:
                outcome = "" if status in (200, 201) else f"{status}: {answer.get('error', '').splitlines()[0]}"
            with self.lock:
                if outcome:
                    phase.errors[outcome] += 1
                else:
                    phase.served[kind, answer["role"]] += 1
                phase.longest_s = max(phase.longest_s, time.monotonic() - began)
            time.sleep(PAUSE_S)

    def _request(self, kind: str) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=REQUEST_TIMEOUT_S)
        try:
            if kind == "read":
                connection.request("GET", "/")
            else:
                connection.request("POST", "/entries", body="name=demo&said=hello")
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


class Expectations:
    """What was expected, and whether it held."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        """Note and print one."""
        say(f"{'ok    ' if holds else 'FAILED'} {what}")
        if not holds:
            self.failed.append(what)

    def wait(self, stage: Stage, condition: Callable[[], object], within: float, what: str) -> None:
        """Note whether a condition comes true in time."""
        began = time.monotonic()
        try:
            stage.wait(condition, within, what)
        except StageError:
            stage.watch()  # if a program ended that is the reason, and the end of the demo
            self.expect(False, f"{what} within {within:g} s")
        else:
            self.expect(True, f"{what} (after {time.monotonic() - began:.1f} s)")


def run_demo(stage: Stage) -> int:
    """Drive the stage; return 0 if every expectation held."""
    load, expectations = Load(stage.port), Expectations()
    began = time.monotonic()
    try:
        _quiet(stage, load, expectations)
        _kill_worker(stage, load, expectations)
        _stop_replica(stage, load, expectations)
        _kill_coordinator(stage, load, expectations)
    finally:
        load.stop()
    _account(stage, expectations)
    _summarize(load, expectations, time.monotonic() - began)
    return 1 if expectations.failed else 0


def _quiet(stage: Stage, load: Load, expectations: Expectations) -> None:
    phase = load.begin(f"{CLIENTS} clients read and write, nothing fails")
    stage.rest(3)
    stage.show_status(with_slots=True)
    expectations.expect(not phase.errors, f"no error in {phase.requests} requests")
    roles = {f"{kind}s on the {role}" for kind, role in phase.served}
    expectations.expect(
        roles == {"reads on the replica", "writes on the primary"}, f"served: {', '.join(sorted(roles))}"
    )


def _kill_worker(stage: Stage, load: Load, expectations: Expectations) -> None:
    phase = load.begin("SIGKILL for a worker in the middle of its work")
    victim = max((w for w in observe(stage.names).workers if w.pid), key=lambda w: (w.active, w.held))
    os.kill(victim.pid, signal.SIGKILL)
    say(f"killed worker pid {victim.pid}, which held {victim.held} permits")

    def is_replaced() -> bool:
        rows = [w for w in observe(stage.names).workers if w.state is RowState.HELD]
        return len(rows) == stage.workers and victim.pid not in {w.pid for w in rows}

    expectations.wait(
        stage,
        lambda: all(w.pid != victim.pid or not w.held for w in observe(stage.names).workers) and _is_whole(stage),
        PERMITS_BACK_S,
        "its permits are back in circulation",
    )
    expectations.wait(stage, is_replaced, PERMITS_BACK_S, "its replacement works in the pool")
    stage.rest(1)
    expectations.expect(
        phase.errors.total() <= CLIENTS, f"{phase.errors.total()} errors: only requests that the worker had accepted"
    )


def _stop_replica(stage: Stage, load: Load, expectations: Expectations) -> None:
    phase = load.begin("the replica is shut down: reads fall back on the primary")
    replica = stage.cluster.standbys[0]
    breaking = sum(e.held for e in observe(stage.names).endpoints if e.name == "pg2")
    replica.stop("fast")
    expectations.wait(stage, lambda: _reads(phase, "primary") > 20, ROLE_SEEN_S, "reads are served by the primary")
    stage.rest(2)
    stage.show_status()
    expectations.expect(
        phase.errors.total() <= breaking,
        f"{phase.errors.total()} errors: at most one for each of the {breaking} connections that broke",
    )
    after = load.begin("the replica comes back")
    replica.start()
    expectations.wait(stage, lambda: _reads(after, "replica") > 20, ROLE_SEEN_S, "reads are on the replica again")
    stage.rest(1)
    expectations.expect(not after.errors, f"no error in {after.requests} requests")


def _kill_coordinator(stage: Stage, load: Load, expectations: Expectations) -> None:
    phase = load.begin("SIGKILL for the coordinator: workers go on without it")
    stage.kill_coordinator()
    say("killed the coordinator")
    stage.rest(2)
    expectations.expect(not phase.errors, f"no error in {phase.requests} requests")
    expectations.expect(phase.requests > 0, "requests are served while no coordinator runs")
    after = load.begin("a new coordinator adopts the pool, under load")
    stage.start_coordinator()
    stage.rest(2)
    stage.show_status()
    expectations.expect(not after.errors, f"no error in {after.requests} requests")


def _account(stage: Stage, expectations: Expectations) -> None:
    print(flush=True)
    say("== the clients are gone: every permit is accounted for")
    expectations.wait(
        stage, lambda: _is_whole(stage), PERMITS_BACK_S, "no orphan is left, free and held permits add up to the caps"
    )
    report = observe(stage.names)
    expectations.expect(report.is_judged and not report.violations, "every invariant of the segment holds")


def _is_whole(stage: Stage) -> bool:
    """Whether free and held permits add up to the caps, and no orphan waits to be settled."""
    report = observe(stage.names)
    if any(worker.orphans for worker in report.workers):
        return False
    tables: list[GroupReport | EndpointReport] = [*report.groups, *report.endpoints]
    return bool(tables) and all(t.free is not None and t.free + t.held == t.issued == t.target for t in tables)


def _reads(phase: Phase, role: str) -> int:
    return phase.served["read", role]


def _summarize(load: Load, expectations: Expectations, seconds: float) -> None:
    print(f"\n{'phase':58}{'requests':>9}{'errors':>8}{'slowest':>10}")
    for phase in load.phases:
        print(f"{phase.title:58}{phase.requests:9}{phase.errors.total():8}{phase.longest_s * 1000:7.0f} ms")
        for error, count in phase.errors.items():
            print(f"    {count} x {error}")
    print(flush=True)
    if expectations.failed:
        say(f"FAILED after {seconds:.0f} s: {'; '.join(expectations.failed)}")
    else:
        say(f"everything held, in {seconds:.0f} s")
