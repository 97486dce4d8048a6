"""Write the page of `inspect_neighbors`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, raise_problems, too_small
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
class InspectNeighborsConfig:
    """Configuration of `inspect_neighbors`."""

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


def run(config: InspectNeighborsConfig) -> InspectedNeighbors:
    """Choose and measure samples, and write the page.

    Raises:
        ConfigurationError: a number is out of range, or the split does not have such samples.
        ProjectError: query_neighbors has not run.
        CorruptFileError: a file is damaged.
    """
    raise_problems(list(too_small(config, _LEAST)))
    initialize()
    setup_device()
    inspector = SampleInspector(
        config.project_dir,
        config.split,
        config.num_neighbors,
        config.num_retrieved_chunks,
        config.shortest_shared_run,
    )
    numbers = _choose(config, len(inspector.dataset))
    found = inspector.measure(config.histogram_chunks, config.seed)
    page = render(inspector.page(numbers, found))
    output = Path(config.output)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return InspectedNeighbors(output, numbers, found.distances, found.overlaps, found.missing)


def _choose(config: InspectNeighborsConfig, count: int) -> list[int]:
    """The numbers of the samples to show, of `count` in the split."""
    for number in config.samples:
        if not 0 <= number < count:
            raise ConfigurationError(
                "--samples", f"{number}, but {config.split} has samples 0 to {count - 1}", "Choose"
            )
    if config.samples:
        return list(config.samples)
    generator = np.random.default_rng(config.seed)
    chosen = generator.choice(count, min(config.num_samples, count), replace=False)
    return sorted(int(number) for number in chosen)
