"""Search a Faiss index, with bitwise identical results on any number of threads and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, Protocol, runtime_checkable

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.index.library import faiss_library, worker_threads
from retro_mcore.retrieval.index.training import graph_of

#: Number of queries per call of Faiss.
_QUERIES = 128


@runtime_checkable
class JointIndex(Protocol):
    """An index over several ranks, which search it together."""

    def search_together(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search this rank's queries; see `search`. Every rank must call it."""
        ...


def search(index: Any, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search the k nearest vectors of each query.

    Args:
        index: A Faiss index, or anything with the same `search(vectors, k)`.
        vectors: f32 [n, dimension].
        k: Number of neighbors.

    Returns:
        Distances f32 [n, k] and ids i64 [n, k], nearest first, equal distances in the order of
        ids. Trailing NO_NEIGHBOR if the index found fewer.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if isinstance(index, JointIndex):
        return index.search_together(vectors, k)
    if len(vectors) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    if not isinstance(index, (faiss_library().Index, PartedIndex)):
        return by_distance_then_id(*_sorted(*index.search(vectors, k)))
    parts = [vectors[start : start + _QUERIES] for start in range(0, len(vectors), _QUERIES)]
    found = list(worker_threads().map(search_once, repeat(index), parts, repeat(k)))
    distances, ids = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return by_distance_then_id(distances, ids)


def search_once(index: Any, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One call of `index.search`, whatever was in the memory that Faiss writes to.

    Fast scans for 2 to 20 neighbors look at the first distance there before they write any. By
    chance it may be the number that makes them keep nothing (Faiss 1.15).
    """
    faiss = faiss_library()
    if not isinstance(index, faiss.Index):
        return index.search(vectors, k)
    limits, largest = np.finfo(np.float32), index.metric_type == faiss.METRIC_INNER_PRODUCT
    distances = np.full((len(vectors), k), limits.min if largest else limits.max, np.float32)
    return index.search(vectors, k, D=distances)


def _sorted(distances: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the rows [n, k] whose distances are out of order, as cuVS may return them."""
    rows = np.flatnonzero((distances[:, 1:] < distances[:, :-1]).any(axis=1))
    if len(rows):
        distances[rows], ids[rows] = nearest(distances[rows], ids[rows], ids.shape[1])
    return distances, ids


def by_distance_then_id(distances: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort ids [n, k] of equal distance; rows must be sorted by distance."""
    rows = np.flatnonzero((distances[:, 1:] == distances[:, :-1]).any(axis=1))
    before, after = ids[rows, :-1], ids[rows, 1:]
    tied = distances[rows, 1:] == distances[rows, :-1]
    rows = rows[(tied & (after < before) & (after != NO_NEIGHBOR)).any(axis=1)]
    if len(rows):
        distances[rows], ids[rows] = nearest(distances[rows], ids[rows], ids.shape[1])
    return distances, ids


def nearest(distances: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first k of candidates [n, any] by distance, then id; missing ones last."""
    distances = np.where(ids == NO_NEIGHBOR, np.float32(np.inf), distances)
    order = np.lexsort((np.where(ids == NO_NEIGHBOR, np.iinfo(np.int64).max, ids), distances))
    order = order[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


class PartedIndex:
    """Indexes over parts of the vectors, searched as one.

    Args:
        parts: Faiss indexes; ids of each count from its offset.
        offsets: Id of each part's first vector.
    """

    def __init__(self, parts: Sequence[Any], offsets: Sequence[int]) -> None:
        self.parts, self.offsets = parts, offsets

    @property
    def ntotal(self) -> int:
        """Number of vectors, under Faiss's name."""
        return sum(part.ntotal for part in self.parts)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search all parts; see `search`."""
        if not self.parts:  # of a rank that holds none
            shape = len(vectors), k
            return np.full(shape, np.inf, np.float32), np.full(shape, NO_NEIGHBOR, np.int64)
        found = [search_once(part, vectors, k) for part in self.parts]
        ids = [
            np.where(part == NO_NEIGHBOR, part, part + offset)
            for (_, part), offset in zip(found, self.offsets, strict=True)
        ]
        return nearest(np.hstack([distances for distances, _ in found]), np.hstack(ids), k)


def set_search_breadth(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Set nprobe and efSearch if given."""
    parameters = faiss_library().ParameterSpace()
    if nprobe is not None:
        parameters.set_index_parameter(index, "nprobe", nprobe)
    if ef_search is None:
        return
    nsg = getattr(graph_of(index), "nsg", None)
    if nsg is not None:  # Faiss does not set its breadth by name, and hangs in a broader one
        nsg.search_L = min(ef_search, nsg.ntotal)
        return
    name = "quantizer_efSearch" if nprobe is not None else "efSearch"
    parameters.set_index_parameter(index, name, ef_search)
