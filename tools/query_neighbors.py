"""Launcher, for torchrun too: `python tools/query_neighbors.py --help`."""

import sys

from retro_mcore.cli.query_neighbors import main

if __name__ == "__main__":
    sys.exit(main())
