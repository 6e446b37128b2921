"""Print the layout of the shared segment: `python -m tools.print_layout [--workers N ...]`."""

from __future__ import annotations

import sys

from shmpool.cli import main

if __name__ == "__main__":
    sys.exit(main(["layout", *sys.argv[1:]]))
