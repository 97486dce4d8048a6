"""Neighbors as a smaller database would give them, from one search of the whole database.

Subsampling candidates after the search: Shao et al. 2024, "Scaling Retrieval-Based Language Models
with a Trillion-Token Datastore" (MassiveDS), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.evaluation.neighbor_sources import NeighborRows
from retro_mcore.retrieval.database import ChunkDatabase


def documents_kept(documents: np.ndarray, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose the documents of a smaller database, each with probability `fraction`.

    The documents of a smaller fraction are among those of a larger one.

    Args:
        documents: Dataset and document, [..., 2].
        fraction: From 0 to 1.
        seed: Seed of the choice.

    Returns:
        bool [...].
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        keys = documents[..., 0].astype(np.uint64) << np.uint64(40)
        keys = (keys + documents[..., 1].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys += np.uint64(seed & (2**64 - 1)) * np.uint64(0xD1B54A32D192ED03)
        # The finalizer of SplitMix64 (Steele et al. 2014) spreads the keys evenly.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
        keys ^= keys >> np.uint64(31)
    return (keys >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53


@dataclass(frozen=True)
class NeighborsOfFraction:
    """Saved neighbors without those of documents that a smaller database lacks.

    Attributes:
        neighbors: Neighbors found in the whole database, nearest first.
        database: The whole database.
        fraction: Share of its documents in the smaller one.
        seed: Seed of their choice; see `documents_kept`.
    """

    neighbors: NeighborRows
    database: ChunkDatabase
    fraction: float
    seed: int

    def __len__(self) -> int:
        return len(self.neighbors)

    @property
    def num_saved(self) -> int:
        """Number of neighbors per chunk."""
        return self.neighbors.num_saved

    def searched(self) -> NDArray[np.bool_]:
        """See `NeighborRows.searched`."""
        return self.neighbors.searched()

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors i64 [end - start, num_saved] in their order; missing ones last."""
        ids = np.asarray(self.neighbors.rows(start, end), np.int64)
        documents = self.database.documents(np.maximum(ids, 0))
        kept = (ids != NO_NEIGHBOR) & documents_kept(documents, self.fraction, self.seed)
        order = np.argsort(~kept, axis=1, kind="stable")
        return np.take_along_axis(np.where(kept, ids, NO_NEIGHBOR), order, axis=1)

    def share_short(self, num_neighbors: int, most: int = 4096) -> float:
        """Share of searched chunks with fewer than `num_neighbors` left, of the first `most`."""
        end = min(most, len(self))
        searched = self.searched()[:end]
        left = (self.rows(0, end)[searched] != NO_NEIGHBOR).sum(1)
        return float((left < num_neighbors).mean()) if len(left) else 0.0
