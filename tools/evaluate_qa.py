"""Launcher, for torchrun too: `python tools/evaluate_qa.py --help`."""

import sys

from retro_mcore.cli.evaluate_qa import main

if __name__ == "__main__":
    sys.exit(main())
