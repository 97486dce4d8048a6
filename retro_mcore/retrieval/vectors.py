"""Check that vectors can be searched: correct shape, finite, and small enough for distances.

A NaN or infinite vector is close to nothing. Its chunk would find no neighbors and never be found,
without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from retro_mcore.errors import ConfigurationError

#: From this squared length on, squared distances may overflow single precision.
_LONGEST = float(np.finfo(np.float32).max) / 8
#: Maximum number of ids in an error message.
_NAMED = 5


@dataclass
class EmbeddingCounts:
    """Counts of chunks that were embedded.

    Attributes:
        chunks: Chunks counted; 0 if they were embedded by a version without counts.
        chunks_cut: Chunks longer than the embedder can read.
        tokens: Tokens of all chunks, as the embedder's tokenizer counts them.
        tokens_cut: Tokens that the embedder did not read.
        in_full: Texts embedded in single precision, because their half-precision vectors
            overflowed.
        zero: Chunks with a zero vector, which is equally far from all vectors of the same length.
    """

    chunks: int = 0
    chunks_cut: int = 0
    tokens: int = 0
    tokens_cut: int = 0
    in_full: int = 0
    zero: int = 0

    def add(self, others: Sequence[int] | np.ndarray) -> None:
        """Add counts in the order of the fields, as returned by `to_array`."""
        for field, value in zip(fields(self), others, strict=False):
            setattr(self, field.name, getattr(self, field.name) + int(value))

    def to_array(self) -> np.ndarray:
        """The counts in the order of the fields, i64."""
        return np.array(astuple(self), np.int64)

    @property
    def cut_share(self) -> str:
        """Message about the fraction of chunks and tokens that were cut; empty if none were."""
        if not self.chunks_cut:
            return ""
        return (
            f"{self.chunks_cut} of {self.chunks} chunks ({self.chunks_cut / self.chunks:.1%}), "
            f"{self.tokens_cut / self.tokens:.1%} of their tokens"
        )


def unusable(vectors: np.ndarray) -> np.ndarray:
    """Mark vectors f32 [n, dimension] that are NaN, infinite or too long, bool [n]."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.einsum("nd,nd->n", vectors, vectors)
    return ~(lengths < _LONGEST)


def as_vectors(vectors: object, count: int, dimension: int, embedder: str) -> np.ndarray:
    """Convert an embedder's result to f32 [count, dimension].

    Raises:
        ConfigurationError: the result is not a matrix of real numbers with that shape.
    """
    try:
        found = np.asarray(vectors)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths, a CUDA tensor
        raise _no_vectors(embedder, str(error).splitlines()[0], count, dimension) from error
    if found.dtype.kind not in "fiu" or found.shape != (count, dimension):
        what = f"{found.dtype} of shape {list(found.shape)}"
        raise _no_vectors(embedder, what, count, dimension)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, np.float32)


def _no_vectors(embedder: str, found: str, count: int, dimension: int) -> ConfigurationError:
    return ConfigurationError(
        f"--embedder {embedder}",
        f"gives {found} for {count} texts",
        f"It must give real numbers of shape [{count}, {dimension}]",
    )


def require_usable(
    vectors: np.ndarray, embedder: str, half: bool, first: int = 0, what: str = "chunk"
) -> None:
    """Reject vectors that cannot be searched.

    Args:
        vectors: f32 [n, dimension].
        embedder: Name of the embedder.
        half: Whether it computes in half precision.
        first: Number of the first row.
        what: Name of a row, such as "chunk".

    Raises:
        ConfigurationError: some cannot; the error gives their number and names the first.
    """
    wrong = np.flatnonzero(unusable(vectors))
    if not len(wrong):
        return
    way = "Leave --embed-fp16 out" if half else "Use another --embedder, or repair its weights"
    raise ConfigurationError(
        f"--embedder {embedder}",
        f"{len(wrong)} of {len(vectors)} vectors are NaN, infinite or too large, "
        f"those of {list_rows(wrong + first, what)}",
        way,
    )


def list_rows(rows: np.ndarray, what: str = "chunk") -> str:
    """Name the first few rows for an error message: "chunks 3, 17, 20 ..."."""
    numbers = ", ".join(map(str, rows[:_NAMED].tolist()))
    return f"{what}{'s' if len(rows) > 1 else ''} {numbers}{' ...' if len(rows) > _NAMED else ''}"
