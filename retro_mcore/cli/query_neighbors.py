"""`query_neighbors`: the neighbors of every training, validation and test chunk."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro_mcore.cli.command import run_command
from retro_mcore.stages.query_neighbors import QueryNeighborsOptions, query_neighbors


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(QueryNeighborsOptions, query_neighbors, argv)


if __name__ == "__main__":
    sys.exit(main())
