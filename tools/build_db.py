"""Launcher, for torchrun too: `python tools/build_db.py --help`."""

import sys

from retro_mcore.cli.build_db import main

if __name__ == "__main__":
    sys.exit(main())
