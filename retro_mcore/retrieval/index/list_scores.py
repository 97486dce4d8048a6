"""Scoring the vectors of an inverted list against all queries that visit it.

One matrix product finds which vectors may be near enough. Only for these the distance is computed,
directly from the differences, as Faiss does in its lists. So a distance depends on its query and
its vector alone; the rounding of the product, which depends on its shape, decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.library import faiss_library

#: Scores that are computed at a time: they stay in the processor's cache.
_SCORES = 1 << 20
_FEWEST_QUERIES = 64
#: Roundings beside those of the sums over the dimensions, generously.
_ROUNDINGS = 16


class InvertedLists:
    """The vectors of an IVF index, list by list.

    Args:
        ivf: An IndexIVFFlat, IndexIVFScalarQuantizer or IndexIVFPQ that compares L2 distances.
    """

    def __init__(self, ivf: Any) -> None:
        self._ivf, self._lists = ivf, ivf.invlists
        self._decode = _decoder(ivf)
        self._residual = bool(ivf.by_residual)

    def size(self, number: int) -> int:
        """Number of vectors in a list."""
        return int(self._lists.list_size(number))

    def read(self, number: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Read vectors [start, end) of a list, decoded: f32 [end - start, dimension], and ids i64.

        They are relative to `center`, in the order of their ids.
        """
        size = self.size(number)
        codes = self._lists.get_codes(number)
        try:
            view = _view(codes, size * self._ivf.code_size).reshape(size, -1)
            vectors = self._decode(view[start:end].copy())
        finally:
            self._lists.release_codes(number, codes)
        pointer = self._lists.get_ids(number)
        try:
            ids = _view(pointer, size)[start:end].copy()
        finally:
            self._lists.release_ids(number, pointer)
        if (ids[1:] < ids[:-1]).any():
            order = np.argsort(ids)
            vectors, ids = vectors[order], ids[order]
        return vectors, ids

    def center(self, number: int) -> np.ndarray | None:
        """Point that a list's vectors are relative to; None: the origin."""
        return self._ivf.quantizer.reconstruct(number) if self._residual else None


def _view(pointer: Any, length: int) -> np.ndarray:
    return faiss_library().rev_swig_ptr(pointer, length)


def _decoder(ivf: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Turn codes u8 [n, code size] into vectors f32 [n, dimension]."""
    name = type(ivf).__name__
    if name == "IndexIVFFlat":
        return lambda codes: codes.view(np.float32)
    quantizer = ivf.pq if name == "IndexIVFPQ" else ivf.sq
    return quantizer.decode


def candidates_within(
    queries: np.ndarray, limits: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find all vectors that may be among the k nearest of a query.

    Args:
        queries: f32 [n, dimension].
        limits: f32 [n], distance beyond which a query needs none; infinite: unknown.
        vectors: f32 [m, dimension], finite.
        k: Number of nearest vectors that matter; of equal ones those of lower positions.

    Returns:
        Counts i64 [n], and of each candidate, query by query, its squared distance f32 and its
        position i64 in `vectors`.
    """
    score = _product(vectors)
    step = max(_FEWEST_QUERIES, _SCORES // len(vectors))
    longest = float(np.einsum("nd,nd->n", vectors, vectors).max())
    found = [
        _candidates(
            score, queries[start : start + step], limits[start : start + step], vectors, k, longest
        )
        for start in range(0, len(queries), step)
    ]
    counts, distances, positions = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return counts, distances, positions


def _candidates(
    score: Callable[[np.ndarray], np.ndarray],
    queries: np.ndarray,
    limits: np.ndarray,
    vectors: np.ndarray,
    k: int,
    longest: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = score(queries)
    least = _least_scores(scores, queries, limits, longest, k)
    rows, columns = np.divmod(np.flatnonzero(scores >= least[:, None]), len(vectors))
    distances = squared_differences(queries, rows, vectors, columns)
    near = (distances <= limits[rows]) & np.isfinite(distances)
    rows, columns, distances = rows[near], columns[near], distances[near]
    kept = _among_nearest(rows, distances, len(queries), k)
    rows, columns, distances = rows[kept], columns[kept], distances[kept]
    return np.bincount(rows, minlength=len(queries)), distances, columns


def _among_nearest(rows: np.ndarray, distances: np.ndarray, count: int, k: int) -> np.ndarray:
    """Mark candidates, of rows in ascending order, that may be among the k nearest of their row.

    A row with many candidates, such as copies at the same distance, keeps the first k by distance
    and position.
    """
    counts = np.bincount(rows, minlength=count)
    counts[counts <= 2 * k] = 0
    kept = np.ones(len(rows), bool)
    if not counts.any():
        return kept
    crowded = np.flatnonzero(counts[rows])
    order = crowded[np.lexsort((distances[crowded], rows[crowded]))]  # stable
    places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept[order[places >= k]] = False
    return kept


def _product(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Score queries [n, dimension] against `vectors`, f32 [n, m]: x.y - |y|^2 / 2.

    The nearest vector has the highest score. Faiss's own matrix product obeys its number of
    threads.
    """
    faiss = faiss_library()
    product = faiss.LinearTransform(vectors.shape[1], len(vectors), True)
    faiss.copy_array_to_vector(vectors.reshape(-1), product.A)
    halves = np.einsum("nd,nd->n", vectors, vectors) / np.float32(-2)
    faiss.copy_array_to_vector(halves, product.b)
    product.is_trained = True
    return product.apply


def _least_scores(
    scores: np.ndarray, queries: np.ndarray, limits: np.ndarray, longest: float, k: int
) -> np.ndarray:
    """Lowest score [n] that a vector among the k nearest can have, whatever was rounded.

    With u = 2^-24, a sum of d products has an error of at most d u times the sum of their
    magnitudes, in any order (Higham 2002, section 3.1). By |x||y| <= (|x|^2 + |y|^2) / 2 and
    distance = |x|^2 - 2 score, the scores and distances of all vectors y of a list are exact
    within d u (|x|^2 + 2 max |y|^2 + distance).
    """
    dimension = queries.shape[1]
    unit = (dimension + _ROUNDINGS) * 2.0**-24
    tiny = dimension * float(np.finfo(np.float32).tiny)
    squares = np.einsum("nd,nd->n", queries, queries).astype(np.float64)
    far = 2 * (squares + longest)  # no distance exceeds it
    bounds = np.where(np.isinf(limits), far, limits.astype(np.float64))
    slack = unit * (squares + 2 * longest + bounds) + tiny
    least = np.where(np.isinf(limits), -np.inf, (squares - limits) / 2 - slack)
    open_ = np.flatnonzero(np.isinf(limits))
    if len(open_) and scores.shape[1] > k:
        best = np.partition(scores[open_], -k, axis=1)[:, -k]
        least[open_] = best - 2 * slack[open_]
    return least.astype(np.float32)


def squared_differences(
    queries: np.ndarray, rows: np.ndarray, vectors: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Squared distances f32 of queries[rows] to vectors[columns], each computed alone."""
    return _pairwise(faiss_library().pairwise_indexed_L2sqr, queries, rows, vectors, columns)


def inner_products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Inner products f32 [n, m] of all queries with all vectors, each computed alone."""
    rows, columns = np.divmod(np.arange(len(queries) * len(vectors)), len(vectors))
    function = faiss_library().pairwise_indexed_inner_product
    return _pairwise(function, queries, rows, vectors, columns).reshape(len(queries), -1)


def _pairwise(
    function: Any, queries: np.ndarray, rows: np.ndarray, vectors: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    found = np.empty(len(rows), np.float32)
    arrays = [np.ascontiguousarray(part) for part in (queries, rows, vectors, columns)]
    pointers = [faiss_library().swig_ptr(part) for part in (*arrays, found)]
    function(queries.shape[1], len(rows), *pointers)
    return found
