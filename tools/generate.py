"""Launcher, for torchrun too: `python tools/generate.py --help`."""

import sys

from retro_mcore.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
