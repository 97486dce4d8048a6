"""Vectors of query chunks that build_index does not store, kept for the next search.

They are those of an aligned project's held-out chunks, which `update_db --append` searches again
with the same embedder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import h5py
import numpy as np

from retro_mcore.project.hdf5 import read_counts
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.shards import Shard
from retro_mcore.project.space import require_space
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.neighbor_search import BATCH
from retro_mcore.retrieval.query_chunks import ChunkEmbedder, QueryCounts
from retro_mcore.retrieval.vectors import EmbeddingCounts


@dataclass
class KeptVectors:
    """Vectors of a database's rows. A file of them is embedded when it is first read.

    Attributes:
        database: The database.
        embedder: Embeds its chunks.
        shards: Files of the vectors. Each is read by one rank: that of the neighbors' file with
            the same rows.
        fingerprint: Fingerprint of their inputs; files with another are made again.
    """

    database: ChunkDatabase
    embedder: ChunkEmbedder
    shards: Sequence[Shard]
    fingerprint: str
    _opened: set[int] = field(default_factory=set, init=False)

    def read(self, start: int, end: int, counts: QueryCounts) -> np.ndarray:
        """Read vectors [start, end), f32 [end - start, dimension].

        Args:
            start: First row.
            end: Row after the last.
            counts: Counts of a file's chunks are added when it is first read.

        Raises:
            ConfigurationError: the embedder returns vectors that cannot be searched.
            ProjectError: the disk is full.
        """
        for shard in self._embeddings.shards_of(start, end):
            if shard.start not in self._opened:
                self._open(shard, counts)
                self._opened.add(shard.start)
        return self._embeddings.range(start, end)

    @cached_property
    def _embeddings(self) -> Embeddings:
        return Embeddings(self.shards)

    def _open(self, shard: Shard, counts: QueryCounts) -> None:
        if state_of(shard.path, self.fingerprint) is not FileState.COMPLETE:
            self._embed(shard)
        # The same whether it was embedded now or before, so a resumed search gives the same bytes.
        counts.add(read_counts(shard.path))

    def _embed(self, shard: Shard) -> None:
        rows, dimension = shard.end - shard.start, self.embedder.embedder.dimension
        needed = 4 * rows * dimension
        require_space(shard.path.parent, needed, f"the vectors of {rows} held-out chunks")
        counts = EmbeddingCounts()
        with (
            signed_write(shard.path, self.fingerprint) as temporary,
            h5py.File(temporary, "w") as file,
        ):
            data = file.create_dataset("data", (rows, dimension), np.float32)
            for first in range(shard.start, shard.end, BATCH):
                last = min(first + BATCH, shard.end)
                chunks = self.database.tokens(range(first, last))
                vectors = self.embedder.embed(chunks, first, counts)
                data[first - shard.start : last - shard.start] = vectors
            file["counts"] = counts.to_array()
