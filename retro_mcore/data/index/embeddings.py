"""Embeddings of the retrieval database, and those of the queries that recall is measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.database import ChunkDatabase
from retro_mcore.data.embedders import Embedder, embed_unique
from retro_mcore.data.hdf5 import map_dataset
from retro_mcore.data.shards import Shard, ShardReport, run_shards
from retro_mcore.data.text import chunk_texts
from retro_mcore.data.tokenizers import Tokenizer
from retro_mcore.project.markers import FileState, signed_write, state_of

#: Queries that recall is measured with.
NUM_HELD_OUT = 500


def embed_database(
    database: ChunkDatabase,
    tokenizer: Tokenizer,
    embedder: Embedder,
    shards: Sequence[Shard],
    fingerprint: str,
) -> ShardReport:
    """Embed every chunk of the database once, on all ranks: f32 [rows, dimension] per file."""

    def build(shard: Shard, path: Path) -> None:
        texts = chunk_texts(tokenizer, database.tokens(range(shard.start, shard.end)))
        with h5py.File(path, "w") as file:
            file["data"] = embed_unique(embedder, texts)

    row_bytes = 4 * embedder.dimension
    return run_shards(shards, build, fingerprint, "embed database", row_bytes)


class Embeddings:
    """The embeddings of a database, memory-mapped across their files.

    Args:
        shards: All files, in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._starts = np.array([shard.start for shard in shards])
        self._files: list[np.ndarray | None] = [None] * len(shards)

    def _file(self, index: int) -> np.ndarray:
        file = self._files[index]
        if file is None:
            file = self._files[index] = map_dataset(self.shards[index].path, "data")
        return file

    def __len__(self) -> int:
        return self.shards[-1].end

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._file(0).shape[1])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """f32 [n, dimension] of rows in any order."""
        result = np.empty((len(ids), self.dimension), np.float32)
        where = np.searchsorted(self._starts, ids, side="right") - 1
        for file in np.unique(where):
            mine = where == file
            result[mine] = self._file(file)[ids[mine] - self._starts[file]]
        return result

    def range(self, start: int, end: int) -> np.ndarray:
        """f32 [end - start, dimension] of consecutive rows."""
        return self.rows(np.arange(start, end))

    def shards_of(self, start: int, end: int) -> list[Shard]:
        """The files that hold rows [start, end)."""
        return [shard for shard in self.shards if shard.start < end and start < shard.end]


@dataclass(frozen=True)
class HeldOut:
    """Queries to measure recall with.

    Attributes:
        vectors: f32 [n, dimension].
        rows: The database row of each query, which is not its own neighbor; NO_NEIGHBOR where it
            is a chunk of a held-out document.
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
) -> None:
    """Embed evenly spaced chunks of held-out documents; of the database where they are too few."""
    if state_of(path, fingerprint) is FileState.COMPLETE:
        return
    outside = _evenly_spaced(len(held_out) if held_out else 0, NUM_HELD_OUT)
    inside = _evenly_spaced(len(database), NUM_HELD_OUT - len(outside))
    chunks = [*(held_out.tokens(outside) if held_out else []), *database.tokens(inside)]
    with signed_write(path, fingerprint) as temporary, h5py.File(temporary, "w") as file:
        file["data"] = embed_unique(embedder, chunk_texts(tokenizer, chunks))
        file["rows"] = np.concatenate([np.full(len(outside), NO_NEIGHBOR), inside])


def read_held_out(path: Path) -> HeldOut:
    """What `embed_held_out` wrote.

    Raises:
        CorruptFileError: it is damaged.
    """
    return HeldOut(np.array(map_dataset(path, "data")), np.array(map_dataset(path, "rows")))


def _evenly_spaced(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
