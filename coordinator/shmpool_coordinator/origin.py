"""Where a pool's configuration comes from: a file that is read again on a reload, or the process that started the
coordinator, which gave it through a pipe together with the endpoints' passwords.

Guarantees: what was given is kept in memory only; no message, log line or `repr` shows a password.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from shmpool.document import END, MAX_BYTES, digest_of
from shmpool_coordinator.config import Config, ConfigError, Finding, load, parse

READ_WITHIN_S: Final = 10.0
STANDARD_INPUT: Final = "standard input"  # what stands in messages where a file's name would
KEPT: Final = 2  # passwords of an endpoint: the newest, and the one before it
_CHUNK_BYTES: Final = 64 * 1024
_PR_SET_DUMPABLE: Final = 4


class Passwords:
    """The endpoints' passwords as processes gave them: the newest first, then the one before it.

    Processes that started before a password was changed know the old one only and may come back last: whichever the
    server refuses makes room for the other.

    Threads.  Probes ask from threads of their own; the event loop alone changes anything, in one store.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._known: dict[str, tuple[str, ...]] = {endpoint: (password,) for endpoint, password in given.items()}

    def __repr__(self) -> str:
        return f"<Passwords of {len(self._known)} endpoints>"

    def __call__(self, endpoint: str) -> str | Mapping[str, str]:
        """Return the password to try now; nothing: libpq finds one its own ways."""
        known = self._known.get(endpoint)
        return known[0] if known else {}

    def take(self, endpoint: str, password: str) -> bool:
        """Put a password first; return whether another one was first before."""
        known = self._known.get(endpoint, ())
        self._known[endpoint] = (password, *(one for one in known if one != password))[:KEPT]
        return known[:1] != (password,)

    def refused(self, endpoint: str) -> None:
        """Let the other one be tried next."""
        known = self._known.get(endpoint, ())
        self._known[endpoint] = known[1:] + known[:1]


class Origin(Protocol):
    """Where the configuration comes from."""

    passwords: Passwords | None
    """What processes gave with it; None: it says itself where passwords are read."""

    def read(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: it cannot be used.
        """

    def read_again(self) -> Config:
        """Return the configuration as it is now, for a reload.  Raises as `read`."""


class File:
    """A configuration file."""

    passwords: Passwords | None = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Config:
        """Read the file.  Raises ConfigError."""
        return load(self._path)

    def read_again(self) -> Config:
        """Read the file.  Raises ConfigError."""
        return load(self._path)


class Given:
    """What a process gave: it stays as it is for the coordinator's life, but for newer passwords."""

    def __init__(self, config: Config, passwords: Mapping[str, str]) -> None:
        self._config = config
        has_sources = any(any(endpoint.credentials.model_dump().values()) for endpoint in config.endpoints.values())
        self.passwords = None if has_sources else Passwords(passwords)

    def read(self) -> Config:
        """Return the configuration."""
        return self._config

    def read_again(self) -> Config:
        """Refuse: there is nothing to read."""
        raise ConfigError(
            f"pool {self._config.name!r}",
            (
                "was configured by the process that started its coordinator: there is no file to read again. "
                "Another configuration is another pool, or this one once its coordinator has ended",
            ),
        )


def given_by(fd: int, within: float = READ_WITHIN_S) -> Given:
    """Read and check the document that a process sends, up to END or the end of the file.

    Args:
        fd: where it is read; nothing of it can be read there afterwards.
        within: seconds for the whole of it.

    Raises:
        ConfigError: all that is wrong with it; no message shows a password.
    """
    try:
        return parse_document(_read(fd, within))
    finally:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, fd)
        os.close(null)


def hide_memory() -> None:
    """Keep core dumps and other processes of the same user from this process's memory (prctl PR_SET_DUMPABLE)."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _read(fd: int, within: float) -> bytes:
    text = b""
    deadline = time.monotonic() + within
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while END not in text:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ConfigError(STANDARD_INPUT, (f"found no end after {within:g} s, expected one JSON document",))
        chunk = os.read(fd, _CHUNK_BYTES)
        if not chunk:
            break
        text += chunk
        if len(text) > MAX_BYTES:
            raise ConfigError(STANDARD_INPUT, (f"found more than {MAX_BYTES} bytes, expected one JSON document",))
    return text.partition(END)[0]


def parse_document(text: bytes) -> Given:
    """Check a document: `{"config": {tables as in the file}, "passwords": {endpoint: text}}`.

    Raises:
        ConfigError: all that is wrong with it; no message shows a password.
    """
    raw = None
    with contextlib.suppress(ValueError, RecursionError):  # they hold the text, and quote the middle of a password
        raw = json.loads(text)
    if raw is None:
        raise ConfigError(STANDARD_INPUT, ("is not a JSON document",))
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), dict) or raw.keys() - {"config", "passwords"}:
        raise ConfigError(STANDARD_INPUT, ('found no such keys, expected {"config": {...}, "passwords": {...}}',))
    findings: list[str] = []
    config = None
    try:
        config = parse(raw["config"], STANDARD_INPUT).with_source("", digest_of(raw["config"]))
    except ConfigError as error:
        findings += error.findings
    passwords, endpoints = raw.get("passwords", {}), raw["config"].get("endpoints")
    findings += map(str, password_findings(passwords, endpoints))
    if passwords:
        findings += map(str, _source_findings(endpoints))
    if findings or config is None:
        raise ConfigError(STANDARD_INPUT, tuple(findings))
    return Given(config, passwords)


def password_findings(passwords: Any, endpoints: Any) -> Iterator[Finding]:
    """Yield what is wrong with passwords for these endpoints; shows neither a password nor a name that is none."""
    if not isinstance(passwords, Mapping):
        yield Finding("passwords", f"a value of type {type(passwords).__name__}", "a table of texts by endpoint")
        return
    names = tuple(endpoints) if isinstance(endpoints, Mapping) else ()
    for endpoint, password in passwords.items():
        if endpoint not in names:
            yield Finding("passwords", "a name that no endpoint has", f"only {', '.join(names) or 'none'}")
        elif not _is_password(password):
            yield Finding(
                f"passwords.{endpoint}", "something else", "a text that is not empty, without null characters"
            )


def _source_findings(endpoints: Any) -> Iterator[Finding]:
    """Yield which endpoints say beside given passwords where one is read."""
    if isinstance(endpoints, Mapping):
        for name, table in endpoints.items():
            if isinstance(table, Mapping) and table.get("credentials"):
                yield Finding(f"endpoints.{name}.credentials", "credentials beside passwords", "one way for all")


def _is_password(value: Any) -> bool:
    """Whether libpq can take it, and a server accept it."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
