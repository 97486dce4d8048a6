"""Launcher, for torchrun too: `python tools/doctor.py --help`."""

import sys

from retro_mcore.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
