"""Launcher, for torchrun too: `python tools/inspect_neighbors.py --help`."""

import sys

from retro_mcore.cli.inspect_neighbors import main

if __name__ == "__main__":
    sys.exit(main())
