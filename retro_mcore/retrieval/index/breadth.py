"""How many lists a search of a large index must visit, estimated with some of its vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_mcore.retrieval.index.embeddings import Embeddings, HeldOut
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.recall import measure_recall
from retro_mcore.retrieval.index.training import make_index, train

#: Lists that the vectors must fill: the number of lists to visit is fitted on these and on half.
FEWEST_LISTS = 16
_QUERIES = 400


def expected_probes(vectors: np.ndarray, count: int, lists: int, recall: float) -> tuple[int, Any]:
    """Lists to visit for a recall@2 in a large, uncompressed index, and an index of `vectors`.

    The vectors are put into lists as long as the large index's. The number to visit grows as a
    power of the number of lists, which is fitted on all vectors, half and a quarter of them. (The
    fraction to visit falls: a larger database holds nearer neighbors.)

    Args:
        vectors: Evenly spaced vectors of the database, f32 [n, dimension]. They must fill
            `FEWEST_LISTS` such lists.
        count: Vectors of the large database.
        lists: Its lists.
        recall: Target recall@2.
    """
    sizes, needed, index = [], [], None
    for part in (4, 2, 1):
        some = vectors[::part]
        few = small_lists(len(some), count, lists)
        if few < FEWEST_LISTS // 2 and part > 1:
            continue
        queries = np.linspace(0, len(some) - 1, min(_QUERIES, len(some))).astype(np.int64)
        held_out = HeldOut(some[queries], queries)
        index = make_index(f"IVF{few},Flat", some.shape[1])
        train(index, some)
        add_rows(index, some, np.arange(len(some)))
        measured = measure_recall(index, _InMemory(some), held_out, target=recall)
        sizes.append(few)
        needed.append(measured.nprobe or 1)
    slope = 0.0
    if sizes[-1] > sizes[0]:
        slope = min(max(float(np.polyfit(np.log(sizes), np.log(needed), 1)[0]), 0.0), 1.0)
    return max(1, min(lists, round(needed[-1] * (lists / sizes[-1]) ** slope))), index


def small_lists(vectors: int, count: int, lists: int) -> int:
    """Lists of as many vectors each as in the large index."""
    return max(1, min(lists, round(vectors * lists / count)))


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
