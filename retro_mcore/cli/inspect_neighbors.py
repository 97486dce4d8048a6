"""`inspect_neighbors`: a page that shows what was retrieved, and how near and how alike it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.evaluation.results import require_writable
from retro_mcore.stages.inspect_neighbors import InspectedNeighbors, InspectNeighborsConfig, run


@dataclass
class InspectNeighborsOptions(InspectNeighborsConfig):
    """Write a page with samples, their chunks' neighbors as text, distances and token overlap."""


def inspect_neighbors(options: InspectNeighborsOptions) -> InspectedNeighbors:
    """Write the page and print a summary.

    Raises:
        ConfigurationError: a number is out of range, or the split does not have such samples.
        ProjectError: query_neighbors has not run.
        CorruptFileError: a file is damaged.
    """
    require_writable(Path(options.output))
    result = run(options)
    rows = {
        "page": result.output.resolve().as_uri(),
        "samples": ", ".join(map(str, result.samples)),
    }
    if len(result.overlaps):
        rows["mean overlap"] = f"{result.overlaps.mean():.3f}"
        rows["neighbors with overlap over 1/8"] = f"{(result.overlaps > 0.125).mean():.1%}"
    print_summary("inspect_neighbors", rows)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(InspectNeighborsOptions, inspect_neighbors, argv)


if __name__ == "__main__":
    sys.exit(main())
