"""`build_db`: the chunk database of a project."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro_mcore.cli.command import run_command
from retro_mcore.stages.build_db import BuildDbOptions, build_db


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(BuildDbOptions, build_db, argv)


if __name__ == "__main__":
    sys.exit(main())
