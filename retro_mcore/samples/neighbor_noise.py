"""Neighbors left out, replaced or blurred at random in training, so that a model keeps its footing
where retrieval finds little.

What happens to a sample follows from the seed and the sample's number alone: every rank, any number
of workers, and a resumed run see the same.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.filtering import from_documents


@dataclass(frozen=True)
class NeighborNoise:
    """Probabilities of each change.

    Attributes:
        seed: The project's.
        drop_chunks: Of a chunk to lose all of its neighbors.
        drop_neighbors: Of a neighbor to be left out.
        replace_neighbors: Of a neighbor to become a random chunk of the database (left as it is
            where the draw falls on the sample's own documents).
        replace_tokens: Of a retrieved token to become another one of the sample's retrieved tokens.
    """

    seed: int
    drop_chunks: float = 0.0
    drop_neighbors: float = 0.0
    replace_neighbors: float = 0.0
    replace_tokens: float = 0.0

    def __bool__(self) -> bool:
        return any(astuple(self)[1:])

    def disturb_neighbors(
        self, index: int, ids: np.ndarray, database: ChunkDatabase, dataset: int, own: np.ndarray
    ) -> np.ndarray:
        """A sample's neighbors, some of them left out or replaced.

        Args:
            index: The sample's number.
            ids: i64 [L, K], NO_NEIGHBOR where there is none.
            database: Where replacements come from.
            dataset: The sample's dataset.
            own: The documents that the sample is cut from.

        Returns:
            i64 [L, K].
        """
        generator = self._generator(index, 0)
        # Everything is drawn, whatever the probabilities: one of them does not move another's.
        whole_chunks = generator.random((len(ids), 1)) < self.drop_chunks
        dropped = generator.random(ids.shape) < self.drop_neighbors
        replaced = generator.random(ids.shape) < self.replace_neighbors
        others = generator.integers(len(database), size=ids.shape)
        replaced &= (ids != NO_NEIGHBOR) & ~from_documents(database, others, dataset, own)
        return np.where(whole_chunks | dropped, NO_NEIGHBOR, np.where(replaced, others, ids))

    def disturb_tokens(self, index: int, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """A sample's retrieved tokens, some of them exchanged for others of them.

        Args:
            index: The sample's number.
            tokens: i64, any shape.
            mask: bool, the same shape, True where padded or missing; those stay.
        """
        there = tokens[~mask]
        if self.replace_tokens == 0.0 or not len(there):
            return tokens
        generator = self._generator(index, 1)
        replaced = (generator.random(tokens.shape) < self.replace_tokens) & ~mask
        return np.where(replaced, generator.choice(there, tokens.shape), tokens)

    def _generator(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, index, purpose]))
