"""Embeddings of the retrieval database, and of the queries used to measure recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.errors import CorruptFileError
from retro_mcore.host import most_mapped_files
from retro_mcore.project.hdf5 import map_dataset, read_counts, release_pages
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.shards import Shard, ShardReport, run_shards
from retro_mcore.retrieval.chunk_text import DocumentEnds, chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique
from retro_mcore.retrieval.stored_types import StoredCounts, StoredType, as_stored, bytes_of
from retro_mcore.retrieval.vectors import list_rows, unusable

#: Queries that recall is measured with: one per so many chunks, within these bounds. Of 500, its
#: standard error is .01, and a hundredth can take half as many lists again.
_CHUNKS_PER_QUERY, _FEWEST_QUERIES, _MOST_QUERIES = 1000, 500, 2000


def embed_database(
    database: ChunkDatabase,
    tokenizer: Tokenizer,
    embedder: Embedder,
    shards: Sequence[Shard],
    fingerprint: str,
    document_ends: DocumentEnds = "line break",
    dtype: StoredType = "fp32",
) -> ShardReport:
    """Embed every chunk of the database once on all ranks, [rows, dimension] per file.

    A file that `dtype` cannot hold is stored in fp32; see `as_stored`.

    Raises:
        ConfigurationError: the embedder returns vectors that cannot be searched.
    """

    def build(shard: Shard, path: Path) -> None:
        ids = range(shard.start, shard.end)
        write_embeddings(database, tokenizer, embedder, ids, path, document_ends, dtype)

    row_bytes = bytes_of(dtype) * embedder.dimension
    return run_shards(shards, build, fingerprint, "embed database", row_bytes)


def write_embeddings(
    database: ChunkDatabase,
    tokenizer: Tokenizer,
    embedder: Embedder,
    ids: range,
    path: Path,
    document_ends: DocumentEnds,
    dtype: StoredType,
) -> None:
    """Embed some chunks of the database, and write their vectors; see `embed_database`."""
    counts = StoredCounts()
    texts = chunk_texts(tokenizer, database.tokens(ids), document_ends)
    with h5py.File(path, "w") as file:
        vectors = embed_unique(embedder, texts, counts, ids.start)
        file["data"] = as_stored(vectors, dtype, counts)
        file["counts"] = counts.to_array()


def count_embedded(shards: Sequence[Shard]) -> StoredCounts:
    """Add up the counts in the files; files of older versions have none."""
    counts = StoredCounts()
    for shard in shards:
        counts.add(read_counts(shard.path))
    return counts


@dataclass(frozen=True)
class EmbeddingFiles:
    """The files of a database's embeddings.

    Attributes:
        shards: All files, in order.
        fingerprint: Fingerprint of their inputs.
    """

    shards: Sequence[Shard]
    fingerprint: str


class Embeddings:
    """The embeddings of a database, memory-mapped across their files.

    Args:
        shards: All files, in order.

    Raises:
        CorruptFileError: a file that is read is damaged, or holds NaN or infinite vectors.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._starts = np.array([shard.start for shard in shards])
        self._dimension: int | None = None
        self._file = lru_cache(most_mapped_files())(self._open)

    def _open(self, index: int) -> np.ndarray:
        shard = self.shards[index]
        rows = map_dataset(shard.path, "data", "f", 2)
        if len(rows) != shard.end - shard.start:
            raise CorruptFileError(shard.path, f"holds {len(rows)} vectors", _hint(shard))
        self._dimension = self._dimension or rows.shape[1]
        if rows.shape[1] != self._dimension:
            raise CorruptFileError(
                shard.path, f"holds vectors of dimension {rows.shape[1]}", _hint(shard)
            )
        return rows

    def __len__(self) -> int:
        return self.shards[-1].end

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._file(0).shape[1])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Read rows in any order, f32 [n, dimension]."""
        where = np.searchsorted(self._starts, ids, side="right") - 1
        # Not `self.dimension`: another rank may still be writing the first file.
        dimension = self._file(int(where[0])).shape[1] if len(ids) else self.dimension
        result = np.empty((len(ids), dimension), np.float32)
        for file in np.unique(where):
            mine, stored = where == file, self._file(int(file))
            result[mine] = stored[ids[mine] - self._starts[file]]
            release_pages(stored)
            self._require_usable(file, ids[mine], result[mine])
        return result

    def _require_usable(self, file: int, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Reject NaN and infinite vectors, which older versions and other programs may have
        stored."""
        wrong = ids[unusable(vectors)]
        if len(wrong):
            shard = self.shards[file]
            raise CorruptFileError(
                shard.path,
                f"{len(wrong)} vectors are NaN, infinite or too large, those of {list_rows(wrong)}",
                _hint(shard),
            )

    def range(self, start: int, end: int) -> np.ndarray:
        """Read consecutive rows, f32 [end - start, dimension]."""
        return self.rows(np.arange(start, end))

    def shards_of(self, start: int, end: int) -> list[Shard]:
        """The files that hold rows [start, end)."""
        return [shard for shard in self.shards if shard.start < end and start < shard.end]


def _hint(shard: Shard) -> str:
    return f"Remove {shard.path.name} and run build_index again"


@dataclass(frozen=True)
class HeldOut:
    """Queries for measuring recall.

    Attributes:
        vectors: f32 [n, dimension].
        rows: The database row of each query, which is not its own neighbor; NO_NEIGHBOR for a
            chunk of a held-out document.
    """

    vectors: np.ndarray
    rows: np.ndarray


def embed_held_out(
    database: ChunkDatabase,
    held_out: ChunkDatabase | None,
    tokenizer: Tokenizer,
    embedder: Embedder,
    path: Path,
    fingerprint: str,
    document_ends: DocumentEnds = "line break",
) -> None:
    """Embed evenly spaced chunks of held-out documents, plus some of the database if there are too
    few.

    Raises:
        ConfigurationError: the embedder returns vectors that cannot be searched.
    """
    if state_of(path, fingerprint) is FileState.COMPLETE:
        return
    wanted = num_queries(len(database))
    outside = _evenly_spaced(len(held_out) if held_out else 0, wanted)
    inside = _evenly_spaced(len(database), wanted - len(outside))
    chunks = [*(held_out.tokens(outside) if held_out else []), *database.tokens(inside)]
    with signed_write(path, fingerprint) as temporary, h5py.File(temporary, "w") as file:
        texts = chunk_texts(tokenizer, chunks, document_ends)
        file["data"] = embed_unique(embedder, texts, what="held-out query")
        file["rows"] = np.concatenate([np.full(len(outside), NO_NEIGHBOR), inside])


def num_queries(chunks: int) -> int:
    """Number of queries that the recall of an index of so many chunks is measured with."""
    return min(max(chunks // _CHUNKS_PER_QUERY, _FEWEST_QUERIES), _MOST_QUERIES)


def read_held_out(path: Path) -> HeldOut:
    """Read the queries that `embed_held_out` wrote.

    Raises:
        CorruptFileError: the file is damaged.
    """
    vectors, rows = map_dataset(path, "data", "f", 2), map_dataset(path, "rows", "i", 1)
    if len(vectors) != len(rows) or unusable(vectors).any():
        raise CorruptFileError(path, "holds no queries", f"Remove {path.name}, then build_index")
    return HeldOut(np.array(vectors, np.float32), np.array(rows))


def _evenly_spaced(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
