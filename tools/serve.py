"""Launcher, for torchrun too: `python tools/serve.py --help`."""

import sys

from retro_mcore.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
