"""Exact order for the candidates of a compressed index, from the stored vectors (--rescore)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from retro_mcore.distributed import raise_together
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.faiss_search import nearest, search
from retro_mcore.retrieval.index.gpu import log_once
from retro_mcore.retrieval.index.shared import SharedIndex

#: Bytes of vectors that are read at a time.
_BLOCK_BYTES = 64 << 20

#: Factory strings of indexes that hold the vectors as they are.
_EXACT = re.compile(r"(IVF[\w()]+,|(HNSW|NSG)\d*[,_])?Flat|(HNSW|NSG)\d*")

Found = tuple[np.ndarray, np.ndarray]


def log_if_in_vain(index_string: str) -> None:
    """Say it in the log if an index's candidates are in exact order without --rescore.

    They are sorted again nevertheless: distances may differ in their last bits.
    """
    if _EXACT.fullmatch(index_string):
        log_once(
            f"--rescore gains nothing: candidates of {index_string} are in exact order, and their "
            "vectors are read a second time"
        )


def rescored(embeddings: Embeddings, queries: np.ndarray, ids: np.ndarray) -> Found:
    """Sort candidates by their exact distances.

    Args:
        embeddings: The database's vectors.
        queries: f32 [n, dimension].
        ids: Candidates i64 [n, k]; NO_NEIGHBOR where there is none.

    Returns:
        Squared distances f32 [n, k] and ids [n, k], nearest first, equal distances in the order of
        ids, missing ones last.
    """
    distances = np.empty(ids.shape, np.float32)
    row_bytes = 4 * max(1, ids.shape[1]) * queries.shape[1]
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(ids), step):
        block = slice(start, start + step)
        distances[block] = _distances(embeddings, queries[block], ids[block])
    return nearest(distances, ids, ids.shape[1])


def _distances(embeddings: Embeddings, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Squared distances [n, k]; each stored vector is read once, in the order of the files."""
    rows, where = np.unique(np.maximum(ids, 0), return_inverse=True)
    vectors = embeddings.rows(rows)
    where = where.reshape(ids.shape)
    result = np.empty(ids.shape, np.float32)
    for query, places, row in zip(queries, where, result, strict=True):
        difference = vectors[places] - query
        row[:] = np.einsum("kd,kd->k", difference, difference)
    return result


class RescoredIndex:
    """An index whose candidates are sorted by the distances of the stored vectors.

    Args:
        index: Anything that `search` takes.
        embeddings: The database's vectors.
    """

    def __init__(self, index: Any, embeddings: Embeddings) -> None:
        self.local, self._embeddings = index, embeddings
        self.ntotal = index.ntotal

    def search(self, vectors: np.ndarray, k: int) -> Found:
        """Search k candidates; see `rescored`."""
        return rescored(self._embeddings, vectors, search(self.local, vectors, k)[1])


class RescoredSharedIndex(SharedIndex):
    """The same for an index that ranks share: each rank rescores the candidates of its queries.

    Args:
        shared: The index.
        embeddings: The database's vectors.
    """

    def __init__(self, shared: SharedIndex, embeddings: Embeddings) -> None:
        super().__init__(shared.local, shared.ntotal, shared.d, shared.group)
        self._embeddings = embeddings

    def search_together(self, vectors: np.ndarray, k: int) -> Found:
        """Search k candidates; see `rescored`.

        Raises:
            CorruptFileError: stored vectors that any rank reads are damaged.
        """
        ids = super().search_together(vectors, k)[1]
        with raise_together(self.group):
            return rescored(self._embeddings, vectors, ids)
