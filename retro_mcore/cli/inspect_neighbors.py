"""`inspect_neighbors`: a page that shows what was retrieved, and how near and how alike it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.document_ids import DocumentNames
from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.platform import setup_device
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.neighbor_page import (
    ChunkView,
    Histogram,
    NeighborView,
    Page,
    Piece,
    SampleView,
    render,
)
from retro_mcore.retrieval.neighbor_tables import SavedDistances
from retro_mcore.retrieval.overlap import longest_common_runs, shared_positions
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets


@dataclass
class InspectNeighborsOptions:
    """Write a page with samples, their chunks' neighbors as text, distances and token overlap."""

    project_dir: str
    """Project directory, after query_neighbors."""
    output: str = "neighbors.html"
    """Where the page goes."""
    split: Literal["train", "valid", "test"] = "train"
    """Whose samples."""
    samples: list[int] = field(default_factory=list)
    """Numbers of the samples to show (default: --num-samples random ones)."""
    num_samples: int = 5
    """Random samples to show."""
    num_neighbors: int = 2
    """Neighbors to show per chunk, at most those saved."""
    num_retrieved_chunks: int = 2
    """Chunks per neighbor: itself and those that follow it."""
    histogram_chunks: int = 2000
    """Random chunks of the split that the histograms count."""
    shortest_shared_run: int = 3
    """Tokens in a row that must agree to be marked as shared."""
    seed: int = 1234
    """Seed of what is random."""


@dataclass(frozen=True)
class InspectedNeighbors:
    """What `inspect_neighbors` found.

    Attributes:
        output: The page.
        samples: Numbers of the samples shown.
        distances: f32 [n] of the neighbors counted; empty where none were saved.
        overlaps: f64 [n]: longest common token substring of chunk and neighbor, over M.
        without_neighbors: Share of the neighbors asked for that do not exist.
    """

    output: Path
    samples: list[int]
    distances: np.ndarray
    overlaps: np.ndarray
    without_neighbors: float


def inspect_neighbors(options: InspectNeighborsOptions) -> InspectedNeighbors:
    """Write the page.

    Raises:
        ConfigurationError: a number that cannot be, or samples that the split does not have.
        ProjectError: query_neighbors has not run.
        CorruptFileError: a file is damaged.
    """
    _check_options(options)
    initialize()
    setup_device()
    paths = ProjectPaths(options.project_dir)
    config = ProjectConfig.load(paths.root)
    tokenizer = load_project_tokenizer(config, paths)
    datasets = build_retro_datasets(paths.root, options.num_neighbors, options.num_retrieved_chunks)
    dataset = datasets[options.split]
    if dataset is None:
        raise ConfigurationError("--split", f"{options.split!r} has no samples", "Name another")
    inspector = _Inspector(options, config, dataset, tokenizer)
    numbers = _choose(options, len(dataset))
    distances, overlaps, missing = inspector.measure()
    page = Page(
        f"Neighbors of {paths.root.name}, {options.split}",
        {
            "project": str(paths.root),
            "samples": f"{len(dataset)}, of {config.chunks_per_sample} chunks of "
            f"{config.retro_gpt_chunk_length} tokens",
            "database": f"{len(dataset.database)} chunks",
            "neighbors saved": f"{dataset.neighbors.num_saved} per chunk",
            "neighbors that do not exist": f"{missing:.1%} of the first {options.num_neighbors}",
            "marked": f"at least {options.shortest_shared_run} tokens in a row shared by a chunk "
            "and what was retrieved for it",
        },
        [
            Histogram("distance of a neighbor", "distance", distances),
            Histogram(
                "token overlap: longest common substring of chunk and neighbor over chunk length",
                "share of the chunk's tokens",
                overlaps,
                (0.0, 1.0),
            ),
        ],
        [inspector.show(number) for number in numbers],
    )
    output = Path(options.output)
    with atomic_write(output) as temporary:
        temporary.write_text(render(page), encoding="utf-8")
    rows = {"page": output.absolute(), "samples": ", ".join(map(str, numbers))}
    if len(overlaps):
        rows["mean overlap"] = f"{overlaps.mean():.3f}"
        rows["neighbors with overlap over 1/8"] = f"{(overlaps > 0.125).mean():.1%}"
    print_summary("inspect_neighbors", rows)
    return InspectedNeighbors(output, numbers, distances, overlaps, missing)


def _check_options(options: InspectNeighborsOptions) -> None:
    for flag, least in (
        ("num_samples", 0),
        ("num_neighbors", 1),
        ("num_retrieved_chunks", 1),
        ("histogram_chunks", 1),
        ("shortest_shared_run", 1),
    ):
        if getattr(options, flag) < least:
            raise ConfigurationError(
                f"--{flag.replace('_', '-')}", str(getattr(options, flag)), f"Give {least} or more"
            )


def _choose(options: InspectNeighborsOptions, count: int) -> list[int]:
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


class _Inspector:
    """Reads a split's samples and neighbors the way that they are shown and measured."""

    def __init__(
        self,
        options: InspectNeighborsOptions,
        config: ProjectConfig,
        dataset: RetroDataset,
        tokenizer: Tokenizer,
    ) -> None:
        self._options, self._dataset, self._tokenizer = options, dataset, tokenizer
        self._prefixes = config.blend[1]
        paths = ProjectPaths(options.project_dir)
        used = config.database_paths(paths.root)
        retrieved_from = ProjectConfig.load(used.root).blend[1]
        self._sample_names = DocumentNames([paths.data / prefix for prefix in self._prefixes])
        self._names = DocumentNames([used.data / prefix for prefix in retrieved_from])
        self._length = config.retro_gpt_chunk_length
        directory = dataset.neighbors.directory
        saved = (directory / "distances").is_dir()  # other writers save none
        verify_project(paths, sorted(directory.glob("distances/*.hdf5")))
        self._distances = SavedDistances(directory).of(dataset.neighbors) if saved else None

    def measure(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Distances and overlaps of random chunks' neighbors, and the share that is missing."""
        total = len(self._dataset.neighbors)
        generator = np.random.default_rng(self._options.seed)
        count = min(self._options.histogram_chunks, total)
        rows = np.sort(generator.choice(total, count, replace=False))
        shown = self._options.num_neighbors
        ids = np.concatenate([self._dataset.neighbors.rows(r, r + 1)[:, :shown] for r in rows])
        there = ids != NO_NEIGHBOR
        distances = np.empty(0, np.float32)
        if self._distances is not None:
            found = [self._distances.rows(row, row + 1)[:, :shown] for row in rows]
            distances = np.concatenate(found)[there]
            if np.isnan(distances).any():
                raise CorruptFileError(
                    self._distances.directory,
                    "holds NaN for neighbors that there are",
                    "Run query_neighbors again, or remove it",
                )
        chunks = np.stack([self._chunk(*divmod(int(r), self._per_sample)) for r in rows])
        chunks = np.repeat(chunks[:, None], ids.shape[1], axis=1)[there]
        tokens, mask = self._dataset.database.padded_tokens(ids[there], self._length, -1)
        runs = longest_common_runs(chunks, np.where(mask, -1, tokens))
        return distances, runs / self._length, float(1 - there.mean())

    @property
    def _per_sample(self) -> int:
        return self._dataset.chunks_per_sample

    def _chunk(self, sample: int, chunk: int) -> np.ndarray:
        tokens = self._dataset.samples.tokens(sample)
        return tokens[chunk * self._length : (chunk + 1) * self._length]

    def show(self, number: int) -> SampleView:
        """One sample with everything that was retrieved for it."""
        text, dataset_id, documents = self._dataset.samples.read(number)
        names = ", ".join(
            self._sample_names.id_of(dataset_id, int(document)) or str(document)
            for document in np.unique(documents)
        )
        retrieved = self._dataset[number]["neighbor_chunks"]
        chunks = []
        for chunk in range(self._per_sample):
            tokens = text[chunk * self._length : (chunk + 1) * self._length]
            row = number * self._per_sample + chunk
            chunks.append(self._show_chunk(chunk, row, tokens, retrieved[chunk]))
        return SampleView(number, f"{self._prefixes[dataset_id]}, documents {names}", chunks)

    def _show_chunk(
        self, number: int, row: int, tokens: np.ndarray, retrieved: np.ndarray
    ) -> ChunkView:
        database = self._dataset.database
        marked = np.zeros(len(tokens), bool)
        neighbors = []
        for rank, ids in enumerate(retrieved):
            if ids[0] == NO_NEIGHBOR:
                break
            parts: list[list[Piece] | None] = []
            for chunk_id in ids:
                if chunk_id == NO_NEIGHBOR:
                    parts.append(None)
                    continue
                found = database.tokens([chunk_id])[0].astype(np.int64)
                mine, theirs = shared_positions(tokens, found, self._options.shortest_shared_run)
                marked |= mine
                parts.append(split_text(self._tokenizer, found, theirs))
            neighbors.append(NeighborView(self._about(row, rank, int(ids[0]), tokens), parts))
        return ChunkView(number, split_text(self._tokenizer, tokens, marked), neighbors)

    def _about(self, row: int, rank: int, chunk_id: int, tokens: np.ndarray) -> str:
        database = self._dataset.database
        source, document = (int(value) for value in database.documents(np.array(chunk_id)))
        neighbor = database.tokens([chunk_id])[0].astype(np.int64)
        run = int(longest_common_runs(tokens[None].astype(np.int64), neighbor[None])[0])
        distance = "unknown"
        if self._distances is not None:
            distance = f"{self._distances.rows(row, row + 1)[0, rank]:.4g}"
        return (
            f"neighbor {rank + 1}: chunk {chunk_id}, {self._names.describe(source, document)}; "
            f"distance {distance}; "
            f"overlap {run} of {self._length} tokens ({run / self._length:.0%})"
        )


def split_text(tokenizer: Tokenizer, tokens: np.ndarray, marked: np.ndarray) -> list[Piece]:
    """The text of `tokens`, cut where `marked` changes.

    The pieces join to the text of all tokens. A piece alone would lose spaces at its beginning with
    some tokenizers, so the cuts are placed by the lengths of the texts up to them.
    """
    ids = [int(token) for token in tokens]
    cuts = [0, *(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(ids)]
    *heads, whole = tokenizer.detokenize_batch([ids[:cut] for cut in cuts[1:]])
    # A character of several tokens may be cut in two: then its piece begins at the next whole one.
    bounds = [0, *(_common_length(head, whole) for head in heads), len(whole)]
    return [
        (whole[start:end], bool(marked[cut]))
        for start, end, cut in zip(bounds, bounds[1:], cuts, strict=False)
        if start < end
    ]


def _common_length(head: str, whole: str) -> int:
    """Characters that both begin with."""
    pairs = zip(head, whole, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(head), len(whole)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(InspectNeighborsOptions, inspect_neighbors, argv)
