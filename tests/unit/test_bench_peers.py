"""What the comparison with other pools makes of its figures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tools.bench.peers.cases import Comparison, Series, least_share, p99, rate
from tools.bench.peers.client import Load, Told, percentile
from tools.bench.peers.report import replace_marked
from tools.bench.peers.run import main
from tools.bench.peers.sites import Round, Shape
from tools.pg_cluster import HOST

GOOD = b"HTTP/1.0 200 OK\r\n\r\n"
BAD = b"HTTP/1.0 503 Service Unavailable\r\n\r\nno connection"


@contextmanager
def answering(*answers: bytes) -> Iterator[int]:
    """Serve these answers in turns, one for each connection; yield the port."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            number = 0
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(answers[number % len(answers)])
                number += 1

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def told(of_rate: float, of_p99: float = 0.01, errors: int = 0) -> Round:
    """Make a round."""
    return Round(Told(of_rate, 0.001, of_p99, 0.02, 100, errors, 0.1), {"server": 0.1, "workers": 0.3})


def series(*rounds: Round) -> Series:
    """Make a series of rounds in which two workers with two threads each have served."""
    served = {("1", ".1"): 10, ("1", ".2"): 20, ("2", ".3"): 30, ("2", ".4"): 0}
    return Series(rounds, 4, 0, [served], None)


def test_load_counts_what_was_served_and_what_failed() -> None:
    """Every answer other than 200 is an error, and the first one is told."""
    with answering(GOOD, GOOD, GOOD, BAD) as port:
        found = Load(port, 2, 0.05, 0.2).run()
    assert found.requests > 10
    assert found.errors == pytest.approx(found.requests / 4, abs=1)
    assert found.first_error == "no connection"
    assert 0 < found.p50 <= found.p99 <= found.longest < 1
    assert found.rate == pytest.approx(found.requests / 0.25, rel=0.5)


def test_a_connection_closed_without_an_answer_is_an_error() -> None:
    """A server that hangs up has not served."""
    with answering(b"") as port:
        found = Load(port, 1, 0.0, 0.05).run()
    assert found.errors == found.requests > 0


def test_percentiles_are_values_that_were_seen() -> None:
    """Of a hundred values the 99th percentile is the last but one."""
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0


def test_who_never_served_counts_for_the_least_share() -> None:
    """Threads without a count got nothing; a count of the main thread, which serves nothing, is nobody's."""
    assert least_share([10, 30, 0], 2) == 0.5
    assert least_share([10, 30], 4) == 0.0


def test_figures_of_a_series() -> None:
    """Counts add up by worker, CPU is told per request, and the longest request is that of any round."""
    one = series(told(100), told(200, errors=3))
    shape = Shape("one", 2, 2, 4, 8)
    assert (one.least_thread(shape), one.least_worker(shape)) == (0.0, 1.0)
    assert one.cpu().median == pytest.approx(4.0)
    assert one.cpu("server").median == pytest.approx(1.0)
    assert (one.errors, one.longest) == (3, 0.02)


def test_starts_are_joined() -> None:
    """Rounds follow each other, refusals add up, and the least served thread is that of a start in the middle."""
    shape = Shape("one", 1, 2, 2, 4)
    starts = [
        Series([told(100)], sessions, 1, [{("1", ".1"): 10, ("1", ".2"): count}], None)
        for sessions, count in ((2, 10), (1, 0), (2, 30))
    ]
    one = Series.joined(starts)
    assert (len(one.rounds), one.sessions, one.refusals) == (3, 2, 3)
    assert one.least_thread(shape) == 0.5


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down for one round moves no ratio; a peer that is missing has none."""
    found = Comparison(
        Shape("one", 2, 2, 4, 8),
        {"shmpool": series(told(100, 0.02), told(10, 0.2)), "pgbouncer": series(told(50, 0.01), told(5, 0.1))},
    )
    of_rate, of_p99 = found.ratio(rate, "pgbouncer"), found.ratio(p99, "pgbouncer")
    assert of_rate is not None
    assert of_p99 is not None
    assert (of_rate.low, of_rate.median, of_rate.high) == (2.0, 2.0, 2.0)
    assert of_p99.median == pytest.approx(2.0)
    assert found.ratio(rate, "raw") is None


def test_figures_take_the_place_of_earlier_ones() -> None:
    """Writing twice leaves one section, what stands around it stays, and a new one comes at the end."""
    page = "# Title\n\n<!-- figures: a -->\nold\n<!-- end of figures -->\nafter\n"
    page = replace_marked(replace_marked(page, "a", "first\n"), "a", "second \\1\n")
    assert page == "# Title\n\n<!-- figures: a -->\nsecond \\1\n<!-- end of figures -->\nafter\n"
    assert replace_marked(page, "b", "more\n").endswith("### b\n\n<!-- figures: b -->\nmore\n<!-- end of figures -->\n")


@pytest.mark.parametrize("arguments", [["--rounds", "1"], ["--starts", "-1"], ["--seconds", "-1"], ["--case", "other"]])
def test_unusable_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err
