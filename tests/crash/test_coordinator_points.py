"""The coordinator is stopped at each bytecode of a tick, or workers act there; the next tick carries on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmpool.slots import SlotTable, Token
from shmpool.words import MAYBE, ORPHAN, Kind, with_field
from shmpool_coordinator import permits
from tests.crash.conftest import Sweep
from tests.support.crashing import Host, InterruptedHereError, host, points_of, run_until, session_gone

PERMITS = frozenset({str(permits.__file__)})


@pytest.fixture
def pool(pool_name: str) -> Iterator[Host]:
    """A pool with room for three pairs at one endpoint."""
    with host(pool_name, {"read": 4}, {"pg1": 3}) as made:
        yield made


def doubt(pool: Host, token: Token, *, orphan: bool, is_lost: bool) -> None:
    """Leave a pair as a process killed in its release does; what is not lost was posted."""
    word = with_field(with_field(pool.segment.words[token.word_at], Kind.ENDPOINT, MAYBE), Kind.GROUP, MAYBE)
    pool.segment.words[token.word_at] = word | (ORPHAN if orphan else 0)
    if not is_lost:
        pool.endpoints["pg1"].semaphore.release()
        pool.groups["read"].semaphore.release()


def prepare(pool: Host, table: SlotTable) -> Callable[[], None]:
    """Leave one orphan certain, one lost, one posted, and a cap to raise or lower; return the coordinator's tick."""
    certain, lost, posted = (pool.hold(table, "read") for _ in range(3))
    table.abandon(certain)
    doubt(pool, lost, orphan=True, is_lost=True)
    doubt(pool, posted, orphan=True, is_lost=False)
    target = pool.permits.control(0).target
    pool.permits.set_target(0, 3 if target == 4 else 4)
    return lambda: pool.permits.tick(session_gone)


def test_coordinator_stopped_anywhere(pool: Host, sweep: Sweep) -> None:
    """A coordinator that ends anywhere in a tick leaves a state from which the next one finds every permit."""
    table = pool.add_worker()

    def stop() -> None:
        raise InterruptedHereError

    for _ in range(2):  # the cap is raised in one round and lowered in the other
        points = [point for point in points_of(prepare(pool, table), PERMITS) if point.can_raise]
        pool.settle(table)
        pool.permits.set_target(0, 4 if pool.permits.control(0).target == 3 else 3)
        pool.settle(table)
        for point in sweep.choose(points):
            pool.begin_anew(table)
            before = pool.permits.control(0).target
            operation = prepare(pool, table)
            with pytest.raises(InterruptedHereError):
                run_until(operation, point.event, stop, PERMITS)
            pool.permits._calm_words = b""  # the next coordinator knows nothing
            try:
                pool.settle(table)
            except AssertionError as error:
                raise AssertionError(f"after {point}: {error}") from error
            pool.permits.set_target(0, before)
            pool.settle(table)
        pool.permits.set_target(0, 4 if pool.permits.control(0).target == 3 else 3)
        pool.settle(table)


def test_worker_abandons_anywhere_in_an_audit(pool: Host, sweep: Sweep) -> None:
    """A slot that becomes an orphan while an audit counts is left to the next audit, which finds its permits."""
    table = pool.add_worker()

    def scene() -> Token:
        orphan, live = pool.hold(table, "read"), pool.hold(table, "read")
        doubt(pool, orphan, orphan=True, is_lost=True)
        doubt(pool, live, orphan=False, is_lost=True)
        return live

    scene()
    points = points_of(pool.permits.audit, PERMITS)
    pool.settle(table)
    for point in sweep.choose(points):
        pool.begin_anew(table)
        live = scene()

        def abandon(token: Token = live) -> None:
            pool.segment.words[token.word_at] |= ORPHAN

        run_until(pool.permits.audit, point.event, abandon, PERMITS)
        del live, abandon
        try:
            pool.settle(table)
        except AssertionError as error:
            raise AssertionError(f"after {point}: {error}") from error
