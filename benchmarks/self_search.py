"""What a search of all vectors in their own index could gain from knowing each one's own list.

    python -m benchmarks.self_search                       # 100,000 vectors, two minutes

- Queries in the order of their own lists instead of the order of files: queries per processor
  second, and bytes read if 16 batches are searched and no list stays in memory between them.
- Each pair of lists scored once for both directions: products saved, and what they take now.

See docs/decisions/0015-index-in-parts.md.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.all_knn import Options as KnnOptions
from benchmarks.all_knn import make_index, make_vectors, processor
from retro_mcore.cli.command import run_command
from retro_mcore.retrieval.index import rough_scores
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_order import ListOrderSearch, choose_lists
from retro_mcore.retrieval.index.list_scores import InvertedLists
from retro_mcore.retrieval.index.training import innermost


@dataclass
class Options:
    """Measure what a set against itself could gain."""

    vectors: int = 100_000
    """Vectors of the index, and queries."""
    dimension: int = 256
    """Dimension of a vector."""
    lists: int = 1024
    """Inverted lists."""
    nprobe: int = 32
    """Lists that each query visits."""
    k: int = 52
    """Neighbors of each query."""
    batches: int = 16
    """Batches of queries."""
    searched: int = 2
    """Batches that are searched to measure processor time, evenly spaced."""


def chain(centers: np.ndarray) -> np.ndarray:
    """Order of centers by halving them again and again along their widest direction."""

    def halve(some: np.ndarray) -> list[int]:
        if len(some) < 3:
            return some.tolist()
        rows = centers[some] - centers[some].mean(axis=0)
        along = rows @ np.linalg.svd(rows, full_matrices=False)[2][0]
        order, half = some[np.argsort(along)], len(some) // 2
        return halve(order[:half]) + halve(order[half:])

    return np.array(halve(np.arange(len(centers))))


def batches_read(visited: np.ndarray, sizes: np.ndarray, order: np.ndarray, count: int) -> float:
    """Bytes of the lists that `count` batches of queries visit ÷ bytes of the index."""
    parts = np.array_split(visited[order], count)
    return float(sum(sizes[np.unique(part)].sum() for part in parts) / sizes.sum())


def saved_products(visited: np.ndarray, own: np.ndarray, sizes: np.ndarray) -> float:
    """Share of products of query and vector that the other direction has made already."""
    pairs = np.bincount(
        (own[:, None] * len(sizes) + visited).ravel(), minlength=len(sizes) ** 2
    ).reshape(len(sizes), -1)
    twice = (pairs * pairs.T).sum() / 2  # a list against itself: one half of the square
    return float(twice / (pairs @ sizes).sum())


def timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds of an action, those of its products, and its result."""
    taken = []

    def counted(product: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            result = product(*arguments)
            taken.append(time.thread_time() - start)
            return result

        return run

    make_exact = rough_scores.VectorScores._make_exact

    def exact(self: Any) -> Any:
        product, longest = make_exact(self)
        return counted(product), longest

    with (
        patch.object(rough_scores, "int8_product", counted(rough_scores.int8_product)),
        patch.object(rough_scores.VectorScores, "_make_exact", exact),
    ):
        start = time.process_time()
        result = action()
        return time.process_time() - start, sum(taken), result


def measure(options: Options) -> dict[str, Any]:
    """Measure, print and return all figures."""
    faiss_library().omp_set_num_threads(1)
    vectors = make_vectors(options.vectors, options.dimension)
    sizes = {name: getattr(options, name) for name in ("vectors", "dimension", "lists", "nprobe")}
    index = make_index(vectors, KnnOptions(**sizes), "Flat")
    ivf, search = innermost(index), ListOrderSearch(index)
    visited = choose_lists(index, ivf, vectors)[1]
    lengths = np.array([InvertedLists(ivf).size(number) for number in range(ivf.nlist)])
    own, count = visited[:, 0], options.batches
    places = np.argsort(chain(ivf.quantizer.reconstruct_n(0, ivf.nlist)))
    orders = {
        "files": np.arange(len(vectors)),
        "lists": np.argsort(own, kind="stable"),
        "neighboring lists": np.argsort(places[own], kind="stable"),
    }
    result: dict[str, Any] = {
        "processor": processor(),
        "bytes read": {
            name: batches_read(visited, lengths, order, count) for name, order in orders.items()
        },
        "products saved": saved_products(visited, own, lengths),
    }
    some = range(count // options.searched // 2, count, count // options.searched)
    rates: dict[str, list[float]] = {name: [] for name in orders}
    shares = []
    for number in some:
        for name, order in orders.items():
            rows = np.array_split(order, count)[number]
            seconds, products, _ = timed(partial(search.search, vectors[rows], options.k))
            rates[name].append(len(rows) / seconds)
            shares.append(products / seconds)
    result["queries per processor second"] = {
        name: float(np.mean(rate)) for name, rate in rates.items()
    }
    rows = orders["files"]
    seconds, products, everything = timed(lambda: search.search(vectors, options.k))
    result["queries per processor second"]["all at once"] = len(rows) / seconds
    result["products' share of the time"] = {
        "batches": float(np.mean(shares)),
        "all at once": products / seconds,
    }
    order = orders["neighboring lists"]
    sorted_ = search.search(vectors[order], options.k)
    result["equal"] = all(
        np.array_equal(found, rows_[order])
        for found, rows_ in zip(sorted_, everything, strict=True)
    )
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count() or 1)  # one thread
    sys.exit(run_command(Options, measure))
