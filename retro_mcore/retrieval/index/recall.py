"""Recall of an index relative to exact search, and the breadth of search that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.project.markers import signed_write
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index.embeddings import Embeddings, HeldOut
from retro_mcore.retrieval.index.faiss_search import nearest, search, set_search_breadth
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order
from retro_mcore.retrieval.index.training import has_graph, num_lists

RECALL_AT = (1, 2, 10)
#: The decisive recall is at this K, the number of neighbors that the paper's models read.
DECISIVE = 2
#: Candidates per query that --rescore sorts by the stored vectors; the default of query_neighbors.
NUM_RESCORED = 200
_BATCH = 65_536
#: Rounding error of a squared distance in single precision, a few last bits: relative to the
#: squared lengths that are subtracted, and to the square root of the dimension.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)
_BROADEST_GRAPH = 4096
#: nprobe is found within one part in so many.
_STEPS = 16
#: A margin for the error of measurement may take so many times the lists.
_MARGIN = 1.5
#: A graph search whose recall is closer to the best than this is as good.
_CLOSE = 0.001
#: Queries whose candidates' vectors are in memory at a time.
_GATHERED = 256


@dataclass(frozen=True)
class Recall:
    """Fraction of the exact nearest neighbors that the index finds.

    A neighbor counts as found if another at the same distance is (see `recall_at`).

    Attributes:
        at: Recall@K by K.
        num_queries: Number of queries.
        num_held_out: Queries that are chunks of held-out documents; the others are database rows,
            which do not count as their own neighbors.
        nprobe: Lists searched; None without lists.
        ef_search: Breadth of the graph search; None without a graph.
        error: Standard error of the decisive recall, as for other queries like these.
        in_list_order: Decisive recall of a search in list order, which visits the nearest lists;
            None if the index has no such search.
    """

    at: dict[int, float]
    num_queries: int
    num_held_out: int
    nprobe: int | None
    ef_search: int | None
    error: float = 0.0
    in_list_order: float | None = None

    @property
    def decisive(self) -> float:
        """Recall@2, or @1 in a smaller database."""
        return self.at.get(DECISIVE, self.at[min(self.at)])


#: Measures an index with some nprobe and efSearch.
Measure = Callable[[int | None, int | None], Recall]


def exact_neighbors(
    embeddings: Embeddings, queries: HeldOut, part: Shard
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest rows of one part by exhaustive search, one batch of rows at a time.

    Returns:
        Distances f32 and rows i64 [queries, max(RECALL_AT)], excluding a query's own row.
    """
    width = max(RECALL_AT)
    distances = np.full((len(queries.vectors), width), np.inf, np.float32)
    ids = np.full(distances.shape, -1, np.int64)
    faiss = faiss_library()
    for start in range(part.start, part.end, _BATCH):
        end = min(start + _BATCH, part.end)
        flat = faiss.IndexFlatL2(embeddings.dimension)
        flat.add(embeddings.range(start, end))
        found, rows = search(flat, queries.vectors, min(width + 1, end - start))
        rows = np.where(rows == queries.rows[:, None] - start, -1, rows + start)
        distances, ids = nearest(np.hstack([distances, found]), np.hstack([ids, rows]), width)
    return distances, ids


def write_exact(
    embeddings: Embeddings, queries: HeldOut, part: Shard, path: Path, fingerprint: str
) -> None:
    """Save the `exact_neighbors` of a part, signed."""
    distances, ids = exact_neighbors(embeddings, queries, part)
    with signed_write(path, fingerprint) as temporary, h5py.File(temporary, "w") as file:
        file["distances"], file["neighbors"] = distances, ids


def read_exact(paths: Sequence[Path], queries: int) -> np.ndarray:
    """Read the nearest rows over all parts, i64 [queries, max(RECALL_AT)]; -1 where missing.

    Raises:
        CorruptFileError: a file is of other queries, as after these were embedded again.
    """
    for path in paths:
        if len(map_dataset(path, "neighbors", "i", 2)) != queries:
            hint = f"Remove the folder {path.parent}, then run build_index again"
            raise CorruptFileError(path, "holds neighbors of other held-out queries", hint)
    distances = np.hstack([map_dataset(path, "distances") for path in paths])
    ids = np.hstack([map_dataset(path, "neighbors") for path in paths])
    return nearest(distances, ids, max(RECALL_AT))[1]


class RecallMeasure:
    """Measures an index by the exact neighbors of held-out queries.

    Args:
        index: A Faiss index, or a PartedIndex.
        queries: The queries.
        exact: Their exact neighbors, from `read_exact`.
        embeddings: The database's vectors, for true distances.
        rescore: Whether the best of NUM_RESCORED candidates are taken by their true distances.
        list_order: Whether it is searched in list order, which it must support.
    """

    def __init__(
        self,
        index: Any,
        queries: HeldOut,
        exact: np.ndarray,
        embeddings: Embeddings,
        rescore: bool = False,
        list_order: bool = False,
    ) -> None:
        self._index, self._queries, self._embeddings = index, queries, embeddings
        self._searched = ListOrderSearch(index) if list_order else index
        self._rescore = rescore
        width = int((exact >= 0).all(axis=0).sum())
        self._ks = [k for k in RECALL_AT if k <= width] or [max(width, 1)]
        self._exact = self._distances(exact)
        self._rounding = rounding_of(queries.vectors, self._neighbors(exact[:, :1])[:, 0])

    def __call__(self, nprobe: int | None, ef_search: int | None) -> Recall:
        """Measure the recall with this breadth of search."""
        set_search_breadth(self._index, nprobe, ef_search)
        wanted = NUM_RESCORED if self._rescore else max(self._ks)
        _, found = search(self._searched, self._queries.vectors, wanted + 1)
        found = self._distances(without(found, self._queries.rows))
        if self._rescore:
            found = np.sort(found, axis=1)
        at = {k: recall_at(k, found, self._exact, self._rounding) for k in self._ks}
        held_out = int((self._queries.rows < 0).sum())
        decisive = DECISIVE if DECISIVE in at else min(at)
        error = _standard_error(*_hits(decisive, found, self._exact, self._rounding))
        return Recall(at, len(found), held_out, nprobe, ef_search, error)

    def _neighbors(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of rows [n, k], f32 [n, k, dimension]; arbitrary where an id is missing."""
        rows = self._embeddings.rows(np.maximum(ids, 0).ravel())
        return rows.reshape(*ids.shape, -1)

    def _distances(self, ids: np.ndarray) -> np.ndarray:
        """True distances of the queries to rows [n, k]."""
        parts = [slice(first, first + _GATHERED) for first in range(0, len(ids), _GATHERED)]
        vectors = self._queries.vectors
        return np.concatenate(
            [squared_distances(vectors[p], self._neighbors(ids[p]), ids[p]) for p in parts]
        )


def tune(
    measure: Measure,
    lists: int | None,
    graph: bool,
    target: float,
    nprobe: int | None = None,
    ef_search: int | None = None,
    in_list_order: Measure | None = None,
) -> Recall:
    """Find the narrowest search that reaches `target`, or the broadest if none does.

    nprobe is doubled until recall@2 is reached, then bisected within the last step. The recall of
    other queries is lower half of the time, so a standard error is added, unless this takes more
    than `_MARGIN` times the lists. Then efSearch is reduced as long as the recall holds. Given
    values are not changed.

    Args:
        measure: Measures the index with some nprobe and efSearch.
        lists: Number of lists, if it has any.
        graph: Whether it has a graph.
        target: Target recall@2.
        nprobe: Lists to search.
        ef_search: Breadth of the graph search.
        in_list_order: Measures a search of the nearest lists, which chooses nprobe.
    """
    if lists is None:
        return _narrow_graph(measure, None, target, ef_search) if graph else measure(None, None)

    def breadth(probes: int) -> int | None:
        return (ef_search or max(256, 2 * probes)) if graph else None

    def of_lists(probes: int) -> Recall:
        return (in_list_order or measure)(probes, breadth(probes))

    found = of_lists(nprobe) if nprobe else _narrowest(of_lists, lists, target)
    if not graph:
        return replace(found, in_list_order=found.decisive) if in_list_order else found
    result = _narrow_graph(measure, found.nprobe, min(target, found.decisive), ef_search)
    if in_list_order:
        again = in_list_order(result.nprobe, result.ef_search)
        result = replace(result, in_list_order=again.decisive)
    return result


def _narrowest(measure: Callable[[int], Recall], lists: int, target: float) -> Recall:
    """The fewest lists that reach the target, with a margin; see `tune`."""
    low, result = 0, measure(1)
    while result.decisive < target and (probes := result.nprobe or lists) < lists:
        low, result = probes, measure(min(2 * probes, lists))
    result = _bisected(measure, low, result, target)
    safe, probes = min(1.0, target + result.error), result.nprobe or lists
    widest = min(math.floor(_MARGIN * probes), lists)
    if target <= result.decisive < safe and widest > probes:
        wide = measure(widest)
        if wide.decisive >= safe:
            return _bisected(measure, probes, wide, safe)
    return result


def _bisected(measure: Callable[[int], Recall], low: int, result: Recall, target: float) -> Recall:
    """The fewest lists, more than `low`, that reach the target, if `result` does."""
    high = result.nprobe or low
    while result.decisive >= target and high - low > max(1, low // _STEPS):
        middle = (low + high) // 2
        narrower = measure(middle)
        if narrower.decisive >= target:
            result, high = narrower, middle
        else:
            low = middle
    return result


def tuned_probes(needed: int, lists: int) -> int:
    """The number of lists that `tune` ends with if so many reach the target.

    >>> [tuned_probes(needed, 4096) for needed in (1, 5, 71, 200, 4000)]
    [1, 5, 72, 200, 4096]
    """

    def measure(nprobe: int | None, ef_search: int | None) -> Recall:
        return Recall({DECISIVE: float((nprobe or 0) >= needed)}, 1, 0, nprobe, ef_search)

    return tune(measure, lists, False, 1.0).nprobe or lists


def with_margin(needed: int, safe: int) -> int:
    """The number of lists that `tune` ends with if one target needs so many, and a safe one others.

    >>> with_margin(100, 140), with_margin(100, 160)
    (140, 100)
    """
    return safe if safe <= math.floor(_MARGIN * needed) else needed


def _narrow_graph(
    measure: Measure, nprobe: int | None, target: float, ef_search: int | None
) -> Recall:
    """Find the smallest efSearch, a power of two, that reaches the target; if none does, the
    smallest that is as good as the best."""
    if ef_search is not None:
        return measure(nprobe, ef_search)
    ef_search, tried = 16, list[Recall]()
    most = max(_BROADEST_GRAPH, 2 * (nprobe or 0))
    while ef_search <= most:
        tried.append(measure(nprobe, ef_search))
        if tried[-1].decisive >= target:
            return tried[-1]
        ef_search *= 2
    enough = max(recall.decisive for recall in tried) - _CLOSE
    return next(recall for recall in tried if recall.decisive >= enough)


def measure_recall(
    index: Any,
    embeddings: Embeddings,
    queries: HeldOut,
    nprobe: int | None = None,
    ef_search: int | None = None,
    target: float = 0.95,
) -> Recall:
    """Compare with exact search in this process, and choose the breadth unless given."""
    _, exact = exact_neighbors(embeddings, queries, Shard(0, len(embeddings), Path()))
    measure = RecallMeasure(index, queries, exact, embeddings)
    in_order = None
    if supports_list_order(index):
        in_order = RecallMeasure(index, queries, exact, embeddings, list_order=True)
    return tune(measure, num_lists(index), has_graph(index), target, nprobe, ef_search, in_order)


def without(ids: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Drop each query's own row, or the last candidate if it is not among them."""
    keep = ids != own[:, None]
    keep[own < 0] = True
    keep[keep.all(axis=1), -1] = False
    return ids[keep].reshape(len(ids), -1)


def squared_distances(queries: np.ndarray, neighbors: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """True squared distances f64 [n, k] of queries [n, d] to neighbors [n, k, d].

    Infinite where an id [n, k] is missing (negative).
    """
    result = np.empty(ids.shape)
    for query, near, row in zip(queries.astype(np.float64), neighbors, result, strict=True):
        row[:] = np.square(near.astype(np.float64) - query).sum(-1)
    return np.where(ids < 0, np.inf, result)


def rounding_of(queries: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """Bound the error of squared distances in single precision, f64 [n].

    Args:
        queries: Vectors [n, d].
        neighbors: One near vector [n, d] of each.
    """
    lengths = [np.square(rows.astype(np.float64)).sum(-1) for rows in (queries, neighbors)]
    return _ROUNDING * queries.shape[1] ** 0.5 * (lengths[0] + lengths[1])


def recall_at(
    k: int, found: np.ndarray, exact: np.ndarray, rounding: np.ndarray | float = 0.0
) -> float:
    """Fraction of the k nearest neighbors that were found.

    Measured by distance, as in ann-benchmarks: a row counts if it is no farther away than the k-th
    exact neighbor. Among rows at the same distance, exact search may return any of them, too.
    Within rounding, the processor decides which row is nearer.

    Args:
        k: Number of neighbors.
        found: True distances of the rows found [n, at least k], in any order, infinite where
            missing.
        exact: True distances of the exact neighbors [n, at least k], in the same form.
        rounding: Differences to ignore, per query.
    """
    hits, there = _hits(k, found, exact, rounding)
    return float(hits.sum() / there.sum()) if there.any() else 1.0


def _hits(
    k: int, found: np.ndarray, exact: np.ndarray, rounding: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """How many of the k nearest neighbors were found, and how many there are, of each query."""
    there = np.isfinite(exact[:, :k]).sum(axis=1)
    farthest = np.where(np.isfinite(exact[:, :k]), exact[:, :k], -np.inf).max(axis=1, initial=0.0)
    hits = (found[:, :k] <= (farthest + rounding)[:, None]).sum(axis=1)
    return np.minimum(hits, there), there


def _standard_error(hits: np.ndarray, there: np.ndarray) -> float:
    """Standard error of the mean recall over queries; 0 of a single one."""
    shares = hits[there > 0] / there[there > 0]
    return float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0
