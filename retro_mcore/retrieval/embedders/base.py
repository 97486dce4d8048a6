"""Interface of text embedders, and a function that embeds each distinct text once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.vectors import EmbeddingCounts, as_vectors, require_usable

Pooling = Literal["mean", "cls"]
#: The encoder that is installed as a package and needs no download.
DEFAULT_EMBEDDER = "minilm"
#: The embedder that needs no model.
LEXICAL_EMBEDDER = "lexical"


class Embedder(ABC):
    """Turns texts into vectors.

    Attributes:
        name: Name that it was built from, recorded in the project.
        dimension: Length of a vector.
        max_tokens: Maximum number of tokens read, including special tokens; the rest is cut. None:
            no limit.
        in_full: Number of texts so far that half precision could not hold; None: it does not
            compute in half precision.
    """

    name: str
    dimension: int
    max_tokens: int | None = None
    in_full: int | None = None

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, f32 [n, dimension].

        The same texts in the same order give the same bytes on the same kind of machine.
        """

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        """Count the tokens of each text, including special tokens, i64 [n]; None if unknown."""
        return None

    def half(self) -> None:
        """Compute in half precision.

        Raises:
            ConfigurationError: it cannot.
        """
        raise ConfigurationError(
            "--embed-fp16", f"{self.name} has no half precision", "Leave --embed-fp16 out"
        )


def embed_by_length(
    texts: Sequence[str],
    batch_size: int,
    dimension: int,
    embed: Callable[[list[str]], np.ndarray],
) -> np.ndarray:
    """Embed texts in batches of similar length, f32 [n, dimension].

    Long texts come first, so padding is small and a batch too large for memory fails immediately.

    Args:
        texts: Texts in any order.
        batch_size: Texts per call of `embed`.
        dimension: Length of a vector.
        embed: Returns the vectors of a batch.
    """
    vectors = np.empty((len(texts), dimension), np.float32)
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        vectors[rows] = embed([texts[row] for row in rows])
    return vectors


def embed_unique(
    embedder: Embedder,
    texts: Sequence[str],
    counts: EmbeddingCounts | None = None,
    first: int = 0,
    what: str = "chunk",
) -> np.ndarray:
    """Embed each distinct text once, f32 [n, dimension].

    Args:
        embedder: The embedder.
        texts: Texts of consecutive chunks.
        counts: Counts to add to.
        first: Number of the first chunk, for error messages.
        what: Name of a text, for error messages.

    Raises:
        ConfigurationError: the vectors have the wrong shape, or are NaN, infinite or too large.
    """
    place: dict[str, int] = {}
    rows = [place.setdefault(text, len(place)) for text in texts]
    distinct, name, in_full = list(place), embedder.name, embedder.in_full
    found = as_vectors(embedder.embed(distinct), len(distinct), embedder.dimension, name)
    vectors = found[rows]
    require_usable(vectors, name, in_full is not None, first, what)
    if counts is not None:
        counts.chunks += len(rows)
        counts.zero += int((~vectors.any(axis=1)).sum())
        counts.in_full += (embedder.in_full or 0) - (in_full or 0)
        _count_cut(embedder, distinct, rows, counts)
    return vectors


def _count_cut(
    embedder: Embedder, distinct: list[str], rows: list[int], counts: EmbeddingCounts
) -> None:
    """Count the chunks' tokens that the embedder does not read."""
    limit = embedder.max_tokens
    lengths = embedder.count_tokens(distinct) if limit is not None else None
    if limit is None or lengths is None:
        return
    lengths = lengths[rows]
    beyond = np.maximum(lengths - limit, 0)
    counts.add([0, (beyond > 0).sum(), lengths.sum(), beyond.sum()])
