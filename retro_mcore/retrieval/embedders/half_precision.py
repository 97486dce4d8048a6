"""Embedding in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from retro_mcore.retrieval.embedders.base import Embedder
from retro_mcore.retrieval.vectors import as_vectors, unusable


@runtime_checkable
class Restorable(Protocol):
    """An embedder that can go back to single precision."""

    def full(self) -> None:
        """Compute in single precision again."""
        ...


class HalfPrecision(Embedder):
    """An embedder in half precision; texts whose vectors overflow are embedded in single precision.

    Args:
        embedder: An embedder with `half()`, and with `full()` if it can switch back.

    Attributes:
        in_full: Number of texts so far whose vectors overflowed half precision.
    """

    def __init__(self, embedder: Embedder) -> None:
        embedder.half()
        self.name, self.dimension = embedder.name, embedder.dimension
        self.max_tokens, self.files = embedder.max_tokens, embedder.files
        self._embedder = embedder
        self.in_full: int = 0

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return self._embedder.count_tokens(texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = as_vectors(self._embedder.embed(texts), len(texts), self.dimension, self.name)
        wrong = np.flatnonzero(unusable(vectors))
        if len(wrong) and isinstance(self._embedder, Restorable):
            self._embedder.full()
            try:
                vectors[wrong] = self._embedder.embed([texts[int(row)] for row in wrong])
            finally:
                self._embedder.half()
            self.in_full += len(wrong)
        return vectors
