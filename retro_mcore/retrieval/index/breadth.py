"""How many lists a search of a large index must visit, expected from some of its vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.faiss_search import search
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.recall import DECISIVE, without
from retro_mcore.retrieval.index.training import innermost, make_index, train

#: Lists that the vectors must fill: the law is fitted on these, half, a quarter and an eighth.
FEWEST_LISTS = 16
_FEWEST_FITTED = 4
_QUERIES = 1000


def expected_probes(vectors: np.ndarray, count: int, lists: int, recall: float) -> tuple[int, Any]:
    """Lists to visit for a recall@2 in a large, uncompressed index.

    In lists of the same length the number p that a query must visit grows with the number of lists
    L, ever more slowly: fewer of them lie at the edge of the data. 1/p = a + b/sqrt(L) is fitted on
    all vectors, half, a quarter and an eighth of them, in lists as long as the large index's. The
    square root is empirical (docs/decisions/0015-index-in-parts.md).

    Args:
        vectors: Evenly spaced vectors of the database, f32 [n, dimension]. They must fill
            `FEWEST_LISTS` such lists.
        count: Vectors of the large database.
        lists: Its lists.
        recall: Target recall@2.

    Returns:
        The number, and a trained, empty index of small lists for `vectors`.
    """
    sizes, needed, index = [], [], None
    for part in (8, 4, 2, 1):
        some = vectors[::part]
        few = small_lists(len(some), count, lists)
        if few < _FEWEST_FITTED and part > 1:
            continue
        index = make_index(f"IVF{few},Flat", some.shape[1])
        train(index, some)
        sizes.append(few)
        needed.append(_needed_probes(index, some, recall))
    return min(lists, _extrapolated(np.array(sizes), np.array(needed), lists)), index


def small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


def _needed_probes(index: Any, vectors: np.ndarray, recall: float) -> int:
    """Lists among which this share of the nearest vectors is, of some of the vectors."""
    rows = np.linspace(0, len(vectors) - 1, min(_QUERIES, len(vectors))).astype(np.int64)
    flat = faiss_library().IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    width = min(DECISIVE + 1, len(vectors))
    nearest = without(search(flat, vectors[rows], width)[1], rows)[:, : width - 1]
    centers = innermost(index).quantizer
    homes = search(centers, vectors[nearest.reshape(-1)], 1)[1].reshape(*nearest.shape, 1)
    in_turn = search(centers, vectors[rows], int(innermost(index).nlist))[1]
    ranks = 1 + (in_turn[:, None] == homes).argmax(axis=2)
    return int(np.quantile(ranks, recall, method="inverted_cdf"))


def _extrapolated(sizes: np.ndarray, needed: np.ndarray, lists: int) -> int:
    """p of 1/p = a + b/sqrt(L) at L = `lists`, with the least squares of relative errors; a >= 0.

    >>> _extrapolated(np.array([82, 164, 328, 655]), np.array([16, 18, 28, 32]), 4096)
    52
    >>> _extrapolated(np.array([16, 31, 62, 125]), np.array([13, 22, 42, 75]), 1000)
    212
    >>> _extrapolated(np.array([10, 20]), np.array([9, 8]), 1000)
    9
    """
    ones = np.ones(len(sizes))
    columns = np.stack((needed, needed / np.sqrt(sizes)), axis=1)
    constant, slope = np.linalg.lstsq(columns, ones, rcond=None)[0] if len(sizes) > 1 else (0, 0)
    if slope < 0:
        return int(needed.max())
    if constant <= 0:  # at these sizes it grows faster than the root
        return round(needed[-1] * math.sqrt(lists / sizes[-1]))
    return max(int(needed[-1]), round(1 / (constant + slope / math.sqrt(lists))))
