"""How many lists a search of a large index must visit, expected from some of its vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.faiss_search import search
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.recall import DECISIVE
from retro_mcore.retrieval.index.training import innermost, make_index, train

#: Lists that the vectors must fill: the law is fitted on these, half, a quarter and an eighth.
FEWEST_LISTS = 16
_FEWEST_FITTED = 4
_QUERIES = 4000
_POWER = 0.6
#: Where nearly all lists are needed, so many count as needed.
_LARGEST_SHARE = 0.95
#: Candidates of a query, of which those of its own document are left out.
_CANDIDATES = 64


@dataclass(frozen=True)
class SampledBreadth:
    """Which lists hold the nearest vectors, in indexes of some vectors, for a large one.

    In lists of the same length the number p that a query must visit grows with the number of lists
    L, ever more slowly. Few lists set a bound of their own: q = p / (1 - p/L) is what p would be
    among any number of them. 1/q = a + b L^-.6 is fitted on all vectors, and on halves, quarters
    and eighths of them, in lists as long as the large index's. Both forms are empirical
    (docs/decisions/0015-index-in-parts.md).

    Attributes:
        lists: Lists of the large index.
        found: For each number of lists of a small index, recalls@2 by the number of visited lists,
            from 0 on, of each index of that size.
        index: A trained, empty index of small lists for all vectors.
    """

    lists: int
    found: dict[int, list[np.ndarray]]
    index: Any

    def needed(self, recall: float) -> np.ndarray:
        """Lists to visit for a recall@2 in each of the small indexes, the largest one last."""
        return np.array(
            [
                np.mean([np.interp(recall, curve, np.arange(few + 1)) for curve in curves])
                for few, curves in self.found.items()
            ]
        )

    def probes(self, recall: float) -> int:
        """Lists to visit for a recall@2 in the large, uncompressed index."""
        sizes = np.array(list(self.found))
        return min(self.lists, _extrapolated(sizes, self.needed(recall), self.lists))


def sample_breadth(
    vectors: np.ndarray, count: int, lists: int, documents: np.ndarray | None = None
) -> SampledBreadth:
    """Measure small indexes of some vectors of a large database.

    Args:
        vectors: Evenly spaced vectors of the database, or those of some of its documents, f32
            [n, dimension]. They must fill `FEWEST_LISTS` such lists.
        count: Vectors of the large database.
        lists: Its lists.
        documents: Number of each vector's document, i64 [n]: chunks of a query's own document are
            no neighbors, as in a search for chunks of other documents. None: only the query itself
            is left out.
    """
    found: dict[int, list[np.ndarray]] = {}
    index = None
    owners = np.arange(len(vectors)) if documents is None else documents
    for parts in (8, 4, 2, 1):
        few = small_lists(len(vectors) // parts, count, lists)
        if few < _FEWEST_FITTED and parts > 1:
            continue
        curves = found.setdefault(few, [])
        for first in range(parts):
            some = vectors[first::parts]
            index = make_index(f"IVF{few},Flat", some.shape[1])
            train(index, some)
            curves.append(_found(index, some, owners[first::parts], _QUERIES // parts))
    return SampledBreadth(lists, found, index)


def small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


def _found(index: Any, vectors: np.ndarray, owners: np.ndarray, queries: int) -> np.ndarray:
    """Recall@2 of some of the vectors by the number of lists they visit, f64 [lists + 1]."""
    rows = np.linspace(0, len(vectors) - 1, min(queries, len(vectors))).astype(np.int64)
    flat = faiss_library().IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    candidates = search(flat, vectors[rows], min(_CANDIDATES, len(vectors)))[1]
    others = owners[candidates] != owners[rows][:, None]
    others &= others.cumsum(axis=1) <= DECISIVE
    query, nearest = np.nonzero(others)[0], candidates[others]
    centers, lists = innermost(index).quantizer, int(innermost(index).nlist)
    homes = search(centers, vectors[nearest], 1)[1]
    in_turn = search(centers, vectors[rows], lists)[1]
    ranks = (in_turn[query] == homes).argmax(axis=1)
    counted = np.bincount(ranks, minlength=lists)
    return np.r_[0, np.cumsum(counted) / max(1, len(ranks))]


def _extrapolated(sizes: np.ndarray, needed: np.ndarray, lists: int) -> int:
    """p at L = `lists`, by the least squares of relative errors of q; a >= 0.

    >>> _extrapolated(np.array([11, 22, 43, 87]), np.array([7, 12, 17, 27]), 8192)
    58
    >>> _extrapolated(np.array([66, 131, 262, 524]), np.array([42, 75, 136, 231]), 1000)
    363
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
