"""The k nearest candidates of many queries, while lists are searched one after the other."""

from __future__ import annotations

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.index.faiss_search import by_distance_then_id, nearest

#: Candidates kept beyond k before the farthest are dropped: this share of k, and at least so many.
_SPARE_SHARE, _LEAST_SPARE = 0.75, 64
#: Elements of a matrix in which candidates are compared at a time.
_COMPARED = 1 << 20


class NearestCandidates:
    """Keeps the k nearest candidates of each query, by distance and then id.

    The result does not depend on the order in which candidates come.

    Args:
        queries: Number of queries.
        k: Candidates to keep.

    Attributes:
        limits: f32 [queries], distance beyond which a candidate is not among the k nearest. It
            only falls, so an old value is safe to use.
    """

    def __init__(self, queries: int, k: int) -> None:
        self._k, self._width = k, width_of(k)
        self._distances = np.full((queries, self._width), np.inf, np.float32)
        self._ids = np.full((queries, self._width), NO_NEIGHBOR, np.int64)
        self._filled = np.zeros(queries, np.int64)
        self.limits = np.full(queries, np.inf, np.float32)

    def add(
        self, rows: np.ndarray, counts: np.ndarray, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """Add candidates.

        Args:
            rows: i64 [n], the queries, each once.
            counts: i64 [n], candidates of each.
            distances: f32 [sum of counts], query by query.
            ids: i64 [sum of counts].
        """
        filled = self._filled[rows] + counts
        full = filled > self._width
        fits = np.repeat(~full, counts)
        owners = np.repeat(np.arange(len(rows)), counts)
        starts = np.cumsum(counts) - counts
        places = np.arange(len(owners)) - np.repeat(starts - self._filled[rows], counts)
        where = rows[owners[fits]], places[fits]
        self._distances[where], self._ids[where] = distances[fits], ids[fits]
        self._filled[rows[~full]] = filled[~full]
        enough = ~full & (filled >= self._k) & np.isinf(self.limits[rows])
        self._limit(rows[enough])
        self._replace(np.flatnonzero(full), rows, filled, starts, counts, distances, ids)

    def _limit(self, rows: np.ndarray) -> None:
        height = max(1, _COMPARED // self._width)
        for start in range(0, len(rows), height):
            some = rows[start : start + height]
            ordered = np.partition(self._distances[some], self._k - 1, axis=1)
            self.limits[some] = ordered[:, self._k - 1]

    def _replace(
        self,
        full: np.ndarray,
        rows: np.ndarray,
        filled: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        distances: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        """Keep the k nearest of the old and new candidates of rows that are full."""
        full = full[np.argsort(counts[full], kind="stable")]  # of similar width together
        while len(full):
            height = max(1, _COMPARED // (self._width + int(counts[full[-1]])))
            some, full = full[-height:], full[:-height]
            columns = np.arange(int(counts[some].max()))
            there = columns < counts[some, None]
            source = np.where(there, starts[some, None] + columns, 0)
            new_distances = np.where(there, distances[source], np.float32(np.inf))
            new_ids = np.where(there, ids[source], NO_NEIGHBOR)
            mine = rows[some]
            self._keep(
                mine,
                np.hstack([self._distances[mine], new_distances]),
                np.hstack([self._ids[mine], new_ids]),
            )
            self._filled[mine] = np.minimum(filled[some], self._k)

    def _keep(self, rows: np.ndarray, distances: np.ndarray, ids: np.ndarray) -> None:
        distances, ids = select(distances, ids, self._k)
        self._distances[rows, : self._k], self._ids[rows, : self._k] = distances, ids
        self._distances[rows, self._k :] = np.inf
        self._ids[rows, self._k :] = NO_NEIGHBOR
        self.limits[rows] = distances.max(axis=1)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances f32 and ids i64 [queries, k], nearest first; see `faiss_search.search`."""
        shape = len(self.limits), self._k
        distances, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
        height = max(1, _COMPARED // self._width)
        for start in range(0, len(distances), height):
            rows = slice(start, start + height)
            found = select(self._distances[rows], self._ids[rows], self._k)
            order = np.argsort(found[0], axis=1, kind="stable")
            found = np.take_along_axis(found[0], order, 1), np.take_along_axis(found[1], order, 1)
            distances[rows], ids[rows] = by_distance_then_id(*found)
        distances[ids == NO_NEIGHBOR] = np.finfo(np.float32).max  # as Faiss returns them
        return distances, ids


def width_of(k: int) -> int:
    """Candidates that are held per query for k nearest ones."""
    return k + max(_LEAST_SPARE, int(_SPARE_SHARE * k))


def select(distances: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Select the k nearest candidates [n, more than k] by distance, then id, in any order."""
    order = np.argpartition(distances, k - 1, axis=1)[:, :k]
    kept = np.take_along_axis(distances, order, 1)
    found = np.take_along_axis(ids, order, 1)
    last = kept[:, -1:]
    tied = (distances == last).sum(axis=1) > (kept == last).sum(axis=1)
    rows = np.flatnonzero(tied & np.isfinite(last[:, 0]))
    if len(rows):
        kept[rows], found[rows] = nearest(distances[rows], ids[rows], k)
    return kept, found
