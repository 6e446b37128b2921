"""Register with uWSGI as an application that uses shmpool does; the raw one is measured without."""

from __future__ import annotations

import os

if "SHMPOOL_NAME" in os.environ:
    import shmpool.hooks.uwsgi  # noqa: F401  importing it registers
