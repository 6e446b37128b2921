"""`python -m shmpool_coordinator`."""

from __future__ import annotations

import sys

from shmpool_coordinator.cli import main

sys.exit(main())
