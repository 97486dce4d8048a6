"""The centers of an index's lists, and which of them are nearest.

Large indexes have a graph over their centers, which finds most of the nearest ones in little time.
Many vectors at once are compared with all centers in one matrix product instead. Up to some number
of centers that is faster, and it misses none.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from retro_mcore.retrieval.index.candidates import NearestCandidates
from retro_mcore.retrieval.index.list_scores import candidates_within
from retro_mcore.retrieval.index.rough_scores import Queries, VectorScores, multiplies_int8_fast

#: Centers that are compared at a time, and those whose mean is the origin of rounded vectors.
_COMPARED, _AVERAGED = 8192, 65_536
#: Centers lie so close to one another that rounded scores leave twice too many. Where as many as
#: these are wanted, computing their distances takes longer than exact scores.
_ROUNDED_BELOW = 64


class Centers:
    """All centers of a quantizer.

    Args:
        quantizer: A flat index or graph of centers, downcast.
        most: Up to so many centers, all are compared; else `quantizer` searches.
        count: Number of centers that are wanted of each query.

    Attributes:
        origin: f32 [dimension], a point amid the centers, from which `Queries` are rounded; None
            where the processor gains nothing by rounding.
    """

    def __init__(self, quantizer: Any, most: int, count: int) -> None:
        self._quantizer, self._most, self._count = quantizer, most, count
        some = quantizer.reconstruct_n(0, min(quantizer.ntotal, _AVERAGED))
        self.origin = some.mean(axis=0) if multiplies_int8_fast() else None

    def nearest(self, queries: Queries, rows: np.ndarray) -> np.ndarray:
        """Find the nearest centers, i64 [n, count], of rows i64 [n] of the queries.

        -1 where there are too few. Of equally near ones, those of lower numbers come first.
        """
        count = self._count
        if self._quantizer.ntotal > self._most:
            return self._quantizer.search(queries.vectors[rows], count)[1]
        nearest, own = NearestCandidates(len(rows), count), np.arange(len(rows))
        for start, centers, scores in self._parts:
            counts, distances, places = candidates_within(
                queries, rows, nearest.limits, scores, centers, None, count
            )
            nearest.add(own, counts, distances, places + start)
        return nearest.result()[1]

    @cached_property
    def _parts(self) -> list[tuple[int, np.ndarray, VectorScores]]:
        every = self._quantizer.reconstruct_n(0, self._quantizer.ntotal)
        origin = self.origin if self._count < _ROUNDED_BELOW else None
        return [
            (start, part, VectorScores(part, None, origin))
            for start in range(0, len(every), _COMPARED)
            for part in [every[start : start + _COMPARED]]
        ]
