"""Launcher, for torchrun too: `python tools/update_db.py --help`."""

import sys

from retro_mcore.cli.update_db import main

if __name__ == "__main__":
    sys.exit(main())
