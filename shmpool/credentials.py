"""Read a password where the configuration says it is, at every connect.

Nothing is kept: the value goes to libpq and nowhere else, never into the segment, a log line or a `repr`.
"""

from __future__ import annotations

import os
from pathlib import Path

from psycopg2 import OperationalError

from shmpool.settings import EndpointSettings


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
    return {}
