"""A pool's configuration that a process carries itself, with the passwords of its endpoints.

It goes to the coordinator that the process starts, through a pipe: one JSON document, then END.  Nothing is checked
here but that it can be written down; the coordinator checks it as it checks a file.

Guarantees: no password is in a `repr`, in `digest` or in any message; a change of the mappings that it was made from
changes nothing here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

END: Final = b"\0"  # of a document in a pipe: a child forked meanwhile may keep the pipe's own end away
MAX_CONFIG_BYTES: Final = 256 * 1024
MAX_PASSWORDS_BYTES: Final = 48 * 1024  # they also go in one message on the control socket (frames.py)
MAX_BYTES: Final = 512 * 1024  # that a reader takes in


class Document:
    """What the configuration file would hold, and a password for each endpoint that needs one.

    Args:
        config: tables and keys as in the file; no password in it.
        passwords: by the endpoint's name; an empty one counts as none.

    Raises:
        TypeError, ValueError: it cannot be written down; the message shows no value.
    """

    __slots__ = ("_passwords", "config", "digest", "name")

    def __init__(self, config: Mapping[str, Any], passwords: Mapping[str, str] | None = None) -> None:
        text = _canonical(config)
        self.config: dict[str, Any] = json.loads(text)
        self.name = str(self.config.get("name", ""))
        self.digest = _digest(text)
        self._passwords: dict[str, str] = {}
        for endpoint, password in (passwords or {}).items():
            if not isinstance(endpoint, str) or not isinstance(password, str):
                raise TypeError("passwords: expected texts by the names of endpoints")
            if password:
                self._passwords[endpoint] = password
        if len(text) > MAX_CONFIG_BYTES or len(json.dumps(self._passwords)) > MAX_PASSWORDS_BYTES:
            raise ValueError(
                f"config and passwords: take too much room as JSON, expected at most {MAX_CONFIG_BYTES} and "
                f"{MAX_PASSWORDS_BYTES} bytes"
            )

    def __repr__(self) -> str:
        return f"<Document {self.name!r} {self.digest[:12]}, {len(self._passwords)} passwords>"

    def read_passwords(self) -> dict[str, str]:
        """Return the passwords by endpoint: a copy, for the coordinator alone."""
        return dict(self._passwords)

    def password(self, endpoint: str) -> str | Mapping[str, str]:
        """Return an endpoint's password; nothing: libpq finds one its own ways."""
        return self._passwords.get(endpoint, {})

    def encode(self) -> bytes:
        """Return what goes through the pipe."""
        return json.dumps({"config": self.config, "passwords": self._passwords}).encode() + END


def digest_of(config: Mapping[str, Any]) -> str:
    """Return the digest by which process and coordinator know that they mean the same configuration."""
    return _digest(_canonical(config))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise TypeError(f"config: found {type(config).__name__}, expected a mapping with the tables of the file")
    try:
        return json.dumps(dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config: cannot be written as JSON ({error})") from None
