"""Rise and fall: every move, every count, every pause."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.states import HEALTH_MOVES, Health, Role, Verdict
from shmpool_coordinator.health import (
    MOVES,
    SIGN_OF_VERDICT,
    EndpointHealth,
    ProbeResult,
    Sign,
    advance,
    hasten,
    serving,
)

BAD = [verdict for verdict, sign in SIGN_OF_VERDICT.items() if sign is Sign.BAD]
GOOD = [verdict for verdict, sign in SIGN_OF_VERDICT.items() if sign is Sign.GOOD]
NOW = 1000.0


@dataclass(frozen=True)
class Settings:
    inter: float = 2.0
    fastinter: float = 0.5
    downinter: float = 5.0
    rise: int = 2
    fall: int = 3


SETTINGS = Settings()


def after(state: EndpointHealth, *verdicts: Verdict, is_used: bool = False) -> EndpointHealth:
    """Return the state after probes with these verdicts, one a second."""
    for number, verdict in enumerate(verdicts):
        state = advance(state, ProbeResult(verdict=verdict), SETTINGS, NOW + number, is_used=is_used)
    return state


def pause(state: EndpointHealth) -> float:
    assert state.last_probe is not None
    return state.next_probe - state.last_probe


UP = after(EndpointHealth(), Verdict.OK)
DOWN = after(UP, Verdict.REFUSED, Verdict.REFUSED, Verdict.REFUSED)


def test_tables_are_complete() -> None:
    """Every verdict has a sign, and every move is one that the states allow."""
    assert SIGN_OF_VERDICT.keys() == set(Verdict) - {Verdict.NONE}
    assert all(target in HEALTH_MOVES[health] for (health, _), (_, target) in MOVES.items())


def test_fresh_endpoint_is_due() -> None:
    """An endpoint that was never probed is unknown and due at once."""
    assert EndpointHealth().health == Health.UNKNOWN
    assert EndpointHealth().next_probe == 0


@pytest.mark.parametrize("verdict", GOOD)
def test_first_good_probe_is_enough(verdict: Verdict) -> None:
    """A start does not wait for rise; a full server is an up one."""
    assert after(EndpointHealth(), verdict).health == Health.UP


@pytest.mark.parametrize("start", [EndpointHealth(), UP])
@pytest.mark.parametrize("verdict", BAD)
def test_fall(start: EndpointHealth, verdict: Verdict) -> None:
    """An endpoint goes DOWN at the third bad probe in a row, not before."""
    assert after(start, verdict, verdict).health == start.health
    down = after(start, verdict, verdict, verdict)
    assert (down.health, down.since) == (Health.DOWN, NOW + 2)


def test_rise() -> None:
    """An endpoint comes back at the second good probe in a row, not before."""
    assert after(DOWN, Verdict.OK).health == Health.DOWN
    assert after(DOWN, Verdict.OK, Verdict.REFUSED, Verdict.OK).health == Health.DOWN
    assert after(DOWN, Verdict.OK, Verdict.OK).health == Health.UP


@pytest.mark.parametrize("between", [Verdict.OK, Verdict.FULL, Verdict.MISCONFIGURED])
def test_fall_counts_in_a_row(between: Verdict) -> None:
    """An answer of the server starts the count of bad probes anew."""
    bad = (Verdict.LOST, Verdict.TIMEOUT)
    assert after(UP, *bad, between, *bad).health == Health.UP


@pytest.mark.parametrize("start", [EndpointHealth(), UP, DOWN])
def test_starting_is_down_at_once(start: EndpointHealth) -> None:
    """A server that says that it takes no connections is DOWN, and asked again soon."""
    state = after(start, Verdict.STARTING)
    assert state.health == Health.DOWN
    assert pause(state) == SETTINGS.fastinter


def test_full_and_misconfigured_never_take_out() -> None:
    """A server that turns one client away is alive, however often it does."""
    for verdict in (Verdict.FULL, Verdict.MISCONFIGURED):
        state = after(UP, *[verdict] * 10)
        assert (state.health, state.is_degraded) == (Health.UP, True)
        assert pause(state) == SETTINGS.inter


def test_misconfigured_tells_nothing_of_health() -> None:
    """A probe that may not look leaves health as it was."""
    assert after(EndpointHealth(), Verdict.MISCONFIGURED).health == Health.UNKNOWN
    assert after(DOWN, *[Verdict.MISCONFIGURED] * 10).health == Health.DOWN


def test_full_server_comes_back() -> None:
    """A server that is back and full is not kept DOWN for it."""
    assert after(DOWN, Verdict.FULL, Verdict.FULL).health == Health.UP


def test_used_endpoint_stays() -> None:
    """Bad probes alone do not take out what workers use with success; a closing server does."""
    state = after(UP, *[Verdict.TIMEOUT] * 10, is_used=True)
    assert (state.health, state.is_probe_failing) == (Health.UP, True)
    assert pause(state) == SETTINGS.fastinter
    assert after(state, Verdict.TIMEOUT).health == Health.DOWN
    assert after(UP, Verdict.STARTING, is_used=True).health == Health.DOWN


@pytest.mark.parametrize("verdict", [*BAD, Verdict.MISCONFIGURED])
def test_down_endpoint_that_serves_workers_comes_back(verdict: Verdict) -> None:
    """What serves workers is UP whatever the probe failed for, and goes DOWN after `fall` more that nobody belies."""
    state = after(DOWN, verdict, is_used=True)
    assert (state.health, state.verdict, state.is_degraded) == (Health.UP, verdict, True)
    assert after(DOWN, Verdict.STARTING, is_used=True).health is Health.DOWN
    told = serving(DOWN, Role.PRIMARY, NOW + 9)
    assert (told.health, told.role, told.verdict, told.since) == (Health.UP, Role.PRIMARY, DOWN.verdict, NOW + 9)
    assert serving(told, Role.UNKNOWN, NOW).role is Role.PRIMARY
    for served in (told, after(DOWN, Verdict.TIMEOUT, is_used=True)):
        assert after(served, Verdict.TIMEOUT, Verdict.TIMEOUT).health is Health.UP
        assert after(served, *[Verdict.TIMEOUT] * 3).health is Health.DOWN


def test_refusal_confirms_what_workers_told() -> None:
    """After evidence one refused probe is enough; any other failure is counted, and success of workers still holds."""
    for verdict, expected in ((Verdict.REFUSED, Health.DOWN), (Verdict.LOST, Health.UP), (Verdict.TIMEOUT, Health.UP)):
        result = ProbeResult(verdict=verdict)
        assert advance(UP, result, SETTINGS, NOW, is_reported=True).health is expected
        assert advance(UP, result, SETTINGS, NOW, is_reported=True, is_used=True).health is Health.UP


def test_pauses() -> None:
    """Steady, changing and down endpoints each have their interval."""
    assert pause(UP) == SETTINGS.inter
    assert pause(after(UP, Verdict.REFUSED)) == SETTINGS.fastinter
    assert pause(DOWN) == SETTINGS.downinter
    assert pause(after(DOWN, Verdict.OK)) == SETTINGS.fastinter
    assert pause(after(DOWN, Verdict.OK, Verdict.OK)) == SETTINGS.inter


def test_jitter_and_urgency() -> None:
    """Jitter is a share of the interval; urgency makes it the fast one."""
    ok = ProbeResult(verdict=Verdict.OK)
    assert pause(advance(UP, ok, SETTINGS, NOW, jitter=0.1)) == pytest.approx(2.2)
    assert pause(advance(UP, ok, SETTINGS, NOW, jitter=-0.1, is_urgent=True)) == pytest.approx(0.45)


def test_hasten_only_brings_forward() -> None:
    """A hastened probe is never later than it was due."""
    assert hasten(UP, NOW + 1).next_probe == NOW + 1
    assert hasten(UP, NOW + 9) == UP


def test_role_acts_at_once() -> None:
    """One probe that shows another role is enough, even on an endpoint that is DOWN."""
    for state in (UP, DOWN, EndpointHealth()):
        for role, read_only in ((Role.PRIMARY, False), (Role.REPLICA, True)):
            result = ProbeResult(verdict=Verdict.OK, role=role, read_only=read_only)
            changed = advance(state, result, SETTINGS, NOW)
            assert (changed.role, changed.read_only) == (role, read_only)


@pytest.mark.parametrize("verdict", set(Verdict) - {Verdict.NONE, Verdict.OK})
def test_role_stays_where_none_is_shown(verdict: Verdict) -> None:
    """A probe that sees no role forgets none."""
    state = replace(UP, role=Role.REPLICA, read_only=True)
    changed = after(state, verdict)
    assert (changed.role, changed.read_only) == (Role.REPLICA, True)


def test_no_verdict_is_refused() -> None:
    """A result that saw nothing is a mistake of the caller."""
    with pytest.raises(ValueError, match="verdict"):
        after(UP, Verdict.NONE)


verdicts = st.sampled_from(sorted(SIGN_OF_VERDICT))
histories = st.lists(st.tuples(verdicts, st.booleans()), max_size=40)
settings = st.builds(Settings, rise=st.integers(min_value=1, max_value=4), fall=st.integers(min_value=1, max_value=4))


@given(histories, settings)
def test_rules_hold_for_every_history(history: list[tuple[Verdict, bool]], settings: Settings) -> None:
    """Health follows from the tail of the history alone, whatever went before."""
    state = EndpointHealth()
    signs: list[Sign] = []
    used_before = False
    for number, (verdict, is_used) in enumerate(history):
        before = state
        result = ProbeResult(verdict=verdict)
        state = advance(before, result, settings, float(number), is_used=is_used)
        signs.append(SIGN_OF_VERDICT[verdict])
        if state.health == before.health:
            assert state.since == before.since
        else:
            assert state.health in HEALTH_MOVES[before.health]
            assert state.since == number
        if state.health == Health.UP and before.health != Health.UP:
            needed = settings.rise if before.health == Health.DOWN else 1
            served = is_used and before.health == Health.DOWN and signs[-1] in (Sign.BAD, Sign.NEITHER)
            assert served or signs[-needed:] == [Sign.GOOD] * needed
            used_before |= served
        if state.health == Health.DOWN and before.health != Health.DOWN and signs[-1] != Sign.CLOSED:
            assert signs[-settings.fall :] == [Sign.BAD] * settings.fall
            assert not is_used
        if state.health == Health.UP:
            assert Sign.GOOD in signs or used_before
        if signs[-1] is Sign.CLOSED:
            assert state.health == Health.DOWN
        assert state.good == 0 or state.bad == 0


@given(histories, settings, st.floats(min_value=-0.1, max_value=0.1))
def test_next_probe_is_always_ahead(history: list[tuple[Verdict, bool]], settings: Settings, jitter: float) -> None:
    """However an endpoint fares, it is probed again within its longest interval."""
    state = EndpointHealth()
    longest = max(settings.inter, settings.fastinter, settings.downinter) * 1.1
    for number, (verdict, is_used) in enumerate(history):
        result = ProbeResult(verdict=verdict)
        state = advance(state, result, settings, float(number), jitter=jitter, is_used=is_used)
        assert 0 < state.next_probe - number <= longest + 1e-9
