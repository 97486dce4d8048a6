"""Launcher, for torchrun too: `python tools/pretrain_retro.py --help`."""

import sys

from retro_mcore.cli.pretrain_retro import main

if __name__ == "__main__":
    sys.exit(main())
