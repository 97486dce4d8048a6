"""The neighbors of every sample's chunks, in upstream's files.

Row `sample · L + chunk` of a split holds chunk ids of the retrieval database, best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.database import ChunkDatabase
from retro_mcore.data.embedders import Embedder, embed_unique
from retro_mcore.data.hdf5 import map_dataset
from retro_mcore.data.index import search
from retro_mcore.data.shards import Shard, ShardReport, run_shards
from retro_mcore.data.text import chunk_texts
from retro_mcore.data.tokenizers import Tokenizer
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.markers import signed_write

#: Queries that are searched in one call; bounds the memory that candidates take.
_SEARCH_BATCH = 4096


class Samples(Protocol):
    """What querying needs of a split's samples."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Tokens i64 [S+1], dataset number and document ids of a sample."""


def query_split(
    samples: Samples,
    database: ChunkDatabase,
    index: Any,
    tokenizer: Tokenizer,
    embedder: Embedder,
    shards: Sequence[Shard],
    chunk_length: int,
    num_query: int,
    num_save: int,
    fingerprint: str,
    description: str,
) -> ShardReport:
    """Search and save the neighbors of every chunk of a split, on all ranks.

    Args:
        samples: The split.
        database: The retrieval database.
        index: Its Faiss index.
        tokenizer: The project's tokenizer.
        embedder: What the index was built with.
        shards: Ranges of rows (chunks).
        chunk_length: M.
        num_query: Candidates searched per chunk.
        num_save: Neighbors saved per chunk, after those of the sample's own documents are dropped.
        fingerprint: What the neighbors are made from.
        description: Label of the progress bar.
    """

    def build(shard: Shard, path: Path) -> None:
        chunks, datasets, documents = _read_chunks(samples, shard, chunk_length)
        vectors = embed_unique(embedder, chunk_texts(tokenizer, chunks))
        neighbors = np.empty((len(chunks), num_save), np.int64)
        distances = np.empty((len(chunks), num_save), np.float32)
        for start in range(0, len(chunks), _SEARCH_BATCH):
            rows = slice(start, start + _SEARCH_BATCH)
            found, candidates = search(index, vectors[rows], num_query)
            own = own_document_mask(database, candidates, datasets[rows], documents[rows])
            neighbors[rows], distances[rows] = keep_first(candidates, found, ~own, num_save)
        # First, so that no neighbors are ever without their distances.
        with (
            signed_write(_distances_path(shard), fingerprint) as temporary,
            h5py.File(temporary, "w") as file,
        ):
            file["distances"] = distances
        with h5py.File(path, "w") as file:
            file["neighbors"] = neighbors

    row_bytes = (8 + 4) * num_save
    return run_shards(shards, build, fingerprint, description, row_bytes, _distances_path)


def _distances_path(shard: Shard) -> Path:
    # In a folder of its own: other readers take every .hdf5 file beside the neighbors for theirs.
    return shard.path.parent / "distances" / shard.path.name


def _read_chunks(
    samples: Samples, shard: Shard, chunk_length: int
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Tokens, dataset and documents of each row; a sample is read once for all of its chunks."""
    chunks: list[np.ndarray] = []
    datasets, documents = [], []
    per_sample = (len(samples.read(0)[0]) - 1) // chunk_length
    row = shard.start
    while row < shard.end:
        sample, first = divmod(row, per_sample)
        last = min(per_sample, first + shard.end - row)
        tokens, dataset, ids = samples.read(sample)
        chunks.extend(
            tokens[chunk * chunk_length : (chunk + 1) * chunk_length]
            for chunk in range(first, last)
        )
        datasets.extend([dataset] * (last - first))
        documents.extend([ids] * (last - first))
        row += last - first
    return chunks, np.array(datasets), documents


def own_document_mask(
    database: ChunkDatabase,
    candidates: np.ndarray,
    datasets: np.ndarray,
    documents: Sequence[np.ndarray],
) -> np.ndarray:
    """Which candidates come from the documents of the sample that asks.

    Args:
        database: The retrieval database.
        candidates: Chunk ids [rows, candidates].
        datasets: Dataset of each row's sample [rows].
        documents: Documents of each row's sample; consecutive rows of a sample share one array.

    Returns:
        bool [rows, candidates].
    """
    found = database.documents(np.maximum(candidates, 0)).astype(np.int64)
    own = np.zeros(candidates.shape, bool)
    start = 0
    while start < len(candidates):
        end = start + 1
        while end < len(candidates) and documents[end] is documents[start]:
            end += 1
        rows = found[start:end]
        own[start:end] = (rows[..., 0] == datasets[start]) & np.isin(rows[..., 1], documents[start])
        start = end
    return own


def keep_first(
    candidates: np.ndarray, distances: np.ndarray, allowed: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` allowed candidates of each row, and their distances.

    Args:
        candidates: Chunk ids [rows, candidates], NO_NEIGHBOR where there is none.
        distances: f32 [rows, candidates].
        allowed: bool [rows, candidates].
        count: Columns of the results.

    Returns:
        Chunk ids i64 [rows, count], NO_NEIGHBOR where too few are allowed, and distances
        f32 [rows, count], NaN there.
    """
    allowed = allowed & (candidates != NO_NEIGHBOR)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(allowed, order, axis=1)
    ids = np.full((len(candidates), count), NO_NEIGHBOR, np.int64)
    lengths = np.full((len(candidates), count), np.nan, np.float32)
    ids[:, : kept.shape[1]][kept] = np.take_along_axis(candidates, order, axis=1)[kept]
    lengths[:, : kept.shape[1]][kept] = np.take_along_axis(distances, order, axis=1)[kept]
    return ids, lengths


class SavedNeighbors:
    """The neighbors of a split, memory-mapped. Picklable.

    Args:
        directory: A directory under `query/`.

    Raises:
        ProjectError: it is missing or empty.
        CorruptFileError: a file is unreadable, or rows are missing.
    """

    _dataset = "neighbors"

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        paths = sorted(self.directory.glob("*.hdf5"))
        if not paths:
            raise ProjectError(self.directory, "holds no neighbors", "Run query_neighbors first")
        bounds = [tuple(int(part) for part in path.stem.split("-")) for path in paths]
        self._files = []
        expected = 0
        for path, (start, end) in zip(paths, bounds, strict=True):
            rows = map_dataset(path, self._dataset)
            if start != expected or rows.ndim != 2 or len(rows) != end - start:
                raise CorruptFileError(
                    path, f"holds {len(rows)} rows from {start}", "Run query_neighbors again"
                )
            self._files.append(rows)
            expected = end
        self._ends = np.array([end for _, end in bounds])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple:
        return type(self), (self.directory,)

    @property
    def num_saved(self) -> int:
        """Neighbors saved per row."""
        return int(self._files[0].shape[1])

    def rows(self, start: int, end: int) -> np.ndarray:
        """i64 [end - start, num_saved] (distances: f32)."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < end:
            offset = int(self._ends[first - 1]) if first else 0
            stop = min(end, int(self._ends[first]))
            parts.append(self._files[first][start - offset : stop - offset])
            start, first = stop, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SavedDistances(SavedNeighbors):
    """The distances of a split's neighbors as the index gave them, NaN where there is none.

    Squared for an L2 index, and approximate for one that compresses. Directories of other writers
    have none.

    Args:
        directory: The directory of the neighbors, under `query/`.

    Raises:
        ProjectError: no distances were saved.
        CorruptFileError: a file is unreadable, or rows are missing.
    """

    _dataset = "distances"

    def __init__(self, directory: Path | str) -> None:
        super().__init__(Path(directory) / "distances")

    def __reduce__(self) -> tuple:
        return type(self), (self.directory.parent,)
