"""Launcher, for torchrun too: `python tools/finetune_retro.py --help`."""

import sys

from retro_mcore.cli.finetune_retro import main

if __name__ == "__main__":
    sys.exit(main())
