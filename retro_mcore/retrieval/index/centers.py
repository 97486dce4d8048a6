"""The centers of an index's lists, and which of them are nearest.

Large indexes have a graph over their centers, which finds most of the nearest ones in little time.
Many vectors at once are compared with all centers in one matrix product instead. Up to some number
of centers that is about as fast, and it misses none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_mcore.retrieval.index.candidates import NearestCandidates
from retro_mcore.retrieval.index.list_scores import candidates_within
from retro_mcore.retrieval.index.rough_scores import Queries, VectorScores, multiplies_int8_fast

#: Of more centers, a graph finds the nearest.
MOST_COMPARED = 65_536
#: Centers that are compared at a time.
_TOGETHER = 8192
#: Centers lie so close to one another that rounded scores leave twice too many. Where as many as
#: these are wanted, computing their distances takes longer than exact scores.
_ROUNDED_BELOW = 64


class Centers:
    """All centers of a quantizer.

    Memory: up to three copies of the centers that are compared.

    Args:
        quantizer: A flat index or graph of centers, downcast.
        count: Number of centers that are wanted of each query.
        most: Up to so many centers, all are compared; else `quantizer` searches.

    Attributes:
        origin: f32 [dimension], a point amid the centers, from which `Queries` are rounded; None
            where the processor gains nothing by rounding.
    """

    def __init__(self, quantizer: Any, count: int, most: int = MOST_COMPARED) -> None:
        self._quantizer, self._count, self.origin = quantizer, count, None
        self._parts: list[tuple[int, VectorScores]] = []
        compared = quantizer.ntotal <= most
        rounded = multiplies_int8_fast() and quantizer.d > 1
        if not compared and not rounded:
            return
        some = quantizer.reconstruct_n(0, min(quantizer.ntotal, max(most, MOST_COMPARED)))
        if rounded:
            self.origin = some.mean(axis=0)
        origin = self.origin if count < _ROUNDED_BELOW else None
        for start in range(0, len(some) if compared else 0, _TOGETHER):
            part = some[start : start + _TOGETHER]
            self._parts.append((start, VectorScores(part, None, origin)))

    def nearest(self, queries: Queries, rows: np.ndarray) -> np.ndarray:
        """Find the nearest centers, i64 [n, count], of rows i64 [n] of the queries.

        -1 where there are too few. Of equally near ones, those of lower numbers come first.
        """
        if not self._parts:
            return self._quantizer.search(queries.vectors[rows], self._count)[1]
        nearest, own = NearestCandidates(len(rows), self._count), np.arange(len(rows))
        for start, scores in self._parts:
            counts, distances, places = candidates_within(
                queries, rows, nearest.limits, scores, self._count
            )
            nearest.add(own, counts, distances, places + start)
        return nearest.result()[1]
