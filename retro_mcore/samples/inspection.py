"""Human-readable samples and neighbors: decoded text with distances and token overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.document_ids import DocumentNames
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.project.config import ProjectConfig, Split
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.marked_text import Piece, split_text
from retro_mcore.retrieval.neighbor_page import (
    ChunkView,
    Histogram,
    NeighborView,
    Page,
    SampleView,
)
from retro_mcore.retrieval.overlap import longest_common_runs, shared_positions
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets


@dataclass(frozen=True)
class NeighborMeasures:
    """Measures of the neighbors of some chunks.

    Attributes:
        distances: f32 [n]; empty if no distances were saved.
        overlaps: f64 [n]: longest common token substring of chunk and neighbor, over M.
        missing: Fraction of neighbors that do not exist.
    """

    distances: np.ndarray
    overlaps: np.ndarray
    missing: float


class SampleInspector:
    """Reads and measures the samples of one split and their neighbors.

    Args:
        project_dir: A project, after query_neighbors.
        split: The split.
        num_neighbors: Neighbors per chunk.
        num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
        shortest_shared_run: Minimum number of consecutive tokens marked as shared.

    Attributes:
        config: The project's configuration.
        dataset: The split's samples and neighbors.

    Raises:
        ConfigurationError: the split has no samples.
        ProjectError: query_neighbors has not run.
        CorruptFileError: a file is damaged.
    """

    def __init__(
        self,
        project_dir: Path | str,
        split: Split,
        num_neighbors: int,
        num_retrieved_chunks: int,
        shortest_shared_run: int,
    ) -> None:
        paths = ProjectPaths(project_dir)
        self._root, self._split = paths.root, split
        self.config = ProjectConfig.load(paths.root)
        self._tokenizer = load_project_tokenizer(self.config, paths)
        dataset = build_retro_datasets(paths.root, num_neighbors, num_retrieved_chunks)[split]
        if dataset is None:
            raise ConfigurationError("--split", f"{split!r} has no samples", "Name another")
        self.dataset: RetroDataset = dataset
        self._num_neighbors, self._shortest = num_neighbors, shortest_shared_run
        self._prefixes = self.config.blend[1]
        used = self.config.database_paths(paths.root)
        retrieved_from = ProjectConfig.load(used.root).blend[1]
        self._sample_names = DocumentNames([paths.data / prefix for prefix in self._prefixes])
        self._names = DocumentNames([used.data / prefix for prefix in retrieved_from])
        self._length = self.config.retro_gpt_chunk_length
        self._distances = _open_distances(paths, dataset)

    def measure(self, num_chunks: int, seed: int) -> NeighborMeasures:
        """Measure the neighbors of random chunks.

        Args:
            num_chunks: Number of chunks to draw; at most all are used.
            seed: Seed of the random choice.
        """
        total = len(self.dataset.neighbors)
        generator = np.random.default_rng(seed)
        rows = np.sort(generator.choice(total, min(num_chunks, total), replace=False))
        shown = self._num_neighbors
        ids = np.concatenate([self.dataset.neighbors.rows(r, r + 1)[:, :shown] for r in rows])
        there = ids != NO_NEIGHBOR
        distances = self._measure_distances(rows, there)
        overlaps = self._measure_overlaps(rows, ids, there)
        return NeighborMeasures(distances, overlaps, float(1 - there.mean()))

    def _measure_distances(self, rows: np.ndarray, there: np.ndarray) -> np.ndarray:
        if self._distances is None:
            return np.empty(0, np.float32)
        shown = self._num_neighbors
        found = [self._distances.rows(row, row + 1)[:, :shown] for row in rows]
        distances = np.concatenate(found)[there]
        if np.isnan(distances).any():
            raise CorruptFileError(
                self.dataset.neighbors.directories[0] / "distances",
                "holds NaN for neighbors that exist",
                "Run query_neighbors again, or remove it",
            )
        return distances

    def _measure_overlaps(self, rows: np.ndarray, ids: np.ndarray, there: np.ndarray) -> np.ndarray:
        chunks = np.stack([self._chunk(*divmod(int(r), self._per_sample)) for r in rows])
        chunks = np.repeat(chunks[:, None], ids.shape[1], axis=1)[there]
        tokens, mask = self.dataset.database.padded_tokens(ids[there], self._length, -1)
        return longest_common_runs(chunks, np.where(mask, -1, tokens)) / self._length

    @property
    def _per_sample(self) -> int:
        return self.dataset.chunks_per_sample

    def _chunk(self, sample: int, chunk: int) -> np.ndarray:
        tokens = self.dataset.samples.tokens(sample)
        return tokens[chunk * self._length : (chunk + 1) * self._length]

    def show(self, number: int) -> SampleView:
        """Show one sample with everything retrieved for it."""
        text, dataset_id, documents = self.dataset.samples.read(number)
        names = ", ".join(
            self._sample_names.id_of(dataset_id, int(document)) or str(document)
            for document in np.unique(documents)
        )
        retrieved = self.dataset[number]["neighbor_chunks"]
        chunks = []
        for chunk in range(self._per_sample):
            tokens = text[chunk * self._length : (chunk + 1) * self._length]
            tokens = self.dataset.samples.without_padding(tokens)
            row = number * self._per_sample + chunk
            chunks.append(self._show_chunk(chunk, row, tokens, retrieved[chunk]))
        return SampleView(number, f"{self._prefixes[dataset_id]}, documents {names}", chunks)

    def page(self, numbers: Sequence[int], found: NeighborMeasures) -> Page:
        """Lay out a page with some samples, and histograms of what `measure` found."""
        config, dataset = self.config, self.dataset
        facts = {
            "project": str(self._root),
            "samples": f"{len(dataset)}, of {config.chunks_per_sample} chunks of "
            f"{self._length} tokens",
            "database": f"{len(dataset.database)} chunks",
            "neighbors saved": f"{dataset.neighbors.num_saved} per chunk",
            "neighbors that do not exist": f"{found.missing:.1%} of the first "
            f"{self._num_neighbors}",
            "marked": f"at least {self._shortest} tokens in a row shared by a chunk "
            "and what was retrieved for it",
        }
        overlap = "token overlap: longest common substring of chunk and neighbor over chunk length"
        histograms = [
            Histogram("distance of a neighbor", "distance", found.distances),
            Histogram(overlap, "share of the chunk's tokens", found.overlaps, (0.0, 1.0)),
        ]
        title = f"Neighbors of {self._root.name}, {self._split}"
        return Page(title, facts, histograms, [self.show(number) for number in numbers])

    def _show_chunk(
        self, number: int, row: int, tokens: np.ndarray, retrieved: np.ndarray
    ) -> ChunkView:
        marked = np.zeros(len(tokens), bool)
        neighbors = []
        for rank, ids in enumerate(retrieved):
            if ids[0] == NO_NEIGHBOR:
                break
            parts = [self._show_retrieved(int(chunk), tokens, marked) for chunk in ids]
            neighbors.append(NeighborView(self._about(row, rank, int(ids[0]), tokens), parts))
        return ChunkView(number, split_text(self._tokenizer, tokens, marked), neighbors)

    def _show_retrieved(
        self, chunk_id: int, tokens: np.ndarray, marked: np.ndarray
    ) -> list[Piece] | None:
        """Text of a retrieved chunk. Also marks the tokens that the sample's chunk shares with it.

        Returns None for NO_NEIGHBOR: the document ends before this chunk.
        """
        if chunk_id == NO_NEIGHBOR:
            return None
        found = self.dataset.database.tokens([chunk_id])[0].astype(np.int64)
        mine, theirs = shared_positions(tokens, found, self._shortest)
        marked |= mine
        return split_text(self._tokenizer, found, theirs)

    def _about(self, row: int, rank: int, chunk_id: int, tokens: np.ndarray) -> str:
        database = self.dataset.database
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


def _open_distances(paths: ProjectPaths, dataset: RetroDataset) -> Any | None:
    """Distances of the saved neighbors; None if another program wrote them without distances."""
    for directory in dataset.neighbors.directories:
        verify_project(paths, sorted(directory.glob("distances/*.hdf5")))
    return dataset.neighbors.distances()
