"""Threads that wait: order, deadlines, limits, interruptions."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from shmpool import Pool, PoolClosed, PoolTimeout
from tests.support.coordinator import CoordinatorProcess
from tests.support.waiting import wait_until
from tests.support.workers import is_whole, one_value, pool_of

INTERRUPTS = 150


def start(*threads: threading.Thread) -> None:
    """Start threads."""
    for thread in threads:
        thread.start()


def join(*threads: threading.Thread) -> None:
    """Wait for threads."""
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("group", ["one", "narrow"])
def test_threads_of_one_process_share_fairly(pool: Pool, group: str) -> None:
    """8 threads on one connection are all served, the least served at least half as often as the mean."""
    served = [0] * 8
    until = time.monotonic() + 1.5

    def run(number: int) -> None:
        while time.monotonic() < until:
            with pool.connection(group, timeout=10.0):
                time.sleep(0.001)
            served[number] += 1

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    start(*threads)
    join(*threads)
    assert min(served) * 2 >= sum(served) / 8, served
    assert sum(served) > 300, served


@pytest.mark.parametrize("group", ["one", "narrow"])
def test_waiters_are_served_in_order(pool: Pool, group: str) -> None:
    """A checkin serves who waited longest; one that comes late does not overtake."""
    order: list[int] = []
    conn = pool.checkout(group)

    def run(number: int) -> None:
        with pool.connection(group, timeout=10.0):
            order.append(number)
            time.sleep(0.005)

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=run, args=(number,)))
        threads[-1].start()
        wait_until(lambda n=number: pool.statistics()[group]["waiting"] == n + 1)  # type: ignore[misc]
    time.sleep(0.3)  # several slices: whoever sleeps for all has changed
    conn.close()
    join(*threads)
    assert sorted(order) == list(range(5))
    assert sum(abs(place - number) for place, number in enumerate(order)) <= 4, order


@pytest.mark.parametrize("group", ["one", "narrow"])
def test_hand_over_does_not_wait_for_a_slice(pool: Pool, group: str) -> None:
    """Two threads in turn on one connection do not sleep past each other's checkin."""
    waits: list[float] = []

    def run() -> None:
        for _ in range(30):
            began = time.monotonic()
            with pool.connection(group, timeout=10.0):
                waits.append(time.monotonic() - began)
                time.sleep(0.005)

    threads = [threading.Thread(target=run) for _ in range(2)]
    start(*threads)
    join(*threads)
    assert sorted(waits)[len(waits) // 2] < 0.025, waits


def test_nobody_is_overtaken_while_checkins_serve(pool: Pool) -> None:
    """Whoever queues, also the thread that looks for permits, has its turn after those that were there before."""
    others = 11
    handed = [0]  # by whoever has a connection
    overtakers: list[int] = []
    until = time.monotonic() + 1.0

    def run() -> None:
        while time.monotonic() < until:
            before = handed[0]
            with pool.connection("tx", timeout=10.0):
                overtakers.append(handed[0] - before - others)
                handed[0] += 1
                time.sleep(0.002)

    threads = [threading.Thread(target=run) for _ in range(others + 1)]
    start(*threads)
    join(*threads)
    assert len(overtakers) > 300
    assert max(overtakers) <= others, sorted(overtakers)[-10:]


@pytest.mark.parametrize("group", ["one", "narrow"])
def test_timeout_is_kept(pool: Pool, group: str) -> None:
    """A wait ends at its deadline, not much before or after; zero does not wait at all."""
    with pool.connection(group):
        for timeout in (0.0, 0.15):
            began = time.monotonic()
            with pytest.raises(PoolTimeout):
                pool.checkout(group, timeout=timeout)
            assert timeout <= time.monotonic() - began < timeout + 0.4
        assert pool.statistics()[group]["waiting"] == 0
    with pool.connection(group, timeout=0.0):
        pass


def test_timed_out_waiters_do_not_stand_in_the_way(pool: Pool) -> None:
    """A thread that waits longer is served after those before it gave up."""
    conn = pool.checkout("one")
    outcomes: list[str] = []

    def run(timeout: float) -> None:
        try:
            with pool.connection("one", timeout=timeout):
                outcomes.append("served")
        except PoolTimeout:
            outcomes.append("timeout")

    threads = [threading.Thread(target=run, args=(t,)) for t in (0.1, 0.15, 0.2, 10.0)]
    start(*threads)
    wait_until(lambda: outcomes == ["timeout"] * 3)
    conn.close()
    join(*threads)
    assert outcomes[-1] == "served"


def test_per_worker_max(pool: Pool) -> None:
    """One worker never holds more than its share, however many threads ask and permits are free."""
    most = 0
    inside = threading.Semaphore(0)

    def run() -> None:
        nonlocal most
        for _ in range(20):
            with pool.connection("narrow", timeout=20.0):
                inside.release()
                most = max(most, inside._value)
                inside.acquire()

    threads = [threading.Thread(target=run) for _ in range(4)]
    start(*threads)
    join(*threads)
    assert most == 1
    assert pool.statistics()["narrow"]["held"] == 1


def test_close_with_connections_in_use(shared: CoordinatorProcess) -> None:
    """Closing a pool leaves what is in use to its user; at checkin it is closed and the permits are back."""
    with pool_of(shared.names.pool) as pool:
        conn = pool.checkout("auto")
        with pool.connection("auto"):
            pass
        pool.close()
        assert one_value(conn, "SELECT 1") == 1
        conn.close()
        assert is_whole(shared.names.pool)


def test_close_ends_waiting(shared: CoordinatorProcess) -> None:
    """Threads that wait while the pool is closed are told, soon."""
    told: list[str] = []
    with pool_of(shared.names.pool) as pool:
        conn = pool.checkout("one")

        def run() -> None:
            try:
                pool.checkout("one", timeout=20.0)
            except PoolClosed:
                told.append("closed")

        threads = [threading.Thread(target=run) for _ in range(3)]
        start(*threads)
        wait_until(lambda: pool.statistics()["one"]["waiting"] == 3)
        pool.close()
        wait_until(lambda: len(told) == 3, within=3)
        join(*threads)
        conn.close()


class Interrupted(Exception):  # noqa: N818  raised by a signal handler, as Gunicorn's and Celery's limits do
    """Time is up."""


@contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGALRM raise."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.timeout(100, method="thread")  # the signal is in use here
@pytest.mark.parametrize("contended", [False, True])
def test_interrupted_checkouts_lose_nothing(shared: CoordinatorProcess, contended: bool) -> None:
    """A signal handler that raises anywhere between checkout and checkin: every permit is back, all others served."""
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)
    stop = threading.Event()
    served = [0]

    with pool_of(shared.names.pool) as pool:

        def run() -> None:
            while not stop.is_set():
                with pool.connection("one", timeout=20.0):
                    time.sleep(0.0005)
                served[0] += 1

        others = [threading.Thread(target=run) for _ in range(2 if contended else 0)]
        start(*others)
        caught = 0

        def use_until_interrupted() -> None:
            first = dice.uniform(0.00002, 0.006)
            signal.setitimer(signal.ITIMER_REAL, first, 0.02)  # again: what a finalizer swallowed is no interruption
            while True:
                pool.checkout("one", timeout=20.0).close()

        with interrupting():
            for _ in range(INTERRUPTS):
                try:
                    use_until_interrupted()
                except Interrupted:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    caught += 1
        assert caught == INTERRUPTS, f"seed {seed}"
        before = served[0]
        if contended:
            wait_until(lambda: served[0] > before, within=15, what=f"others are served; seed {seed}")
        stop.set()
        join(*others)
        with pool.connection("one", timeout=10.0) as conn:
            assert one_value(conn, "SELECT 1") == 1
