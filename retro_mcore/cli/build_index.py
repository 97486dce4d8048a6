"""`build_index`: embed the chunk database and index it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro_mcore.cli.command import run_command
from retro_mcore.stages.build_index import BuildIndexOptions, build_index


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(BuildIndexOptions, build_index, argv)


if __name__ == "__main__":
    sys.exit(main())
