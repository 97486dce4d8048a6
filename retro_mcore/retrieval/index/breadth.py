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
_QUERIES = 4000
_POWER = 0.75
#: Where nearly all lists are needed, so many count as needed.
_LARGEST_SHARE = 0.95


def expected_probes(vectors: np.ndarray, count: int, lists: int, recall: float) -> tuple[int, Any]:
    """Lists to visit for a recall@2 in a large, uncompressed index.

    In lists of the same length the number p that a query must visit grows with the number of lists
    L, ever more slowly. Few lists set a bound of their own: q = p / (1 - p/L) is what p would be
    among any number of them. 1/q = a + b L^-.75 is fitted on all vectors, and on halves, quarters
    and eighths of them, in lists as long as the large index's. Both forms are empirical
    (docs/decisions/0015-index-in-parts.md).

    Args:
        vectors: Evenly spaced vectors of the database, f32 [n, dimension]. They must fill
            `FEWEST_LISTS` such lists.
        count: Vectors of the large database.
        lists: Its lists.
        recall: Target recall@2.

    Returns:
        The number, and a trained, empty index of small lists for `vectors`.
    """
    sizes: list[int] = []
    needed: list[float] = []
    index = None
    for parts in (8, 4, 2, 1):
        few = small_lists(len(vectors) // parts, count, lists)
        if few < _FEWEST_FITTED and parts > 1:
            continue
        found = []
        for first in range(parts):
            some = vectors[first::parts]
            index = make_index(f"IVF{few},Flat", some.shape[1])
            train(index, some)
            found.append(_needed_probes(index, some, recall, _QUERIES // parts))
        sizes.append(few)
        needed.append(float(np.mean(found)))
    return min(lists, _extrapolated(np.array(sizes), np.array(needed), lists)), index


def small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


def _needed_probes(index: Any, vectors: np.ndarray, recall: float, queries: int) -> float:
    """Lists among which this share of the nearest vectors is, of some of the vectors."""
    rows = np.linspace(0, len(vectors) - 1, min(queries, len(vectors))).astype(np.int64)
    flat = faiss_library().IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    width = min(DECISIVE + 1, len(vectors))
    nearest = without(search(flat, vectors[rows], width)[1], rows)[:, : width - 1]
    centers, lists = innermost(index).quantizer, int(innermost(index).nlist)
    homes = search(centers, vectors[nearest.reshape(-1)], 1)[1].reshape(*nearest.shape, 1)
    in_turn = search(centers, vectors[rows], lists)[1]
    ranks = (in_turn[:, None] == homes).argmax(axis=2)
    found = np.cumsum(np.bincount(ranks.reshape(-1), minlength=lists)) / ranks.size
    return float(np.interp(recall, np.r_[0, found], np.arange(lists + 1)))


def _extrapolated(sizes: np.ndarray, needed: np.ndarray, lists: int) -> int:
    """p at L = `lists`, by the least squares of relative errors of q; a >= 0.

    >>> _extrapolated(np.array([11, 22, 43, 87]), np.array([7, 12, 17, 27]), 8192)
    49
    >>> _extrapolated(np.array([66, 131, 262, 524]), np.array([42, 75, 136, 231]), 1000)
    362
    >>> _extrapolated(np.array([16, 32]), np.array([12, 28]), 1000)
    556
    >>> _extrapolated(np.array([10, 20]), np.array([9, 8]), 1000)
    9
    """
    shares = np.minimum(needed / sizes, _LARGEST_SHARE)
    unbounded = needed / (1 - shares)
    columns = np.stack((unbounded, unbounded * sizes**-_POWER), axis=1)
    fitted = len(sizes) > 1
    constant, slope = (
        np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0] if fitted else (0, 0)
    )
    if slope < 0:
        return int(needed.max())
    if constant <= 0:  # at these sizes it grows too fast for that
        found = unbounded[-1] * math.sqrt(lists / sizes[-1])
    else:
        found = 1 / (constant + slope * lists**-_POWER)
    return max(int(needed[-1]), round(found / (1 + found / lists)))
