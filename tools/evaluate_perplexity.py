"""Launcher, for torchrun too: `python tools/evaluate_perplexity.py --help`."""

import sys

from retro_mcore.cli.evaluate_perplexity import main

if __name__ == "__main__":
    sys.exit(main())
