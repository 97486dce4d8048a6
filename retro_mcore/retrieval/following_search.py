"""Neighbors that follow from those found before documents were removed from the database.

A row without removed neighbors keeps what it has: its neighbors are still the nearest. The other
rows are searched again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.project.hdf5 import read_counts
from retro_mcore.project.markers import signed_write
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_search import (
    NeighborSearch,
    Steps,
    count_neighbors,
    distances_path,
)
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.query_chunks import QueryChunks, QueryCounts
from retro_mcore.retrieval.removed import RemovedChunks
from retro_mcore.retrieval.vectors import EmbeddingCounts

#: Counts that depend on the neighbors; the others are about the chunks that are searched for.
_OF_NEIGHBORS = [
    field.name
    for field in fields(QueryCounts)
    if field.name not in {"vectors_stored", *(each.name for each in fields(EmbeddingCounts))}
]


@dataclass(frozen=True)
class PreviousTable:
    """Saved neighbors of a split in a database that documents were removed from.

    Attributes:
        database: The database in which they were found.
        removed: Its removed chunks.
        neighbors: The neighbors, as they were saved.
        distances: Their distances.
        compacted: Whether the searched database lacks the removed chunks, so that ids differ.
    """

    database: ChunkDatabase
    removed: RemovedChunks
    neighbors: SavedNeighbors
    distances: SavedDistances
    compacted: bool

    def renumbered(self, ids: np.ndarray) -> np.ndarray:
        """Ids in the searched database, i64 of the same shape; NO_NEIGHBOR for removed ones."""
        left = (ids != NO_NEIGHBOR) & ~self.removed.of(ids)
        there = ids - self.removed.before(np.maximum(ids, 0)) if self.compacted else ids
        return np.where(left, there, NO_NEIGHBOR)

    def counts(self, shard: Shard) -> QueryCounts | None:
        """Counts of a file of these neighbors; None if an older version wrote it."""
        counts = QueryCounts()
        counts.add(read_counts(self.neighbors.directory / "distances" / shard.path.name))
        return counts if counts.chunks else None


@dataclass(kw_only=True)
class FollowingSearch(NeighborSearch):
    """Searches the rows that had removed neighbors, and copies the others.

    Attributes:
        table: The neighbors before.
    """

    table: PreviousTable

    def shard(self, chunks: QueryChunks, shard: Shard, path: Path, fingerprint: str) -> Steps:
        """See `NeighborSearch.shard`."""
        before = self.table.neighbors.saved_rows(shard.start, shard.end)
        distances = np.array(self.table.distances.saved_rows(shard.start, shard.end))
        rows = np.flatnonzero(self.table.removed.of(before).any(axis=1))
        neighbors, counts = self.table.renumbered(before), self.table.counts(shard)
        step = self._step(len(rows))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            lost, found = QueryCounts(), QueryCounts()
            query = chunks.read_rows(some + shard.start, found)
            count_neighbors(self.table.database, query.tokens, before[some], lost)
            neighbors[some], distances[some] = yield from self.find(query, found)
            if counts is not None:
                _exchange(counts, lost, found)
        self._write(shard, path, fingerprint, neighbors, distances, counts)

    def _write(
        self,
        shard: Shard,
        path: Path,
        fingerprint: str,
        neighbors: np.ndarray,
        distances: np.ndarray,
        counts: QueryCounts | None,
    ) -> None:
        with (
            signed_write(distances_path(shard), fingerprint) as temporary,
            h5py.File(temporary, "w") as distances_file,
            h5py.File(path, "w") as file,
        ):
            file["neighbors"] = neighbors.astype(np.int64)
            distances_file["distances"] = distances.astype(np.float32)
            if counts is not None:
                distances_file["counts"] = counts.to_array()


def count_touched(tables: list[PreviousTable]) -> int:
    """Number of rows that have removed neighbors and are searched again."""
    rows = 0
    for table in tables:
        for start in range(0, len(table.neighbors), _ROWS):
            ids = table.neighbors.saved_rows(start, min(start + _ROWS, len(table.neighbors)))
            rows += int(table.removed.of(ids).any(axis=1).sum())
    return rows


#: Rows read at a time.
_ROWS = 1 << 18


def _exchange(counts: QueryCounts, lost: QueryCounts, found: QueryCounts) -> None:
    """Replace the part of a file's counts that the neighbors of some rows had."""
    for name in _OF_NEIGHBORS:
        change = getattr(found, name) - getattr(lost, name)
        setattr(counts, name, getattr(counts, name) + change)
