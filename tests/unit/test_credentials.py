"""Where secrets are read, what is refused, and that nothing shows them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shmpool import Pool, credentials
from shmpool.credentials import KEYWORDS, CredentialsError, Lookup, Secrets, may_be_cured, read_secrets
from shmpool.rows import start_time
from shmpool.settings import Credentials, EndpointSettings
from tests.support.pools import endpoint_settings
from tests.support.secrets import is_shown
from tests.support.waiting import wait_until

SECRET = "hunter2"


class InterruptedHereError(Exception):
    """What a signal handler might raise."""


def endpoint(*, file: str | Path = "", command: tuple[str, ...] = (), env: str = "") -> EndpointSettings:
    """Return an endpoint whose password is read somewhere."""
    return endpoint_settings()._replace(credentials=Credentials(str(file), command, env))


def password_of(settings: EndpointSettings, lookup: Lookup | None = None) -> str:
    """Return the password that is read."""
    return read_secrets(settings, lookup)["password"]


def refusal(settings: EndpointSettings, lookup: Lookup | None = None) -> CredentialsError:
    """Return the error that reading ends with; it names the endpoint, and nothing of it shows the secret."""
    with pytest.raises(CredentialsError) as caught:
        read_secrets(settings, lookup)
    assert "endpoint 'pg1': " in str(caught.value)
    assert not is_shown(caught.value, SECRET)
    return caught.value


def shell(script: str) -> EndpointSettings:
    """Return an endpoint whose password a shell script prints."""
    return endpoint(command=("/bin/sh", "-c", script))


# -- files


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b" hunter2 \t\n", " hunter2 \t"),
        ("höchst geheim\n".encode(), "höchst geheim"),
    ],
)
def test_file_holds_the_password_and_a_line_end(tmp_path: Path, content: bytes, password: str) -> None:
    """All of a file is the password, but for the line end behind it; it is UTF-8."""
    file = tmp_path / "password"
    file.write_bytes(content)
    assert password_of(endpoint(file=file)) == password


def test_file_is_read_each_time(tmp_path: Path) -> None:
    """A file that was replaced counts from the next connect on."""
    file = tmp_path / "password"
    file.write_text("old")
    assert password_of(endpoint(file=file)) == "old"
    (tmp_path / "new").write_text("new")
    os.replace(tmp_path / "new", file)
    assert password_of(endpoint(file=file)) == "new"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "found nothing, expected a password"),
        (b"\n", "found nothing, expected a password"),
        (b"hunter2\0\n", "found a null character"),
        (b"hunter2\xff", "found something that is not UTF-8"),
    ],
)
def test_file_without_a_password_is_told_by_its_name(tmp_path: Path, content: bytes | None, told: str) -> None:
    """What keeps a file from giving a password is told with its name, and never what is in it."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    message = str(refusal(endpoint(file=file)))
    assert f"password_file {file}" in message
    assert told in message


def test_directory_is_no_password_file(tmp_path: Path) -> None:
    """A directory, as a wrong mount makes one, is told."""
    assert "Is a directory" in str(refusal(endpoint(file=tmp_path)))


# -- the environment


def test_variable_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable holds the password and nothing else."""
    monkeypatch.setenv("APP_PASSWORD", " hunter2\n")
    assert password_of(endpoint(env="APP_PASSWORD")) == " hunter2\n"


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "no such variable"), (b"", "found nothing"), (b"hunter2\xff", "not UTF-8")],
)
def test_variable_without_a_password(monkeypatch: pytest.MonkeyPatch, value: bytes | None, told: str) -> None:
    """A variable that is not set, empty or no text is told by its name."""
    monkeypatch.delenv("APP_PASSWORD", raising=False)
    if value is not None:
        monkeypatch.setitem(os.environb, b"APP_PASSWORD", value)
    message = str(refusal(endpoint(env="APP_PASSWORD")))
    assert "environment variable APP_PASSWORD (password_env): " in message
    assert told in message


# -- programs


def test_output_of_a_program_is_the_password() -> None:
    """What a program prints is the password, but for the line ends behind it; what it says besides is not."""
    assert password_of(shell("echo ' hunter2 '; echo; echo noise >&2")) == " hunter2 "


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            ("/bin/sh", "-c", "echo hunt''er2; echo hunt''er2 >&2; exit 3"),
            "password_command /bin/sh ended with exit code 3",
        ),
        (("/bin/sh", "-c", "echo hunt''er2; kill -TERM $$"), "password_command /bin/sh was ended by signal 15"),
        (("/bin/sh", "-c", "exit 0"), "found nothing, expected a password"),
        (("/nowhere/vault", "read"), "password_command /nowhere/vault is not there"),
        (("/dev/null",), "password_command /dev/null cannot be run (Permission denied)"),
    ],
)
def test_program_without_a_password(command: tuple[str, ...], told: str) -> None:
    """A program that fails is told by its exit code, without its output or arguments."""
    assert told in str(refusal(endpoint(command=command)))


def test_program_that_takes_too_long_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program has a bounded time; then it and what it started are killed."""
    monkeypatch.setattr(credentials, "COMMAND_TIMEOUT_S", 0.3)
    pid_file = tmp_path / "pid"
    began = time.monotonic()
    slow = shell(f"echo hunt''er2; sleep 60 & echo $! > {pid_file}; wait")
    assert "gave no password within 0.3 s" in str(refusal(slow))
    assert time.monotonic() - began < 5
    child = int(pid_file.read_text())
    wait_until(lambda: start_time(child) is None)


def test_program_is_ended_when_a_signal_handler_raises(tmp_path: Path) -> None:
    """An exception from a signal handler while a program runs leaves no process behind."""
    pid_file = tmp_path / "pid"

    def interrupt(*_: object) -> None:
        if pid_file.exists() and pid_file.read_text().strip():
            raise InterruptedHereError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with pytest.raises(InterruptedHereError):
            read_secrets(shell(f"echo $$ > {pid_file}; exec sleep 60"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert start_time(int(pid_file.read_text())) is None


REAPING = """
import os, signal, sys
from shmpool.credentials import CredentialsError, read_secrets
from tests.unit.test_credentials import shell

def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

signal.signal(signal.SIGCHLD, signal.SIG_IGN if sys.argv[1] == "ignored" else reap)
for _ in range(20):
    assert read_secrets(shell("echo hunter2"))["password"] == "hunter2"
try:
    read_secrets(shell("exit 3"))
except CredentialsError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["ignored", "reaped"])
def test_program_whose_exit_code_is_stolen(how: str) -> None:
    """Under a server that ignores SIGCHLD, or whose handler waits for every child, what is printed decides."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REAPING, how], capture_output=True, text=True, check=True
    )
    assert "password_command /bin/sh" in done.stdout
    assert "found nothing" in done.stdout or "exit code 3" in done.stdout


# -- callables


def test_callable_goes_before_everything_and_is_asked_each_time(tmp_path: Path) -> None:
    """A callable is asked by the endpoint's name at each connect, and nothing else is read then."""
    asked: list[str] = []

    def lookup(name: str) -> str:
        asked.append(name)
        return f"hunter{len(asked)}"

    settings = endpoint(file=tmp_path / "is not there", env="NOR_THIS")
    assert [password_of(settings, lookup) for _ in range(2)] == ["hunter1", "hunter2"]
    assert asked == ["pg1", "pg1"]


def test_callable_may_return_keywords() -> None:
    """A mapping gives the keywords that authenticate, and no other; an empty one leaves it to libpq."""
    everything = {keyword: f"some {keyword}" for keyword in KEYWORDS}
    assert dict(read_secrets(endpoint(), lambda _: everything)) == everything
    assert dict(read_secrets(endpoint(), lambda _: {})) == {}


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("", "found nothing as password, expected a password (str), or a mapping of some of user, password, passfile"),
        ("hunter2\0", "found a null character as password"),
        ("hunter2\udcff", "found something that is not UTF-8 as password"),
        (b"hunter2", "found bytes, expected a password (str)"),
        (None, "found NoneType, expected"),
        (("app", "hunter2"), "found tuple, expected"),
        ({"password": b"hunter2"}, "found bytes as password, expected"),
        ({"password": "hunter2", "host": "10.0.0.9"}, "found the keyword 'host', expected"),
        ({"password": "hunter2", "port": "1"}, "found the keyword 'port', expected"),
        ({"password": "hunter2", "dbname": "other"}, "found the keyword 'dbname', expected"),
        ({"user": "app", "password": ""}, "found nothing as password, expected"),
    ],
)
def test_what_a_callable_may_not_return(returned: Any, told: str) -> None:
    """Anything else is told by what it is, not by what is in it: where a server is belongs to its endpoint."""
    assert told in str(refusal(endpoint(), lambda _: returned))


def test_exception_of_a_callable_is_the_cause() -> None:
    """What a callable raises is kept as the cause; its text, which may say too much, is not repeated."""

    def lookup(name: str) -> Mapping[str, str]:
        raise LookupError(SECRET)

    with pytest.raises(CredentialsError, match=r"^endpoint 'pg1': credentials\(\) raised LookupError$") as caught:
        read_secrets(endpoint(), lookup)
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("given", [SECRET, {"password": SECRET}, 7])
def test_pool_takes_only_a_callable(given: Any) -> None:
    """A password in the place of the callable is refused without being quoted."""
    with pytest.raises(TypeError, match="expected a callable") as caught:
        Pool("web", credentials=given)
    assert SECRET not in str(caught.value)


# -- what is read


def test_nothing_configured_is_left_to_libpq() -> None:
    """Without a place to read from there are no keywords: libpq looks where it always does."""
    assert dict(read_secrets(endpoint())) == {}


def test_secrets_are_not_drawn() -> None:
    """Secrets are shown by their keywords alone, and are no mapping that an error tracker would open."""
    secrets = Secrets({"user": "app", "password": SECRET})
    assert repr(secrets) == "<Secrets user, password>"
    assert repr(Secrets({})) == "<Secrets left to libpq>"
    assert not isinstance(secrets, Mapping)
    assert secrets == Secrets({"password": SECRET, "user": "app"})
    assert secrets != Secrets({"password": "hunter3", "user": "app"})
    with pytest.raises(TypeError):
        hash(secrets)


@pytest.mark.parametrize(
    ("told", "is_cured"),
    [
        ('FATAL:  password authentication failed for user "app"', True),
        ('FATAL:  Peer authentication failed for user "app"', True),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.7", user "app", database "app", no encryption', True),
        ('FATAL:  role "app" does not exist', True),
        ('FATAL:  role "app" is not permitted to log in', True),
        ("FATAL:  connection requires a valid client certificate", True),
        ("fe_sendauth: no password supplied", True),
        ('FATAL:  database "app" does not exist', False),
        ("FATAL:  sorry, too many clients already", False),
        ('ВАЖНО:  пользователь "app" не прошёл проверку подлинности (по паролю)', False),
    ],
)
def test_a_second_try_is_worth_it(told: str, is_cured: bool) -> None:
    """An authentication failure is tried once more; what is said in another language only with other secrets."""
    used = Secrets({"password": "old"})
    assert may_be_cured(told, used, Secrets({"password": "old"})) is is_cured
    assert may_be_cured(told, used, Secrets({"password": "new"}))


WAYS: Mapping[str, Callable[[Path], EndpointSettings]] = {
    "file": lambda tmp: endpoint(file=tmp / "password"),
    "command": lambda tmp: endpoint(command=("/bin/cat", str(tmp / "password"))),
}


@pytest.mark.parametrize("way", WAYS)
def test_reading_leaves_no_descriptor(tmp_path: Path, way: str) -> None:
    """Reading opens nothing that stays open, whether it succeeds or fails."""
    before = set(os.listdir("/proc/self/fd"))
    with contextlib.suppress(CredentialsError):
        read_secrets(WAYS[way](tmp_path))
    (tmp_path / "password").write_text(SECRET)
    assert password_of(WAYS[way](tmp_path)) == SECRET
    assert set(os.listdir("/proc/self/fd")) == before
