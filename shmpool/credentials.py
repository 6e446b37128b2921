"""Read a password where the configuration says it is, at every connect.

Nothing is kept: the value goes to libpq and nowhere else, never into the segment, a log line or a `repr`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from psycopg2 import OperationalError

from shmpool.settings import EndpointSettings

COMMAND_TIMEOUT_S: Final = 10.0


def read_secrets(endpoint: EndpointSettings) -> dict[str, str]:
    """Return libpq keywords that carry the endpoint's secrets; empty: libpq finds them its own ways.

    Raises:
        psycopg2.OperationalError: the named place has no password; says which, never what.
    """
    credentials = endpoint.credentials
    if credentials.password_file:
        try:
            return {"password": Path(credentials.password_file).read_text().rstrip("\r\n")}
        except OSError as error:
            raise OperationalError(
                f"endpoint {endpoint.name!r}: password_file {credentials.password_file} cannot be read "
                f"({error.strerror})"
            ) from None
    if credentials.password_env:
        try:
            return {"password": os.environ[credentials.password_env]}
        except KeyError:
            raise OperationalError(
                f"endpoint {endpoint.name!r}: environment variable {credentials.password_env} (password_env) is not set"
            ) from None
    if credentials.password_command:
        return {"password": _command_output(endpoint.name, credentials.password_command)}
    return {}


def _command_output(endpoint: str, command: tuple[str, ...]) -> str:
    import subprocess  # cold, and most pools never need it

    try:
        done = subprocess.run(
            command, check=True, timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        told = "is not there"
    except OSError as error:
        told = f"cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        told = f"gave no password within {COMMAND_TIMEOUT_S:g} s"
    except subprocess.CalledProcessError as error:
        told = f"ended with exit code {error.returncode}"
    else:
        return done.stdout.rstrip("\r\n")
    raise OperationalError(f"endpoint {endpoint!r}: password_command {command[0]} {told}")
