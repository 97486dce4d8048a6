"""Rates of training, filling and searching a large index, measured with few vectors.

They are put into an index whose lists are as long as the large one's, and which is searched by as
many queries per list. All of it runs on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.breadth import sample_breadth, small_lists
from retro_mcore.retrieval.index.choice import automatic_string, codes_recall
from retro_mcore.retrieval.index.embeddings import num_queries
from retro_mcore.retrieval.index.faiss_search import search, set_search_breadth
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.library import faiss_library, faiss_threads
from retro_mcore.retrieval.index.list_order import (
    ListOrderSearch,
    choose_lists,
    enough_queries,
    list_order_pays,
    supports_list_order,
)
from retro_mcore.retrieval.index.packing import unpacked
from retro_mcore.retrieval.index.recall import RECALL_AT, tuned_probes, with_margin
from retro_mcore.retrieval.index.training import has_graph, innermost, make_index, train

_RECALL_QUERIES, _CODED = 400, 16_384
_PLACED, _PLACED_IN_ORDER = 2048, 16_384
_ROUNDS = 3
#: Searches of full breadth that `tune` takes for nprobe: doubling takes about 2, bisection 4, the
#: margin 5, the last measurement 1. And for efSearch.
_TUNING_SEARCHES, _TUNING_GRAPH = 12, 4


@dataclass(frozen=True)
class IndexRates:
    """Rates per processor second.

    Attributes:
        trained: Training vectors, with the lists of the large index; None: nothing to train.
        added: Vectors added, and compared with the held-out queries; with what tuning takes.
        queried: Chunks searched.
        nprobe: Lists that a search of the large index visits, as expected; None without lists.
    """

    trained: float | None
    added: float
    queried: float
    nprobe: int | None


def measure_index_rates(
    vectors: np.ndarray,
    count: int,
    lists: int,
    recall: float,
    k: int,
    narrow: int,
    code: str = "Flat",
    documents: np.ndarray | None = None,
) -> IndexRates:
    """Measure the automatic index of a large database with some of its vectors.

    Args:
        vectors: Vectors of some documents of the database, f32 [n, dimension]. They must fill
            `breadth.FEWEST_LISTS` lists as long as the large index's.
        count: Vectors of the large database.
        lists: Its lists; 0: all vectors are searched one by one.
        recall: Target recall@2.
        k: Candidates per chunk.
        narrow: Candidates per chunk where the search is in list order.
        code: Last part of the index's factory string.
        documents: Number of each vector's document, i64 [n]; None: each is of its own.
    """
    if not lists:
        return _without_lists(vectors, count, k, code)
    of_codes = codes_recall(code, vectors[:: max(1, len(vectors) // _CODED)], count)
    breadth, queries = sample_breadth(vectors, count, lists, documents), num_queries(count)
    index, error = breadth.index, math.sqrt(recall * (1 - recall) / queries)
    wanted = [min(1.0, target / of_codes) for target in (recall, recall + error)]
    probes = with_margin(*(tuned_probes(breadth.probes(target), lists) for target in wanted))
    few = small_lists(len(vectors), count, lists)
    if code != "Flat":
        index = make_index(f"IVF{few},{code}", vectors.shape[1])
        train(index, vectors)
    add_rows(index, vectors, np.arange(len(vectors)))
    string = automatic_string(code, lists)
    in_order = list_order_pays(string, probes)
    added, placed = _placing(vectors, string, lists, probes, in_order)
    # Farther lists would be scanned faster: they hold hardly any candidate.
    near = min(probes, math.ceil(breadth.needed(wanted[-1])[-1]))
    share = few * probes / (lists * near)  # as many queries per list as in the large index
    tuning = _tuning(index, vectors, near, queries, share if in_order else None) * probes / near
    added = 1 / (1 / added + _comparing(vectors, queries) + tuning / count)
    together = round(min(enough_queries(lists, probes), count) * share)
    together = together if in_order else _RECALL_QUERIES
    scanned = _scanning(index, vectors, near, narrow if in_order else k, together, in_order)
    scanned *= probes / near
    return IndexRates(_training(vectors, lists), added, 1 / (placed + scanned), probes)


def _without_lists(vectors: np.ndarray, count: int, k: int, code: str) -> IndexRates:
    """An exhaustive search takes as long as there are vectors."""
    index = make_index(code, vectors.shape[1])
    train(index, vectors)
    added = len(vectors) / _seconds(lambda: index.add(vectors))
    added = 1 / (1 / added + _comparing(vectors, num_queries(count)))
    queries = vectors[:: max(1, len(vectors) // _PLACED)]  # in blocks, as query_neighbors does
    blocks = ListOrderSearch(index) if supports_list_order(index) else index
    searched = _seconds(lambda: search(blocks, queries, k)) / len(queries)
    return IndexRates(None, added, len(vectors) / count / searched, None)


def _training(vectors: np.ndarray, lists: int) -> float:
    """Training vectors per second; k-means compares each with all centroids."""
    few = max(1, min(lists, len(vectors) // 4))
    index = make_index(f"IVF{few},Flat", vectors.shape[1])
    return len(vectors) * few / lists / _seconds(lambda: train(index, vectors))


def _placing(
    vectors: np.ndarray, string: str, lists: int, probes: int, in_order: bool
) -> tuple[float, float]:
    """Vectors added per second, and seconds in which the lists that a chunk visits are found.

    Centers near the vectors stand in for those of training.
    """
    index = unpacked(make_index(string, vectors.shape[1]))
    random = np.random.default_rng(0)
    centers = vectors[random.integers(0, len(vectors), lists)]
    centers = centers + 0.1 * np.std(vectors) * random.standard_normal(centers.shape, np.float32)
    ivf = innermost(index)
    with faiss_threads(1):
        ivf.quantizer.add(centers.astype(np.float32))
        ivf.train(vectors)  # its codes
    added = len(vectors) / _seconds(lambda: add_rows(index, vectors, np.arange(len(vectors))))
    set_search_breadth(index, probes, max(16, 2 * probes) if has_graph(index) else None)
    queries = vectors[:: max(1, len(vectors) // (_PLACED_IN_ORDER if in_order else _PLACED))]
    with faiss_threads(1):
        if in_order:
            seconds = _seconds(lambda: choose_lists(index, ivf, queries))
        else:
            seconds = _seconds(lambda: ivf.quantizer.search(queries, probes))
    return added, seconds / len(queries)


def _comparing(vectors: np.ndarray, queries: int) -> float:
    """Seconds per vector in which it is compared with all held-out queries."""
    flat = faiss_library().IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    few = vectors[:queries]
    return (
        _seconds(lambda: search(flat, few, max(RECALL_AT) + 1)) / len(vectors) * queries / len(few)
    )


def _tuning(
    index: Any, vectors: np.ndarray, probes: int, queries: int, share: float | None
) -> float:
    """Seconds in which the held-out queries are searched until the breadth is found.

    Args:
        index: A small index of the vectors.
        vectors: The vectors.
        probes: Lists to visit in it.
        queries: Held-out queries.
        share: Share of them with which its lists have as many queries as those of the large
            index; None if searches are not in list order.
    """
    k = max(RECALL_AT) + 1
    once = _scanning(index, vectors, probes, k, _RECALL_QUERIES, False)
    if share is None:
        return (_TUNING_SEARCHES + _TUNING_GRAPH) * queries * once
    in_order = _scanning(index, vectors, probes, k, round(queries * share), True)
    return queries * (_TUNING_SEARCHES * in_order + _TUNING_GRAPH * once)


def _scanning(
    index: Any, vectors: np.ndarray, probes: int, k: int, together: int, in_order: bool
) -> float:
    """Processor seconds per chunk in which lists are scanned, for so many chunks together."""
    together = max(together, 1)
    set_search_breadth(index, probes, None)
    searched: Any = ListOrderSearch(index) if in_order else index
    taken = []
    for start in range(_ROUNDS):
        queries = vectors[np.arange(start, start + together * _ROUNDS, _ROUNDS) % len(vectors)]
        taken.append(_seconds(partial(search, searched, queries, k)) / together)
    return sorted(taken)[_ROUNDS // 2]


def _seconds(action: Callable[[], Any]) -> float:
    """Processor seconds of all threads."""
    start = time.process_time()
    action()
    return max(time.process_time() - start, 1e-6)
