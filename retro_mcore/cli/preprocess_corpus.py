"""`preprocess_corpus`: text to tokens, and the configuration that all later stages read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro_mcore.cli.command import run_command
from retro_mcore.stages.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PreprocessCorpusOptions, preprocess_corpus, argv)


if __name__ == "__main__":
    sys.exit(main())
