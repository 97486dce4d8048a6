"""Rates of training, filling and searching a large index, measured with a small part of it.

The small index has lists as long as the large one's, and is searched by as many queries per list.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.embeddings import Embeddings, HeldOut
from retro_mcore.retrieval.index.faiss_search import search, set_search_breadth
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.library import faiss_threads
from retro_mcore.retrieval.index.list_order import TOGETHER, ListOrderSearch, list_order_pays
from retro_mcore.retrieval.index.recall import measure_recall
from retro_mcore.retrieval.index.training import has_graph, innermost, make_index, num_lists, train

_LISTS = re.compile(r"IVF\d+[kM]?(_HNSW\d+)?")
_RECALL_QUERIES = 400
#: Lists that the vectors must fill for an estimate of how many lists a search visits.
FEWEST_LISTS = 8
_ROUNDS = 3


@dataclass(frozen=True)
class IndexRates:
    """Rates per processor second.

    Attributes:
        trained: Training vectors, with the lists of the large index; None: nothing to train.
        added: Vectors added.
        queried: Chunks searched.
        nprobe: Lists that a search of the large index visits, as expected; None without lists.
    """

    trained: float | None
    added: float
    queried: float
    nprobe: int | None


def measure_index_rates(
    vectors: np.ndarray, count: int, index_string: str, recall: float, k: int, narrow: int
) -> IndexRates:
    """Measure the index of a large database with some of its vectors.

    Args:
        vectors: Evenly spaced vectors of the database, f32 [n, dimension].
        count: Vectors of the large database.
        index_string: Faiss factory string of its index.
        recall: Target recall@2.
        k: Candidates per chunk.
        narrow: Candidates per chunk where the search is in list order.
    """
    planned = make_index(index_string, vectors.shape[1])
    lists = num_lists(planned)
    if lists is None:
        return _without_lists(planned, vectors, count, k)
    few = _small_lists(len(vectors), count, lists)
    probes = _expected_probes(vectors, count, lists, index_string, recall)
    trained, added, placed = _placing(planned, vectors, lists, probes)
    small = _index_of(index_string, few, vectors)
    in_order = list_order_pays(index_string, probes)
    k = min(k, narrow) if in_order else k
    scanned = _scanning(small, vectors, few / lists, probes, k, in_order)
    return IndexRates(trained, added, 1 / (placed + scanned), probes)


def _without_lists(index: Any, vectors: np.ndarray, count: int, k: int) -> IndexRates:
    """An exhaustive search takes as long as there are vectors."""
    training = None
    if not index.is_trained:
        training = len(vectors) / _seconds(lambda: train(index, vectors))
    added = len(vectors) / _seconds(lambda: index.add(vectors))
    queries = vectors[:: max(1, len(vectors) // _RECALL_QUERIES)]
    searched = _seconds(lambda: search(index, queries, k)) / len(queries)
    growth = 1.0 if has_graph(index) else count / len(vectors)
    return IndexRates(training, added, 1 / (searched * growth), None)


def _small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


def _index_of(index_string: str, lists: int, vectors: np.ndarray) -> Any:
    """The planned index with fewer lists, filled."""
    index = make_index(_LISTS.sub(f"IVF{lists}", index_string), vectors.shape[1])
    train(index, vectors)
    add_rows(index, vectors, np.arange(len(vectors)))
    return index


def _expected_probes(
    vectors: np.ndarray, count: int, lists: int, index_string: str, recall: float
) -> int:
    """Lists to visit for the recall: a power of the number of lists, which are equally long."""
    sizes, needed = [], []
    for part in (4, 2, 1):
        some = vectors[::part]
        few = _small_lists(len(some), count, lists)
        if few < FEWEST_LISTS and part > 1:
            continue
        queries = np.linspace(0, len(some) - 1, min(_RECALL_QUERIES, len(some))).astype(np.int64)
        held_out = HeldOut(some[queries], queries)
        index = _index_of(index_string, few, some)
        measured = measure_recall(index, _InMemory(some), held_out, target=recall)
        sizes.append(few)
        needed.append(measured.nprobe or 1)
    slope = 0.0
    if len(sizes) > 1:
        slope = min(max(float(np.polyfit(np.log(sizes), np.log(needed), 1)[0]), 0.0), 1.0)
    return max(1, min(lists, round(needed[-1] * (lists / sizes[-1]) ** slope)))


def _placing(
    index: Any, vectors: np.ndarray, lists: int, probes: int
) -> tuple[float, float, float]:
    """Training and adding, vectors per second, and seconds in which a chunk's lists are found."""
    most = len(vectors) // 4
    fewer = min(1.0, most / lists)
    if fewer < 1:  # k-means compares each vector with all centroids
        string = f"IVF{max(1, most)}" + ("_HNSW32" if has_graph(index) else "")
        index = make_index(f"{string},Flat", vectors.shape[1])
    trained = len(vectors) * fewer / _seconds(lambda: train(index, vectors))
    added = len(vectors) / _seconds(lambda: add_rows(index, vectors, np.arange(len(vectors))))
    ivf = innermost(index)
    set_search_breadth(index, probes, max(16, 2 * probes) if has_graph(index) else None)
    queries = vectors[:: max(1, len(vectors) // 2048)]
    with faiss_threads(1):
        seconds = _seconds(lambda: ivf.quantizer.search(queries, min(probes, ivf.nlist)))
    return trained, added, seconds / len(queries)


def _scanning(
    index: Any, vectors: np.ndarray, share: float, probes: int, k: int, in_order: bool
) -> float:
    """Processor seconds per chunk in which lists are scanned, with a share of the lists."""
    visited = min(probes, innermost(index).nlist)
    set_search_breadth(index, visited, None)
    together = max(1, round(TOGETHER * share)) if in_order else _RECALL_QUERIES
    searched: Any = ListOrderSearch(index) if in_order else index
    taken = []
    for start in range(_ROUNDS):
        queries = vectors[np.arange(start, start + together * _ROUNDS, _ROUNDS) % len(vectors)]
        taken.append(_seconds(lambda queries=queries: search(searched, queries, k)) / together)
    return sorted(taken)[_ROUNDS // 2] * probes / visited


def _seconds(action: Callable[[], Any]) -> float:
    """Processor seconds of all threads."""
    start = time.process_time()
    action()
    return max(time.process_time() - start, 1e-6)


class _InMemory(Embeddings):
    """Vectors in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._vectors.shape[1])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Read rows in any order, f32 [n, dimension]."""
        return self._vectors[ids]
