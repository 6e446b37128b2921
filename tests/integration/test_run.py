"""`make run` and `make demo` as a stranger meets them."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.postgres import require_postgres
from tests.support.uwsgi import requires_uwsgi
from tests.support.waiting import wait_until
from tools.stage import DIRECTORY_PREFIX, ROOT

NOTHING_LEFT = "nothing is left: no process, no shared memory, no socket, no directory"
END_S = 30.0


@contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run the tool with its temporary files in `tmp_path`; yields the process and what it prints."""
    require_postgres()
    output = tmp_path / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield process, output
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(END_S)


def wait_for_url(process: subprocess.Popen[bytes], output: Path) -> str:
    """Return the address that it tells once all is up."""

    def is_told() -> bool:
        assert process.poll() is None, output.read_text()
        return "stop    Ctrl-C" in output.read_text()

    wait_until(is_told, within=30, what=output.read_text)
    found = re.search(r"open +(http://\S+)", output.read_text())
    assert found is not None
    return found[1]


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_run_serves_until_it_is_stopped(tmp_path: Path, signals: Sequence[signal.Signals]) -> None:
    """It serves, shows the status, and Ctrl-C, twice as well, ends everything in order."""
    with running(tmp_path, "--workers", "2") as (process, output):
        url = wait_for_url(process, output)
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.status == 200
        for number in signals:
            process.send_signal(number)
        assert process.wait(END_S) == 0, output.read_text()
    text = output.read_text()
    assert "prefer-replica" in text
    assert text.index("Shutting down: Master") < text.index("ended, nothing is left") < text.index(NOTHING_LEFT)
    assert "Traceback" not in text


@requires_uwsgi
def test_uwsgi_serves_with_the_coordinator_as_its_mule(tmp_path: Path) -> None:
    """The example's own configuration serves, shows its workers as uWSGI's, and Ctrl-C ends everything in order."""
    with running(tmp_path, "--server", "uwsgi", "--workers", "2") as (process, output):
        url = wait_for_url(process, output)
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 0, output.read_text()
    text = output.read_text()
    assert re.search(r"coordinator serves pool \S+, pid \d+, a mule of uWSGI", text)
    assert text.index("goodbye to uWSGI") > text.index("ended, nothing is left")
    assert NOTHING_LEFT in text
    assert "Traceback" not in text


def test_a_program_that_ends_by_itself_ends_the_rest(tmp_path: Path) -> None:
    """A dead coordinator ends the run, with a line that says so."""
    with running(tmp_path, "--workers", "2") as (process, output):
        wait_for_url(process, output)
        found = re.search(r"coordinator serves pool \S+, pid (\d+)", output.read_text())
        assert found is not None
        subprocess.run(["kill", "-TERM", found[1]], check=True)
        assert process.wait(END_S) == 1, output.read_text()
    assert "failed: coordinator ended by itself, exit code 0" in output.read_text()
    assert NOTHING_LEFT in output.read_text()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """The port that was asked for is in use: one line says so, and nothing is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(tmp_path, "--port", str(port)) as (process, output):
            assert process.wait(END_S) == 1
    assert f"failed: port {port}: Address already in use; choose another with --port" in output.read_text()
    assert NOTHING_LEFT in output.read_text()


def test_demo_keeps_every_promise(tmp_path: Path) -> None:
    """Load, a killed worker, a stopped replica, a killed coordinator: everything held, and nothing is left."""
    with running(tmp_path, "--demo") as (process, output):
        code = process.wait(100)
    text = output.read_text()
    assert code == 0, text
    assert "everything held" in text
    assert NOTHING_LEFT in text
    directory = re.search(rf"\S*{DIRECTORY_PREFIX}\w+", text)
    assert directory is not None
    assert not Path(directory[0]).exists()
