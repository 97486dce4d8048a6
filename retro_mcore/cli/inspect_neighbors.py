"""`inspect_neighbors`: a page that shows what was retrieved, and how near and how alike it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, raise_problems, too_small
from retro_mcore.evaluation.results import require_writable
from retro_mcore.platform import setup_device
from retro_mcore.project.atomic import atomic_write
from retro_mcore.retrieval.neighbor_page import render
from retro_mcore.samples.inspection import SampleInspector

_LEAST = {
    "num_samples": 0,
    "num_neighbors": 1,
    "num_retrieved_chunks": 1,
    "histogram_chunks": 1,
    "shortest_shared_run": 1,
}


@dataclass
class InspectNeighborsOptions:
    """Write a page with samples, their chunks' neighbors as text, distances and token overlap."""

    project_dir: str
    """Project directory, after query_neighbors."""
    output: str = "neighbors.html"
    """File of the page."""
    split: Literal["train", "valid", "test"] = "train"
    """Split of the samples."""
    samples: list[int] = field(default_factory=list)
    """Numbers of the samples to show (default: --num-samples random ones)."""
    num_samples: int = 5
    """Number of random samples to show."""
    num_neighbors: int = 2
    """Neighbors to show per chunk, at most those saved."""
    num_retrieved_chunks: int = 2
    """Chunks per neighbor: itself and those that follow it."""
    histogram_chunks: int = 2000
    """Number of random chunks of the split to count in the histograms."""
    shortest_shared_run: int = 3
    """Fewest tokens in a row that are marked as shared."""
    seed: int = 1234
    """Seed of the random choices."""


@dataclass(frozen=True)
class InspectedNeighbors:
    """The result of `inspect_neighbors`.

    Attributes:
        output: The page.
        samples: Numbers of the samples shown.
        distances: f32 [n] of the neighbors counted; empty if none were saved.
        overlaps: f64 [n]: longest common token substring of chunk and neighbor, over M.
        without_neighbors: Share of the neighbors asked for that do not exist.
    """

    output: Path
    samples: list[int]
    distances: np.ndarray
    overlaps: np.ndarray
    without_neighbors: float


def inspect_neighbors(options: InspectNeighborsOptions) -> InspectedNeighbors:
    """Write the page and print a summary.

    Raises:
        ConfigurationError: a number is out of range, or the split does not have such samples.
        ProjectError: query_neighbors has not run.
        CorruptFileError: a file is damaged.
    """
    _check_options(options)
    require_writable(Path(options.output))
    initialize()
    setup_device()
    inspector = SampleInspector(
        options.project_dir,
        options.split,
        options.num_neighbors,
        options.num_retrieved_chunks,
        options.shortest_shared_run,
    )
    numbers = _choose(options, len(inspector.dataset))
    found = inspector.measure(options.histogram_chunks, options.seed)
    page = render(inspector.page(numbers, found))
    output = Path(options.output)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    rows = {"page": output.absolute(), "samples": ", ".join(map(str, numbers))}
    if len(found.overlaps):
        rows["mean overlap"] = f"{found.overlaps.mean():.3f}"
        rows["neighbors with overlap over 1/8"] = f"{(found.overlaps > 0.125).mean():.1%}"
    print_summary("inspect_neighbors", rows)
    return InspectedNeighbors(output, numbers, found.distances, found.overlaps, found.missing)


def _check_options(options: InspectNeighborsOptions) -> None:
    raise_problems(list(too_small(options, _LEAST)))


def _choose(options: InspectNeighborsOptions, count: int) -> list[int]:
    """The numbers of the samples to show, of `count` in the split."""
    for number in options.samples:
        if not 0 <= number < count:
            raise ConfigurationError(
                "--samples", f"{number}, but {options.split} has samples 0 to {count - 1}", "Choose"
            )
    if options.samples:
        return list(options.samples)
    generator = np.random.default_rng(options.seed)
    chosen = generator.choice(count, min(options.num_samples, count), replace=False)
    return sorted(int(number) for number in chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(InspectNeighborsOptions, inspect_neighbors, argv)


if __name__ == "__main__":
    sys.exit(main())
