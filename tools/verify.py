"""Launcher, for torchrun too: `python tools/verify.py --help`."""

import sys

from retro_mcore.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
