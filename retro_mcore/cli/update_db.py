"""`update_db`: more documents to retrieve from, or another database, for the same samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro_mcore.cli.command import run_command
from retro_mcore.stages.update_db import UpdateDbOptions, update_db


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(UpdateDbOptions, update_db, argv)


if __name__ == "__main__":
    sys.exit(main())
