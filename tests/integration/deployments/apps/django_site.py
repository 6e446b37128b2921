"""Django's settings and command line in one file."""

from __future__ import annotations

import sys

from django.conf import settings  # type: ignore[import-untyped]
from django.core.management import execute_from_command_line  # type: ignore[import-untyped]


def main() -> None:
    """Do as a project's manage.py."""
    settings.configure(
        DEBUG=True,
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF="tests.integration.deployments.apps.django_views",
        USE_TZ=True,
    )
    execute_from_command_line(sys.argv)
