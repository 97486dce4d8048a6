"""Launcher, for torchrun too: `python tools/set_samples.py --help`."""

import sys

from retro_mcore.cli.set_samples import main

if __name__ == "__main__":
    sys.exit(main())
