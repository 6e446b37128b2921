"""What a run's uses amount to; pure.

Times are seconds.  A worker that no error reached has avoided the server from the first moment.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tools.bench.failover.crew import Use
from tools.bench.failover.runs import Run

RESTED_S: Final = 0.5  # a connection that nobody used for so long before its server went was idle; shmpool's own bound
FAIR: Final = 0.8  # of an equal share
LAST_S: Final = 5.0
STANDBY_REFUSES: Final = "25006"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; None: there is nothing to measure."""

    median: float | None
    longest: float | None
    failed: int
    longest_use: float
    further: Sequence[str]


def killed(run: Run) -> Row:
    """How soon each worker was through with a killed server, after the first error anywhere."""
    fault, until = run.at["fault"], run.at["start"]
    failed = _failed(run.uses, fault, until)
    first = min((use.ended for use in failed), default=None)
    last = None if first is None else _by_worker(run.uses, failed, first)
    beaten = Counter((use.worker, use.session) for use in failed if use.session)
    fresh, rested = sessions(run)
    gone = run.at["gone"]
    further = [
        f"its last process ended {(gone - fault) * 1000:.0f} ms after the kill",
        f"connections: {len(fresh)} in use, {len(rested)} idle",
        f"failed: at most {max(beaten.values(), default=0)} per connection",
        f"{sum(beaten[key] for key in rested)} of idle ones",
        f"{sum(use.began > gone for use in failed)} that began later",
        _kept(run, fault, until),
    ]
    return _row(last, failed, _longest(run.uses, fault, until), further)


def at_rest(run: Run, fall_s: float) -> Row:
    """What the first use of each connection met, after its server was killed with no traffic."""
    burst = run.at["burst"]
    uses = [use for use in run.uses if use.began >= burst]
    failed = [use for use in uses if not use.is_good]
    further = [f"of {len(uses)} first uses"]
    known = None
    if "known" in run.at:
        known = run.at["known"] - run.at["fault"]
        further.append(f"known as DOWN without traffic; settings imply {fall_s:.1f} s")
    return Row(known, known, len(failed), max(use.seconds for use in uses), further)


def frozen(run: Run, implied_s: float | None, freed_s: float | None) -> Row:
    """How soon each worker was through with a frozen server, and its threads were free."""
    fault, thaw = run.at["fault"], run.at["thaw"]
    hit = [u for u in run.uses if u.ended > fault and u.began < thaw and (u.host == run.victim or not u.is_good)]
    last = _by_worker(run.uses, hit, fault)
    hanging = {use.worker for use in hit if use.ended >= thaw}
    further = [
        f"workers with a thread that hung until the server went on ({thaw - fault:.0f} s): {len(hanging)}",
        _kept(run, fault, thaw),
    ]
    if implied_s is not None:
        further.append(f"settings imply {implied_s:.1f} s")
    if freed_s is not None:
        freed = max((u.ended - u.got for u in hit if u.got is not None), default=0.0)
        further.append(f"longest statement cut after {freed:.3f} s (bound {freed_s:.1f})")
    return _row(last, _failed(run.uses, fault, run.at["end"]), _longest(run.uses, fault, thaw), further)


def promoted(run: Run) -> Row:
    """How soon each worker wrote again, after the promoted standby accepted writes."""
    fault, accepts, end = run.at["fault"], run.at["accepts"], run.at["end"]
    first: dict[int, float] = {}
    for use in sorted(run.uses, key=lambda use: use.ended):
        if use.is_good and use.host == run.victim and use.ended > fault:
            first.setdefault(use.worker, max(0.0, use.ended - accepts))
    never = len({use.worker for use in run.uses}) - len(first)
    failed = _failed(run.uses, fault, end)
    refused = sum(use.sqlstate == STANDBY_REFUSES for use in run.uses)
    further = [f"writes sent to a standby: {refused}", _kept(run, accepts, end)]
    if never:
        further.append(f"workers that never wrote again: {never}")
    return _row(first, failed, _longest(run.uses, fault, end), further)


def returned(run: Run) -> Row:
    """How soon a server that came back had its fair share of the sessions."""
    start, back, end = run.at["start"], run.at["returned"], run.at["end"]
    fair = [at - back for at, here, there in run.sessions if at >= back and here >= FAIR * (here + there) / 2 > 0]
    uses = Counter(use.host == run.victim for use in run.uses if use.ended > end - LAST_S and use.is_good)
    after = next((pair for pair in reversed(run.sessions) if pair[0] <= end), (end, 0, 0))
    further = [
        "share" if fair else f"no share in {end - back:.0f} s",
        f"sessions at the end {after[1]} : {after[2]}",
        f"{uses[True] / max(1, uses.total()):.0%} of the last uses",
    ]
    took = fair[0] if fair else None
    return Row(took, took, len(_failed(run.uses, start, end)), _longest(run.uses, back, end), further)


def sessions(run: Run) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Return the victim's sessions when its last process ended, as (worker, session): in use, and idle.

    A killed server's sessions live on for some milliseconds and serve: what was put to use meanwhile was in use.
    """
    gone = run.at["gone"]
    last: dict[tuple[int, int], float] = {}
    for use in run.uses:
        if use.host == run.victim and use.began <= gone:
            key = (use.worker, use.session)
            last[key] = max(last.get(key, 0.0), use.ended)
    fresh = {key for key, ended in last.items() if ended > gone - RESTED_S}
    return fresh, set(last) - fresh


def before(run: Run) -> tuple[float, float]:
    """Return the median and the 99th percentile of a use before the fault."""
    steady = [use.seconds for use in run.uses if use.ended < run.at["fault"]]
    return statistics.median(steady), statistics.quantiles(steady, n=100)[98]


def _by_worker(uses: Iterable[Use], some: Sequence[Use], since: float) -> Mapping[int, float]:
    """Return when each worker's last of some uses ended."""
    last = dict.fromkeys((use.worker for use in uses), 0.0)
    for use in some:
        last[use.worker] = max(last[use.worker], use.ended - since)
    return last


def _failed(uses: Iterable[Use], since: float, until: float) -> list[Use]:
    return [use for use in uses if not use.is_good and since <= use.ended and use.began <= until]


def _longest(uses: Iterable[Use], since: float, until: float) -> float:
    return max((use.seconds for use in uses if use.ended >= since and use.began <= until), default=0.0)


def _kept(run: Run, since: float, until: float) -> str:
    """Say how much of the load was served in a while, of what was before the fault."""
    fault = run.at["fault"]
    good = [use for use in run.uses if use.is_good]
    begin = run.at["steady"]
    steady = sum(begin < use.ended <= fault for use in good) / (fault - begin)
    served = sum(since < use.ended <= until for use in good) / (until - since)
    return f"load served {served / steady:.0%}"


def _row(times: Mapping[int, float] | None, failed: Sequence[Use], longest_use: float, further: Sequence[str]) -> Row:
    if not times:
        return Row(None, None, len(failed), longest_use, further)
    values = list(times.values())
    return Row(statistics.median(values), max(values), len(failed), longest_use, further)
