"""What is compared: each case makes its comparisons, and says what was asked of shmpool there and what was found."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shmpool.status import GroupReport
from tools.bench.peers.measure import Sampler, refusals
from tools.bench.peers.sites import UNBOUNDED, Round, Shape, Site, role_of, running, twins
from tools.bench.rounds import Quartiles, alternate, noise
from tools.pg_cluster import Server

PER_WORKER = ("psycopg_pool", "sqlalchemy", "pgdbpool")
POOLERS = ("pgbouncer", "pgbouncer-unix")
MOVES = 8  # a round
REST_S = 0.05  # between two moves: whoever has the connection is in accept() by then
LEAD_S = 0.010  # what a move may cost beside a connect


@dataclass(frozen=True, slots=True)
class Series:
    """All rounds of one peer in one comparison, start by start.

    Args:
        sessions: the most seen at the server.
        refusals: sessions beyond the limit that the server refused.
        served: for each start, requests by process and thread.
        group: of shmpool, the group's counters in the last start.
    """

    rounds: Sequence[Round]
    sessions: int
    refusals: int
    served: Sequence[Mapping[tuple[str, str], int]]
    group: GroupReport | None

    @classmethod
    def joined(cls, starts: Sequence[Series]) -> Series:
        """Return the rounds of several starts as one series."""
        return cls(
            [one for start in starts for one in start.rounds],
            max(start.sessions for start in starts),
            sum(start.refusals for start in starts),
            [served for start in starts for served in start.served],
            starts[-1].group,
        )

    def of(self, figure: Callable[[Round], float]) -> list[float]:
        """Return a figure of each round."""
        return [figure(one) for one in self.rounds]

    @property
    def errors(self) -> int:
        """Requests that failed."""
        return sum(one.told.errors for one in self.rounds)

    @property
    def longest(self) -> float:
        """The longest request of all rounds, in seconds."""
        return max(one.told.longest for one in self.rounds)

    def cpu(self, *parts: str) -> Quartiles:
        """Return milliseconds of CPU per request, of some parts or of all."""
        return Quartiles.of(
            [1e3 * sum(one.cpu.get(part, 0.0) for part in parts or one.cpu) / one.told.requests for one in self.rounds]
        )

    def client_load(self) -> float:
        """Return the most of one core that the load generator took in any round."""
        return max(one.told.cpu * one.told.rate / one.told.requests for one in self.rounds)

    def least_thread(self, shape: Shape) -> float:
        """Return what the least served thread got, of the mean: median over the starts."""
        threads = shape.workers * shape.threads
        return statistics.median(least_share(list(served.values()), threads) for served in self.served)

    def least_worker(self, shape: Shape) -> float:
        """Return the same for workers."""
        return statistics.median(least_share(_by_worker(served), shape.workers) for served in self.served)


def _by_worker(served: Mapping[tuple[str, str], int]) -> list[int]:
    counts: Counter[str] = Counter()
    for (worker, _), count in served.items():
        counts[worker] += count
    return list(counts.values())


def least_share(served: Sequence[int], expected: int) -> float:
    """Return what the least served got, of the mean; who never served counts, with nothing."""
    some = [count for count in served if count]
    everybody = [*some, *[0] * (expected - len(some))]
    return min(everybody) / statistics.fmean(everybody) if some else math.nan


@dataclass(frozen=True, slots=True)
class Comparison:
    """One shape, and what every peer did in it."""

    shape: Shape
    series: Mapping[str, Series]

    def ratio(self, figure: Callable[[Round], float], other: str, peer: str = "shmpool") -> Quartiles | None:
        """Return peer / other of a figure, round by round; None where one of them was not measured."""
        if peer not in self.series or other not in self.series:
            return None
        pairs = zip(self.series[peer].of(figure), self.series[other].of(figure), strict=True)
        return Quartiles.of([a / b if b else math.nan for a, b in pairs])

    def noise(self) -> str:
        """Say how much the first peer moved that does not wait for connections."""
        name = next((peer for peer in ("raw", "pgbouncer") if peer in self.series), "shmpool")
        return f"{name}'s requests/s: {noise(self.series[name].of(rate))}"


def rate(one: Round) -> float:
    """Requests per second."""
    return one.told.rate


def p50(one: Round) -> float:
    """Median time of a request."""
    return one.told.p50


def p99(one: Round) -> float:
    """The time that one request in a hundred exceeds."""
    return one.told.p99


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was asked of shmpool, and what was found."""

    what: str
    asked: str
    found: str
    is_met: bool | None  # None: it could not be measured


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case found."""

    case: Case
    comparisons: Sequence[Comparison]
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Args:
        seconds: of one round of one peer.
        starts: how often everything is started anew.  Where the kernel puts a worker and its server process decides
            more than a pool does, and lasts as long as they do.
        rounds: of each start.
        peers: those that are wanted and can be had here.
    """

    seconds: float
    starts: int
    rounds: int
    peers: Sequence[str]
    workloads: Sequence[str]
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A question, and how it is answered."""

    name: str
    title: str
    measure: Callable[[Server, Effort], tuple[list[Comparison], list[Finding]]]

    def run(self, server: Server, effort: Effort) -> Outcome:
        """Answer it."""
        return Outcome(self, *self.measure(server, effort))


def compare(server: Server, shape: Shape, peers: Iterable[str], effort: Effort) -> Comparison:
    """Measure the wanted ones of some peers in alternating rounds, in several starts."""
    chosen = [peer for peer in effort.peers if peer in set(peers)]
    starts = [_start(server, shape, chosen, effort) for _ in range(effort.starts)]
    series = {peer: Series.joined([start[peer] for start in starts]) for peer in chosen}
    told = ", ".join(f"{peer} {Quartiles.of(one.of(rate)).median:.0f}" for peer, one in series.items())
    effort.say(f"{describe(shape)}: {told} requests/s")
    for peer, one in series.items():
        reason = next((r.told.first_error for r in one.rounds if r.told.first_error), None)
        if reason:
            effort.say(f"  {peer}: {one.errors} errors, the first: {reason}")
    return Comparison(shape, series)


def _start(server: Server, shape: Shape, chosen: Sequence[str], effort: Effort) -> dict[str, Series]:
    """Start everything, and measure some rounds."""
    with running(server, shape, chosen) as sites, Sampler(server) as sampler:
        before = {peer: refusals(server, role_of(peer)) for peer in chosen}

        def measure(site: Site) -> Callable[[], Round]:
            return lambda: site.round(effort.seconds)

        found = alternate({peer: measure(site) for peer, site in sites.items()}, effort.rounds)
        return {
            peer: Series(
                found[peer],
                sampler.most(role_of(peer)),
                refusals(server, role_of(peer)) - before[peer],
                [sites[peer].served()],
                sites[peer].group(),
            )
            for peer in chosen
        }


def describe(shape: Shape) -> str:
    """Name a shape in a few words."""
    workload = {"one": "one query", "ten": "ten queries", "transaction": "a transaction"}[shape.workload]
    workers = f"{shape.workers} workers x {shape.threads} threads" if shape.is_threaded else f"{shape.workers} workers"
    return f"{workload}, {workers} on {shape.connections} connections"


def at_least(what: str, found: Quartiles | None, bound: float) -> Finding:
    """Judge the median of ratios that are to be large."""
    return _judge(what, found, bound, f"at least {bound:g}", lambda median: median >= bound)


def at_most(what: str, found: Quartiles | None, bound: float) -> Finding:
    """Judge the median of ratios that are to be small."""
    return _judge(what, found, bound, f"at most {bound:g}", lambda median: median <= bound)


def _judge(what: str, found: Quartiles | None, bound: float, asked: str, is_met: Callable[[float], bool]) -> Finding:
    if found is None:
        return Finding(what, asked, "not measured", None)
    return Finding(what, asked, f"{found:.2f}", is_met(found.median))


def _caps(comparison: Comparison) -> Finding:
    """Whether the server ever had more of shmpool's sessions than the cap.

    The role's limit decides: a look at pg_stat_activity is no copy of one moment, and sees one that ended meanwhile.
    """
    ours = comparison.series["shmpool"]
    return Finding(
        f"{describe(comparison.shape)}: sessions beyond the cap",
        "0",
        f"{ours.refusals} refused by the server, {ours.sessions} of {comparison.shape.connections} seen",
        ours.refusals == 0,
    )


def workers_have_enough(server: Server, effort: Effort) -> tuple[list[Comparison], list[Finding]]:
    """Workers <= connections: every worker keeps its own."""
    comparisons, findings = [], []
    for workers in (4, 16):
        for workload in effort.workloads:
            shape = Shape(workload, workers, 1, workers, 2 * workers)
            found = compare(server, shape, ("raw", "shmpool", *POOLERS, *PER_WORKER), effort)
            comparisons.append(found)
            least = 1.10 if workload == "one" else 1.35
            what = describe(shape)
            findings.append(at_least(f"{what}: of raw", found.ratio(rate, "raw"), 0.97))
            findings.append(at_least(f"{what}: of PgBouncer", found.ratio(rate, "pgbouncer"), least))
            ceiling = found.ratio(rate, "pgbouncer", "raw")  # what any pool without a hop can have
            findings.append(Finding("  raw: of PgBouncer", "", f"{ceiling:.2f}" if ceiling else "not measured", None))
    return comparisons, findings


def threads_share(server: Server, effort: Effort) -> tuple[list[Comparison], list[Finding]]:
    """Threads > connections >= workers: the threads of a worker share its connections."""
    comparisons, findings = [], []
    for threads, connections in ((16, 8), (64, 16)):
        for workload in [one for one in effort.workloads if one != "ten"]:
            shape = Shape(workload, 4, threads, connections, 2 * 4 * threads)
            found = compare(server, shape, ("shmpool", *POOLERS, *PER_WORKER, UNBOUNDED), effort)
            comparisons.append(found)
            what = describe(shape)
            findings.append(at_least(f"{what}: of PgBouncer", found.ratio(rate, "pgbouncer"), 1.1))
            findings.append(at_most(f"{what}: p99, of PgBouncer's", found.ratio(p99, "pgbouncer"), 1.2))
            ceiling = found.ratio(rate, "pgbouncer", UNBOUNDED)  # without any pool, and with no cap
            told = f"{ceiling:.2f}" if ceiling else "not measured"
            findings.append(
                Finding(f"  raw, a session for each of {4 * threads} threads: of PgBouncer", "", told, None)
            )
            share = found.series["shmpool"].least_thread(shape)
            findings.append(Finding(f"{what}: least-served thread", "at least 0.5", f"{share:.2f}", share >= 0.5))
            findings.append(_caps(found))
    return comparisons, findings


def workers_share(server: Server, effort: Effort) -> tuple[list[Comparison], list[Finding]]:
    """Workers > connections: connections move between workers."""
    comparisons, findings = [], []
    for workload in effort.workloads:
        shape = Shape(workload, 16, 1, 4, 32)
        found = compare(server, shape, ("shmpool", *POOLERS), effort)
        comparisons.append(found)
        ours = found.series["shmpool"]
        findings.append(_caps(found))
        what = f"{describe(shape)}: requests beyond their timeout"
        longest = f"{ours.errors} failed, longest {ours.longest:.2f} s"
        findings.append(Finding(what, "0", longest, ours.errors == 0))
    return comparisons, findings


def idle_moves(server: Server, effort: Effort) -> tuple[list[Comparison], list[Finding]]:
    """An idle worker's connection reaches a waiter: two masters of one worker each, one connection for both."""
    count = MOVES * effort.starts * effort.rounds
    effort.say(f"{count} moves between two workers")
    with twins(server, Shape("one", 1, 1, 1, 1)) as pair:
        moves, connects = [], []
        for number in range(count + 2):
            site = pair[number % 2]
            seconds = site.ask("/reached")
            if number >= 2:  # the first ones attach
                moves.append(seconds * 1e3)
            time.sleep(REST_S)
            connects.append(site.ask("/connect") * 1e3)
            time.sleep(REST_S)
    move, connect = Quartiles.of(moves), Quartiles.of(connects)
    bound = LEAD_S * 1e3 + connect.median
    return [], [
        Finding("a connect", "", f"{connect:.1f} ms", None),
        Finding(
            "until an idle worker's connection is here",
            f"at most 10 ms and one connect, {bound:.1f} ms",
            f"{move:.1f} ms, longest {max(moves):.1f}",
            move.median <= bound,
        ),
    ]


CASES = {
    case.name: case
    for case in (
        Case("enough", "Workers <= connections", workers_have_enough),
        Case("threads", "Threads > connections >= workers", threads_share),
        Case("workers", "Workers > connections", workers_share),
        Case("moves", "An idle worker's connection reaches a waiter", idle_moves),
    )
}
