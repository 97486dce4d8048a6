"""Launcher: `python tools/plan_scale.py --help`."""

import sys

from retro_mcore.cli.plan_scale import main

if __name__ == "__main__":
    sys.exit(main())
