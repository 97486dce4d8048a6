"""Launcher: `python tools/convert_checkpoint.py --help`."""

import sys

from retro_mcore.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
