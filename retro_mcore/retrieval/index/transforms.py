"""What an index does to vectors before it compares them: OPQ, PCA and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_scores import inner_products


def transformed(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Transform vectors f32 [n, dimension] as an index does.

    What a matrix gives for a vector depends on this vector alone.
    """
    for transform in _transforms(index):
        vectors = _transformed(transform, vectors)
    return vectors


def _transforms(index: Any) -> Iterator[Any]:
    faiss = faiss_library()
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        for position in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(position))
        index = faiss.downcast_index(index.index)


def _transformed(transform: Any, vectors: np.ndarray) -> np.ndarray:
    faiss = faiss_library()
    if not isinstance(transform, faiss.LinearTransform):
        return transform.apply(vectors)
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    found = inner_products(vectors, matrix)
    return found + faiss.vector_to_array(transform.b) if transform.have_bias else found
