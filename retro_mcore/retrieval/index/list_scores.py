"""Scoring the vectors of an inverted list against all queries that visit it.

One matrix product finds which vectors may be near enough. Only for these the distance is computed,
directly from the differences, as Faiss does in its lists. So a distance depends on its query and
its vector alone; the rounding of the product, which depends on its shape, decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.candidates import width_of
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.rough_scores import Queries, Scores, VectorScores

#: Scores that are computed at a time: they stay in the processor's cache.
_SCORES = 1 << 19
_FEWEST_QUERIES = 64
#: Groups of scores per neighbor, of which the best is looked at.
_GROUPS = 4
#: Share of pairs from which on scoring them again in single precision is faster than computing
#: their distances.
_SHARE = 1 / 16


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


class WholeIndex:
    """The vectors of an index without lists, as one list that holds all of them.

    Args:
        index: An IndexFlat, IndexScalarQuantizer or IndexPQ that compares L2 distances.
    """

    def __init__(self, index: Any) -> None:
        self._index, self._decode = index, _decoder(index)

    def size(self, number: int) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    def read(self, number: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Read vectors [start, end), decoded, f32 [end - start, dimension], and their ids i64."""
        size = self._index.ntotal * self._index.code_size
        codes = _view(self._index.codes.data(), size).reshape(-1, self._index.code_size)
        return self._decode(codes[start:end].copy()), np.arange(start, end)

    def center(self, number: int) -> np.ndarray | None:
        """None: vectors are relative to the origin."""
        return None


def _view(pointer: Any, length: int) -> np.ndarray:
    return faiss_library().rev_swig_ptr(pointer, length)


def _decoder(index: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Turn codes u8 [n, code size] into vectors f32 [n, dimension]."""
    quantizer = getattr(index, "pq", None) or getattr(index, "sq", None)
    if quantizer is None:
        return lambda codes: codes.view(np.float32)
    return quantizer.decode


def candidates_within(
    queries: Queries,
    rows: np.ndarray,
    limits: np.ndarray,
    scores: VectorScores,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find all vectors that may be among the k nearest of a query.

    Args:
        queries: Queries of the search.
        rows: i64 [n], those that are wanted.
        limits: f32 [n], distance beyond which a query needs none; infinite: unknown.
        scores: The vectors.
        k: Number of nearest vectors that matter; of equal ones those of lower positions.

    Returns:
        Counts i64 [n], and of each candidate, query by query, its squared distance f32 and its
        position i64 among the vectors.
    """
    step = max(_FEWEST_QUERIES, _SCORES // len(scores))
    found = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found.append(_candidates(queries, rows[part], limits[part], scores, k))
    counts, distances, positions = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return counts, distances, positions


def _candidates(
    queries: Queries,
    rows: np.ndarray,
    limits: np.ndarray,
    scores: VectorScores,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    owners, columns = _near_pairs(queries, rows, limits, scores, k)
    counts = np.bincount(owners, minlength=len(rows))
    some = np.flatnonzero(counts)
    mine = queries.vectors[rows[some]]
    if scores.center is not None:
        mine -= scores.center
    places = np.repeat(np.arange(len(some)), counts[some])
    distances = squared_differences(mine, places, scores.vectors, columns)
    near = (distances <= limits[owners]) & np.isfinite(distances)
    owners, columns, distances = owners[near], columns[near], distances[near]
    kept = _among_nearest(owners, distances, len(rows), k)
    owners, columns, distances = owners[kept], columns[kept], distances[kept]
    return np.bincount(owners, minlength=len(rows)), distances, columns


def _near_pairs(
    queries: Queries, rows: np.ndarray, limits: np.ndarray, scores: VectorScores, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of queries and vectors that may be near, by query: places in `rows`, and columns."""
    rough = scores(queries, rows)
    near = _pairs_above(rough, limits, scores, k)
    if rough.errors.any() and len(near) > 2 * k * len(rows) + _SHARE * rough.values.size:
        near = _pairs_above(scores.exactly(queries, rows), limits, scores, k)
    return np.divmod(near, len(scores))


def _pairs_above(scores: Scores, limits: np.ndarray, vectors: VectorScores, k: int) -> np.ndarray:
    least = _least_scores(scores, limits, vectors, k)
    return np.flatnonzero(scores.values >= least[:, None])


def _among_nearest(rows: np.ndarray, distances: np.ndarray, count: int, k: int) -> np.ndarray:
    """Mark candidates, of rows in ascending order, that may be among the k nearest of their row.

    A row with many candidates, such as copies at the same distance, keeps the first k by distance
    and position.
    """
    counts = np.bincount(rows, minlength=count)
    counts[counts <= width_of(k)] = 0
    kept = np.ones(len(rows), bool)
    if not counts.any():
        return kept
    crowded = np.flatnonzero(counts[rows])
    order = crowded[np.lexsort((distances[crowded], rows[crowded]))]  # stable
    places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept[order[places >= k]] = False
    return kept


def _least_scores(scores: Scores, limits: np.ndarray, vectors: VectorScores, k: int) -> np.ndarray:
    """Lowest score [n] that a vector among the k nearest can have, whatever was rounded.

    Not a number for queries that are not finite.
    """
    open_ = np.isinf(limits)
    bounds = np.where(open_, scores.farthest(), limits)
    slack = scores.slack(bounds, vectors.dimension)
    with np.errstate(invalid="ignore"):
        least = np.where(open_, -np.inf, (scores.squares - bounds) / 2 - slack)
        if open_.any() and len(vectors) > k:
            best = _reached_by(scores.values if open_.all() else scores.values[open_], k)
            least[open_] = best - 2 * slack[open_]
    return least.astype(np.float32)


def _reached_by(values: np.ndarray, k: int) -> np.ndarray:
    """A value [n] that at least k of each row reach, and few more; values: [n, more than k].

    The k-th largest of the maxima of groups: selecting among these is faster.
    """
    groups = _GROUPS * k
    height = values.shape[1] // groups
    if height > 1:
        values = values[:, : groups * height].reshape(len(values), height, groups).max(axis=1)
    return np.partition(values, -k, axis=1)[:, -k]


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
