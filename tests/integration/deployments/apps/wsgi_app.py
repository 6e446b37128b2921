"""The WSGI application that application servers load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from tests.integration.deployments.apps.answers import answer, chosen_hold, health

hold = chosen_hold()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request."""
    is_health = environ["PATH_INFO"] == "/health"
    body = json.dumps(health() if is_health else answer(hold, environ.get("QUERY_STRING", ""))).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
