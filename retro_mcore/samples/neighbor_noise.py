"""Random changes to neighbors in training, which make a model robust to poor retrieval.

Neighbors are dropped or replaced, and their tokens are replaced. The changes depend only on the
seed and the sample's number, so they are the same on every rank, for any number of workers, and in
a resumed run.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.filtering import from_documents


@dataclass(frozen=True)
class NeighborNoise:
    """Probabilities of the changes.

    Attributes:
        seed: The project's seed.
        drop_chunks: Probability that a chunk loses all its neighbors.
        drop_neighbors: Probability that a neighbor is dropped.
        replace_neighbors: Probability that a neighbor is replaced by a random chunk of the
            database. It is kept if the random chunk is from the sample's own documents, or from
            a removed one.
        replace_tokens: Probability that a retrieved token is replaced by another retrieved token
            of the sample.
    """

    seed: int
    drop_chunks: float = 0.0
    drop_neighbors: float = 0.0
    replace_neighbors: float = 0.0
    replace_tokens: float = 0.0

    @classmethod
    def from_options(cls, options: Any, seed: int) -> NeighborNoise:
        """The probabilities in options, or in Megatron-LM's arguments."""
        names = (each.name for each in fields(cls) if each.name != "seed")
        return cls(seed, **{name: getattr(options, f"retro_{name}") for name in names})

    def __bool__(self) -> bool:
        return any(astuple(self)[1:])

    def disturb_neighbors(
        self, index: int, ids: np.ndarray, database: ChunkDatabase, dataset: int, own: np.ndarray
    ) -> np.ndarray:
        """Drop or replace some of a sample's neighbors.

        Args:
            index: The sample's number.
            ids: i64 [L, K], NO_NEIGHBOR where there is none.
            database: Source of replacements.
            dataset: The sample's dataset.
            own: Documents that the sample is made from.

        Returns:
            i64 [L, K].
        """
        generator = self._generator(index, 0)
        # All numbers are always drawn, so changing one probability does not affect the other draws.
        whole_chunks = generator.random((len(ids), 1)) < self.drop_chunks
        dropped = generator.random(ids.shape) < self.drop_neighbors
        replaced = generator.random(ids.shape) < self.replace_neighbors
        others = generator.integers(len(database), size=ids.shape)
        replaced &= (ids != NO_NEIGHBOR) & ~from_documents(database, others, dataset, own)
        if database.removed is not None:
            replaced &= ~database.removed.of(others)
        return np.where(whole_chunks | dropped, NO_NEIGHBOR, np.where(replaced, others, ids))

    def disturb_tokens(self, index: int, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Replace some of a sample's retrieved tokens with others of its retrieved tokens.

        Args:
            index: The sample's number.
            tokens: i64, any shape.
            mask: bool, the same shape, True where padded or missing; these are unchanged.
        """
        there = tokens[~mask]
        if self.replace_tokens == 0.0 or not len(there):
            return tokens
        generator = self._generator(index, 1)
        replaced = (generator.random(tokens.shape) < self.replace_tokens) & ~mask
        return np.where(replaced, generator.choice(there, tokens.shape), tokens)

    def _generator(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, index, purpose]))
