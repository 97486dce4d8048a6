"""Launcher, for torchrun too: `python tools/preprocess_corpus.py --help`."""

import sys

from retro_mcore.cli.preprocess_corpus import main

if __name__ == "__main__":
    sys.exit(main())
