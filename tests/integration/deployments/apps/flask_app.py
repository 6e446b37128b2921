"""The same under Flask."""

from __future__ import annotations

from typing import Any

from flask import Flask, request

from tests.integration.deployments.apps.answers import answer, chosen_hold, health

app = Flask(__name__)
hold = chosen_hold()


@app.get("/")
def busy() -> dict[str, Any]:
    """Keep a connection busy."""
    return answer(hold, request.query_string.decode())


app.get("/health")(health)
