"""Interface of text embedders, and a function that embeds each distinct text once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.vectors import EmbeddingCounts, as_vectors, require_usable

Pooling = Literal["mean", "cls"]
#: The encoder that is installed as a package and needs no download.
DEFAULT_EMBEDDER = "minilm"
#: Texts per forward pass where nothing is given.
BATCH_SIZE = 16
#: Tokens per forward pass of an encoder on a CPU, in a new project: benchmarks/embedding.py.
CPU_BATCH_TOKENS = 1024
#: The same on a GPU: of texts of 512 tokens 32, sentence-transformers' default, so that no batch
#: needs more memory than there. Not measured.
GPU_BATCH_TOKENS = 16_384
#: The embedder that needs no model.
LEXICAL_EMBEDDER = "lexical"


class Embedder(ABC):
    """Turns texts into vectors.

    Attributes:
        name: Name that it was built from, recorded in the project.
        dimension: Length of a vector.
        max_tokens: Maximum number of tokens read, including special tokens; the rest is cut. None:
            no limit.
        files: Files that decide the vectors, by part: "model", and "int8" where it is loaded. Their
            digests are recorded, so that a model that has changed is refused. Empty: not checked.
        in_full: Number of texts so far that half precision could not hold; None: it does not
            compute in half precision.
    """

    name: str
    dimension: int
    max_tokens: int | None = None
    files: Mapping[str, Sequence[Path]] = MappingProxyType({})
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

    def bfloat16(self) -> None:
        """Compute in bfloat16.

        Raises:
            ConfigurationError: it cannot.
        """
        raise ConfigurationError("--embed-precision", f"{self.name} has no bf16", "Leave it out")

    def int8(self) -> None:
        """Compute in int8.

        Raises:
            ConfigurationError: it cannot.
            MissingDependencyError: a package that it needs is not installed.
        """
        raise ConfigurationError("--embed-precision", f"{self.name} has no int8", "Leave it out")


class Encoder(Embedder):
    """An embedder that runs a model on batches of texts of similar length.

    Attributes:
        batch_size: Texts per forward pass.
        batch_tokens: Tokens per forward pass, padding included, instead of `batch_size`; None: as
            many texts as `batch_size` says.
    """

    batch_size: int = BATCH_SIZE
    batch_tokens: int | None = None

    @abstractmethod
    def embed_batch(self, texts: list[str]) -> np.ndarray:
        """Embed texts in one forward pass, f32 [n, dimension]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for rows in self._batches(texts):
            vectors[rows] = self.embed_batch([texts[row] for row in rows])
        return vectors

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        if self.batch_tokens is None:
            return batches_of_size([len(text) for text in texts], self.batch_size)
        lengths = self.count_tokens(texts)
        if lengths is None:
            raise ConfigurationError(
                "--embed-batch-tokens", f"{self.name} does not count tokens", "Leave it out"
            )
        if self.max_tokens is not None:
            lengths = np.minimum(lengths, self.max_tokens)
        return batches_of_tokens(lengths.tolist(), self.batch_tokens)


def batches_of_size(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Divide rows into batches of `size`, the longest first.

    Padding is small, and a batch too large for memory fails immediately.
    """
    order = _longest_first(lengths)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def batches_of_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Divide rows into batches of at most `tokens` with padding, but at least one row each.

    The longest come first, as in `batches_of_size`.
    """
    order, start = _longest_first(lengths), 0
    while start < len(order):
        size = max(tokens // max(lengths[order[start]], 1), 1)
        yield order[start : start + size]
        start += size


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


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
