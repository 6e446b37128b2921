"""The same under Django: addresses and views."""

from __future__ import annotations

from typing import Any

from django.http import JsonResponse  # type: ignore[import-untyped]
from django.urls import path  # type: ignore[import-untyped]

from tests.integration.deployments.apps import answers

hold = answers.chosen_hold()


def busy(request: Any) -> Any:
    """Keep a connection busy."""
    return JsonResponse(answers.answer(hold, request.META["QUERY_STRING"]))


def health(request: Any) -> Any:
    """Say which process answers."""
    return JsonResponse(answers.health())


urlpatterns = [path("", busy), path("health", health)]
