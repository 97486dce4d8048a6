"""Launcher, for torchrun too: `python tools/build_index.py --help`."""

import sys

from retro_mcore.cli.build_index import main

if __name__ == "__main__":
    sys.exit(main())
