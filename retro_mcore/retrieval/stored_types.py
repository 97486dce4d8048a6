"""Types that embeddings are stored in: fp16 takes half the disk, other programs read fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from retro_mcore.retrieval.vectors import EmbeddingCounts

StoredType = Literal["fp16", "fp32"]
#: Largest error of a number in fp16, relative to the largest number of its vector. Rounding alone
#: gives half of it.
_MOST_LOST = 2.0**-10


@dataclass
class StoredCounts(EmbeddingCounts):
    """Counts of chunks that were embedded and stored.

    Attributes:
        beyond_fp16: Chunks whose vectors fp16 cannot hold; their files are stored in fp32.
    """

    beyond_fp16: int = 0


def bytes_of(dtype: StoredType) -> int:
    """Bytes per number."""
    return 2 if dtype == "fp16" else 4


def as_stored(vectors: np.ndarray, dtype: StoredType, counts: StoredCounts) -> np.ndarray:
    """Convert vectors to the type that they are stored in.

    All of them stay in fp32 if fp16 cannot hold one of them: if a number overflows, or if all are
    so small that more is lost than by rounding. Such vectors are counted.

    Args:
        vectors: f32 [n, dimension].
        dtype: The type to store.
        counts: Counts to add to.
    """
    if dtype == "fp32":
        return vectors
    with np.errstate(over="ignore"):
        small = vectors.astype(np.float16)
    beyond = int(_exceeds_fp16(vectors, small).sum())
    counts.beyond_fp16 += beyond
    return vectors if beyond else small


def _exceeds_fp16(vectors: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Mark vectors that fp16 changes by more than rounding, bool [n]."""
    lost = np.abs(vectors - small.astype(np.float32)).max(axis=1, initial=0)
    return ~(lost <= _MOST_LOST * np.abs(vectors).max(axis=1, initial=0))
