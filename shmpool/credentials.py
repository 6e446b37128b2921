"""Read the secrets of a connection where they are, at every connect.

Where they are, first found: the callable that the pool was given; the endpoint's `[credentials]`; else libpq finds
them its own ways (passfile, service file, PGPASSWORD).

Guarantees: nothing is kept.  A secret goes from here to libpq, and never into the segment, a log line, a message, a
    `repr` or a frame of an exception that is raised here.
Threads.  Anything here may run in several threads at once.  Fork.  Nothing to inherit; `password_command` is run
without at-fork handlers.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, KeysView, Mapping
from pathlib import Path
from typing import Final

from psycopg2 import OperationalError

from shmpool.settings import EndpointSettings

KEYWORDS: Final = ("user", "password", "passfile", "sslcert", "sslkey", "sslpassword")  # what a callable may return
COMMAND_TIMEOUT_S: Final = 10.0

Lookup = Callable[[str], str | Mapping[str, str]]  # an endpoint's name -> its password, or some of KEYWORDS

# Messages of SQLSTATE 28P01 and 28000, of libpq about the same, and of poolers.  A failed connect has no SQLSTATE in
# psycopg2, only this text; what a server says in another language is not recognised by it.
_AUTHENTICATION_FAILURE: Final = re.compile(
    r"authentication failed|no password supplied|empty password|no pg_hba\.conf entry|pg_hba\.conf rejects"
    r'|role ".*" (does not exist|is not permitted to log in)|valid client certificate|no such user'
)


class CredentialsError(OperationalError):
    """There are no secrets where they should be; says where that is, never what was found."""

    is_refused: Final = True  # as by a server: tried once more, and of no use to wait for
    is_over: Final = True  # nothing was asked of a server


class Secrets:
    """libpq keywords that may hold secrets: to be unpacked into a connect (`**secrets`), and shown by nothing else.

    Not a mapping: whoever draws local variables (debuggers, error trackers) opens those.
    """

    __slots__ = ("_keywords",)

    def __init__(self, keywords: Mapping[str, str]) -> None:
        self._keywords = dict(keywords)

    def __repr__(self) -> str:
        return f"<Secrets {', '.join(self._keywords) or 'left to libpq'}>"

    def __eq__(self, other: object) -> bool:
        return self._keywords == other._keywords if isinstance(other, Secrets) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # they are compared, and no more

    def keys(self) -> KeysView[str]:
        """Return the keywords."""
        return self._keywords.keys()

    def __getitem__(self, keyword: str) -> str:
        return self._keywords[keyword]


def read_secrets(endpoint: EndpointSettings, lookup: Lookup | None = None) -> Secrets:
    """Return the secrets to connect to an endpoint with; none: libpq finds them its own ways.

    Args:
        lookup: asked instead of what the endpoint's settings name.

    Raises:
        CredentialsError: the place named has none.
    """
    credentials, expected = endpoint.credentials, "a password"
    if lookup is not None:
        place, found = "credentials()", _returned(lookup, endpoint.name)
        expected = f"a password (str), or a mapping of some of {', '.join(KEYWORDS)} to texts"
    elif credentials.password_file:
        place = f"password_file {credentials.password_file}"
        found = _password(_of_file(endpoint.name, credentials.password_file))
    elif credentials.password_env:
        place = f"environment variable {credentials.password_env} (password_env)"
        found = _password(os.environb.get(credentials.password_env.encode()))
    elif credentials.password_command:
        place = f"password_command {credentials.password_command[0]}"
        found = _password(_of_command(endpoint.name, credentials.password_command))
    else:
        return Secrets({})
    if isinstance(found, Secrets):
        return found
    raise CredentialsError(f"endpoint {endpoint.name!r}: {place}: found {found}, expected {expected}")


def may_be_cured(told: str, used: Secrets, now: Secrets) -> bool:
    """Whether a server that refused a connect may accept the next one: secrets may just have been replaced.

    Args:
        told: what libpq said.
        used: the secrets of that connect.
        now: those that are read afterwards.
    """
    return used != now or _AUTHENTICATION_FAILURE.search(told) is not None


def _returned(lookup: Lookup, endpoint: str) -> Secrets | str:
    """Return what a callable gives, or say what is wrong with it."""
    try:
        found: object = lookup(endpoint)
    except Exception as error:  # the application's own, whose text may say too much for this one
        raise CredentialsError(f"endpoint {endpoint!r}: credentials() raised {type(error).__name__}") from error
    keywords = {"password": found} if isinstance(found, str) else found
    if not isinstance(keywords, Mapping):
        return type(found).__name__
    for keyword, value in keywords.items():
        if keyword not in KEYWORDS:
            return f"the keyword {keyword!r}"
        if not isinstance(value, str):
            return f"{type(value).__name__} as {keyword}"
        if (fault := _fault_of(value)) is not None:
            return f"{fault} as {keyword}"
    return Secrets(keywords)


def _password(raw: bytes | None) -> Secrets | str:
    """Return what a place of the configuration holds, or say what is wrong with it."""
    if raw is None:
        return "no such variable"
    text = raw.decode("utf-8", "surrogateescape")  # what is not UTF-8 is told without quoting it
    return _fault_of(text) or Secrets({"password": text})


def _fault_of(text: str) -> str | None:
    """Return why libpq cannot take a value.  An empty password is hardly meant: PostgreSQL never accepts one."""
    if not text:
        return "nothing"
    if "\0" in text:
        return "a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "something that is not UTF-8"
    return None


def _of_file(endpoint: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise CredentialsError(
            f"endpoint {endpoint!r}: password_file {file} cannot be read ({error.strerror})"
        ) from None


def _of_command(endpoint: str, command: tuple[str, ...]) -> bytes:
    """Return what a program printed, without the line ends behind it.

    Where something else reaps this process's children (SIGCHLD ignored, or handled by `waitpid(-1)`), the program's
    exit code is lost, and what it printed decides.
    """
    import subprocess  # cold, and most pools never need it

    told, printed = "", b""
    try:
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it may quote what it was given
            start_new_session=True,  # its own children can be ended with it
        )
    except OSError as error:
        told = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be run ({error.strerror})"
        raise CredentialsError(f"endpoint {endpoint!r}: password_command {command[0]} {told}") from None
    with program:
        try:
            printed, _ = program.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            told = f"gave no password within {COMMAND_TIMEOUT_S:g} s"
        finally:
            if program.poll() is None:  # too slow, or a signal handler raised here
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
    if not told and program.returncode:
        code = program.returncode
        told = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
    if not told:
        return printed.rstrip(b"\r\n")
    printed = b""  # not for whoever draws the frames of the exception
    raise CredentialsError(f"endpoint {endpoint!r}: password_command {command[0]} {told}")
