"""Rates of training, filling and searching a large uncompressed index, measured with few vectors.

They are put into an index whose lists are as long as the large one's, and which is searched by as
many queries per list. All of it runs on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.choice import automatic_string
from retro_mcore.retrieval.index.embeddings import Embeddings, HeldOut
from retro_mcore.retrieval.index.faiss_search import search, set_search_breadth
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.library import faiss_threads
from retro_mcore.retrieval.index.list_order import TOGETHER, ListOrderSearch, list_order_pays
from retro_mcore.retrieval.index.recall import measure_recall
from retro_mcore.retrieval.index.training import has_graph, innermost, make_index, train

#: Lists that the vectors must fill: the number of lists to visit is fitted on these and on half.
FEWEST_LISTS = 16
_RECALL_QUERIES = 400
_PLACED = 2048
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
    vectors: np.ndarray, count: int, lists: int, recall: float, k: int, narrow: int
) -> IndexRates:
    """Measure the automatic, uncompressed index of a large database with some of its vectors.

    Args:
        vectors: Evenly spaced vectors of the database, f32 [n, dimension]. They must fill
            `FEWEST_LISTS` lists as long as the large index's.
        count: Vectors of the large database.
        lists: Its lists; 0: all vectors are searched one by one.
        recall: Target recall@2.
        k: Candidates per chunk.
        narrow: Candidates per chunk where the search is in list order.
    """
    if not lists:
        return _without_lists(vectors, count, k)
    probes, index = _expected_probes(vectors, count, lists, recall)
    added, placed = _placing(vectors, lists, probes)
    in_order = list_order_pays(automatic_string("Flat", lists), probes)
    share = _small_lists(len(vectors), count, lists) / lists
    together = round(min(TOGETHER, count) * share) if in_order else _RECALL_QUERIES
    scanned = _scanning(index, vectors, probes, narrow if in_order else k, together, in_order)
    return IndexRates(_training(vectors, lists), added, 1 / (placed + scanned), probes)


def _without_lists(vectors: np.ndarray, count: int, k: int) -> IndexRates:
    """An exhaustive search takes as long as there are vectors."""
    index = make_index("Flat", vectors.shape[1])
    added = len(vectors) / _seconds(lambda: index.add(vectors))
    queries = vectors[:: max(1, len(vectors) // _RECALL_QUERIES)]
    searched = _seconds(lambda: search(index, queries, k)) / len(queries)
    return IndexRates(None, added, len(vectors) / count / searched, None)


def _small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


def _filled(vectors: np.ndarray, lists: int) -> Any:
    """An index of few lists."""
    index = make_index(f"IVF{lists},Flat", vectors.shape[1])
    train(index, vectors)
    add_rows(index, vectors, np.arange(len(vectors)))
    return index


def _expected_probes(vectors: np.ndarray, count: int, lists: int, recall: float) -> tuple[int, Any]:
    """Lists to visit for the recall, a power of the number of lists, which are equally long.

    Also returns an index of all `vectors`, with lists of that length.
    """
    sizes, needed, index = [], [], None
    for part in (4, 2, 1):
        some = vectors[::part]
        few = _small_lists(len(some), count, lists)
        if few < FEWEST_LISTS // 2 and part > 1:
            continue
        queries = np.linspace(0, len(some) - 1, min(_RECALL_QUERIES, len(some))).astype(np.int64)
        held_out = HeldOut(some[queries], queries)
        index = _filled(some, few)
        measured = measure_recall(index, _InMemory(some), held_out, target=recall)
        sizes.append(few)
        needed.append(measured.nprobe or 1)
    slope = 0.0
    if sizes[-1] > sizes[0]:
        slope = min(max(float(np.polyfit(np.log(sizes), np.log(needed), 1)[0]), 0.0), 1.0)
    return max(1, min(lists, round(needed[-1] * (lists / sizes[-1]) ** slope))), index


def _training(vectors: np.ndarray, lists: int) -> float:
    """Training vectors per second; k-means compares each with all centroids."""
    few = max(1, min(lists, len(vectors) // 4))
    index = make_index(f"IVF{few},Flat", vectors.shape[1])
    return len(vectors) * few / lists / _seconds(lambda: train(index, vectors))


def _placing(vectors: np.ndarray, lists: int, probes: int) -> tuple[float, float]:
    """Vectors added per second, and seconds in which the lists that a chunk visits are found.

    Centers near the vectors stand in for those of training.
    """
    index = make_index(automatic_string("Flat", lists), vectors.shape[1])
    random = np.random.default_rng(0)
    centers = vectors[random.integers(0, len(vectors), lists)]
    centers = centers + 0.1 * np.std(vectors) * random.standard_normal(centers.shape, np.float32)
    ivf = innermost(index)
    with faiss_threads(1):
        ivf.quantizer.add(centers.astype(np.float32))
    ivf.is_trained = True
    added = len(vectors) / _seconds(lambda: add_rows(index, vectors, np.arange(len(vectors))))
    set_search_breadth(index, probes, max(16, 2 * probes) if has_graph(index) else None)
    queries = vectors[:: max(1, len(vectors) // _PLACED)]
    with faiss_threads(1):
        seconds = _seconds(lambda: ivf.quantizer.search(queries, probes))
    return added, seconds / len(queries)


def _scanning(
    index: Any, vectors: np.ndarray, probes: int, k: int, together: int, in_order: bool
) -> float:
    """Processor seconds per chunk in which lists are scanned, for so many chunks together."""
    visited, together = min(probes, innermost(index).nlist), max(together, 1)
    set_search_breadth(index, visited, None)
    searched: Any = ListOrderSearch(index) if in_order else index
    taken = []
    for start in range(_ROUNDS):
        queries = vectors[np.arange(start, start + together * _ROUNDS, _ROUNDS) % len(vectors)]
        taken.append(_seconds(partial(search, searched, queries, k)) / together)
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
