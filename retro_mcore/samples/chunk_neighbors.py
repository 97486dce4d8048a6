"""Neighbors of an aligned project's samples, looked up by the chunks that samples consist of.

Every chunk of a sample is a chunk of one document, and so a row of db/merged/train.hdf5 or
valid.hdf5. Each row has its saved neighbors. They were searched for the chunk alone, so those from
other documents of the sample are dropped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import CorruptFileError
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.filtering import from_documents, keep_first
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.samples.project_samples import GPTSamples

#: Row of a chunk that no database holds: it has no words, or only padding.
NO_ROW = -1


@dataclass(frozen=True)
class ChunkTable:
    """A merged database with the neighbors of its chunks. Picklable.

    Attributes:
        database: The merged database.
        neighbors: Saved neighbors, one row per chunk.

    Raises:
        CorruptFileError: the neighbors are those of another number of chunks.
    """

    database: ChunkDatabase
    neighbors: SavedNeighbors

    def __post_init__(self) -> None:
        if len(self.neighbors) != len(self.database):
            raise CorruptFileError(
                self.neighbors.directory,
                f"holds neighbors of {len(self.neighbors)} chunks, {self.database.path.name} has "
                f"{len(self.database)}",
                "Run query_neighbors again",
            )

    def rows_of(
        self, dataset: int, documents: np.ndarray, starts: np.ndarray, chunk_length: int
    ) -> np.ndarray:
        """Row of each chunk, i64 [n]; NO_ROW for a chunk that the database does not hold.

        Args:
            dataset: Number of the dataset.
            documents: Document of each chunk, i64 [n].
            starts: Where each chunk begins in its document, i64 [n]; a multiple of M.
            chunk_length: M.
        """
        rows = first_rows(self.database.chunks, dataset, documents, starts)
        found = self.database.chunks[np.minimum(rows, len(self.database) - 1)].astype(np.int64)
        # The first chunk of a document begins after BOS.
        there = (found[:, 0] == dataset) & (found[:, 1] == documents)
        there &= (found[:, 2] >= starts) & (found[:, 2] < starts + chunk_length)
        return np.where(there & (rows < len(self.database)), rows, NO_ROW)


def first_rows(
    chunks: np.ndarray, dataset: int, documents: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """First row of a merged database at or after each place, i64 [n]; binary search.

    Args:
        chunks: Rows of the database, u32 [rows, 5], in order of dataset, document and token.
        dataset: Number of the dataset.
        documents: Document of each place, i64 [n].
        starts: Token of each place, i64 [n].
    """
    low = np.zeros(len(documents), np.int64)
    high = np.full(len(documents), len(chunks), np.int64)
    wanted = (documents << 32) + starts
    for _ in range(len(chunks).bit_length()):
        middle = (low + high) // 2
        found = chunks[np.minimum(middle, len(chunks) - 1), :3].astype(np.int64)
        place = (found[:, 1] << 32) + found[:, 2]
        before = (found[:, 0] < dataset) | ((found[:, 0] == dataset) & (place < wanted))
        before &= middle < high
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    return low


@dataclass(frozen=True)
class ShortNeighbors:
    """Chunks with fewer than K neighbors, after those from the sample's documents are dropped.

    Attributes:
        samples: Samples that were read.
        all_samples: Samples of the split.
        chunks: Chunks of the samples read that were searched.
        short: Those with too few neighbors.
        num_neighbors: K.
    """

    samples: int
    all_samples: int
    chunks: int
    short: int
    num_neighbors: int

    def __str__(self) -> str:
        of = "" if self.samples == self.all_samples else f" of {self.samples} samples"
        return (
            f"{self.short} of {self.chunks} chunks{of} ({self.short / self.chunks:.1%}) have fewer "
            f"than {self.num_neighbors} neighbors from documents outside their sample"
        )


@dataclass(frozen=True)
class ChunkNeighbors:
    """Neighbors of a split's samples, as `SampleNeighbors`. Picklable.

    Attributes:
        samples: The split's samples.
        train: Chunks of the documents that are retrieved from; None if there are none.
        held_out: Chunks of all other documents; None if there are none.
        num_train_documents: Number of leading documents of each dataset in `train`.
        database: The database that was searched.
        numbers: Number of each dataset in it; see `numbers_in_database`.
        chunk_length: M.
    """

    samples: GPTSamples
    train: ChunkTable | None
    held_out: ChunkTable | None
    num_train_documents: Sequence[int]
    database: ChunkDatabase
    numbers: Sequence[int]
    chunk_length: int

    def __len__(self) -> int:
        return len(self.samples) * self.chunks_per_sample

    @property
    def chunks_per_sample(self) -> int:
        """L."""
        return self.samples.sample_length // self.chunk_length

    @property
    def tables(self) -> list[ChunkTable]:
        """The tables that exist."""
        return [table for table in (self.train, self.held_out) if table is not None]

    @property
    def num_saved(self) -> int:
        """Most neighbors of a chunk."""
        return self.tables[0].neighbors.num_saved

    @property
    def directories(self) -> list[Path]:
        """Directories under `query/` with the saved neighbors."""
        return [table.neighbors.directory for table in self.tables]

    def searched(self) -> np.ndarray:
        """Whether each chunk has a row and so was searched, bool [chunks].

        The others hold no words, or only padding.
        """
        return self.searched_of(range(len(self.samples))).reshape(-1)

    def searched_of(self, samples: Sequence[int]) -> np.ndarray:
        """The same for the chunks of some samples, bool [n, L]."""
        places = [self.samples.chunk_places(sample, self.chunk_length) for sample in samples]
        datasets = np.repeat([dataset for dataset, _, _ in places], self.chunks_per_sample)
        documents = np.concatenate([each for _, each, _ in places])
        starts = np.concatenate([each for _, _, each in places])
        found = np.zeros(len(documents), bool)
        for dataset in np.unique(datasets).tolist():
            here = datasets == dataset
            trained = documents < self.num_train_documents[dataset]
            for table, mine in self._shares(trained):
                rows = table.rows_of(
                    dataset, documents[mine & here], starts[mine & here], self.chunk_length
                )
                found[mine & here] = rows != NO_ROW
        return found.reshape(len(samples), self.chunks_per_sample)

    def count_short(self, num_neighbors: int, most: int) -> ShortNeighbors:
        """Count chunks that keep too few neighbors, in evenly spaced samples.

        Args:
            num_neighbors: K.
            most: Number of samples that are read at most.
        """
        total = len(self.samples)
        samples = np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64)).tolist()
        searched, length = self.searched_of(samples), self.chunks_per_sample
        short = 0
        for sample, mine in zip(samples, searched, strict=True):
            last = self.rows(sample * length, (sample + 1) * length)[:, num_neighbors - 1]
            short += int((mine & (last == NO_NEIGHBOR)).sum())
        return ShortNeighbors(len(samples), total, int(searched.sum()), short, num_neighbors)

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors of chunks [start, end) of all samples, i64 [end - start, num_saved].

        Chunk `sample · L + i` is the i-th of a sample. Neighbors from the sample's documents are
        left out, so the last columns of some rows are NO_NEIGHBOR.
        """
        return self._read(start, end, None)[0]

    def distances(self) -> ChunkDistances | None:
        """Their distances; None if none were saved."""
        found = [table.neighbors.distances() for table in self.tables]
        saved = [each for each in found if each is not None]
        return ChunkDistances(self, saved) if len(saved) == len(found) else None

    def _read(
        self, start: int, end: int, distances: Sequence[SavedDistances] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors of chunks [start, end), and their distances.

        Args:
            start: First chunk.
            end: Chunk after the last.
            distances: Saved distances of each table; None: NaN is returned for them.
        """
        parts = []
        while start < end:
            sample, first = divmod(start, self.chunks_per_sample)
            last = min(self.chunks_per_sample, first + end - start)
            parts.append(self._read_sample(sample, slice(first, last), distances))
            start += last - first
        ids, found = zip(*parts, strict=True)
        return (
            (ids[0], found[0]) if len(parts) == 1 else (np.concatenate(ids), np.concatenate(found))
        )

    def _read_sample(
        self, sample: int, chunks: slice, distances: Sequence[SavedDistances] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        dataset, documents, starts = self.samples.chunk_places(sample, self.chunk_length)
        own = np.unique(documents)
        documents, starts = documents[chunks], starts[chunks]
        ids = np.full((len(documents), self.num_saved), NO_NEIGHBOR, np.int64)
        found = np.full(ids.shape, np.nan, np.float32)
        trained = documents < self.num_train_documents[dataset]
        for number, (table, mine) in enumerate(self._shares(trained)):
            places = np.flatnonzero(mine)
            rows = table.rows_of(dataset, documents[mine], starts[mine], self.chunk_length)
            places, rows = places[rows != NO_ROW], rows[rows != NO_ROW]
            ids[places] = table.neighbors.rows_at(rows)
            if distances is not None:
                found[places] = distances[number].rows_at(rows)
        missing = ids == NO_NEIGHBOR
        from_own = from_documents(
            self.database, np.where(missing, 0, ids), self.numbers[dataset], own
        )
        return keep_first(ids, found, ~from_own, self.num_saved)

    def _shares(self, trained: np.ndarray) -> list[tuple[ChunkTable, np.ndarray]]:
        """Each table, and which chunks it may hold."""
        pairs = ((self.train, trained), (self.held_out, ~trained))
        return [(table, mine) for table, mine in pairs if table is not None]


@dataclass(frozen=True)
class ChunkDistances:
    """Distances of `ChunkNeighbors`, in the same order; NaN for missing neighbors.

    Attributes:
        neighbors: The neighbors.
        saved: Saved distances of each of their tables.
    """

    neighbors: ChunkNeighbors
    saved: Sequence[SavedDistances]

    def rows(self, start: int, end: int) -> np.ndarray:
        """Distances of the neighbors of chunks [start, end), f32 [end - start, num_saved]."""
        return self.neighbors._read(start, end, self.saved)[1]
