"""Rough scores of queries against vectors, as one matrix product, with a bound of their error.

The score of a query x and a vector y is x.y - |y|^2 / 2, so that |x - y|^2 = |x|^2 - 2 score: the
nearest vector has the highest score. Scores only tell which vectors may be near enough.

Where the processor multiplies int8 in one instruction (VNNI, AMX), both sides are rounded to int8,
which takes a quarter of the time. Their products are exact in int32. By Cauchy-Schwarz, with x' and
y' for what was rounded, |x.y - x'.y'| <= |x'| |y - y'| + |x - x'| |y|. Differences from an origin
amid the vectors are rounded, because they are shorter; distances do not change by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from retro_mcore.host import processor_features
from retro_mcore.retrieval.index.library import faiss_library

#: Instruction sets that multiply int8 and add up in int32, by Linux's names.
_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}
#: From so many queries on, rounding the vectors that they are scored against pays.
ROUNDED_FROM = 128
_STEPS = 127  # of int8, to both sides of zero
_LEAST = np.float32(1e-30)  # its inverse is finite
#: Roundings beside those of the sums over the dimensions, generously.
_ROUNDINGS = 16


class Rounded(NamedTuple):
    """Rows rounded to int8 with a scale each: relative to an origin, row = scale * code + error.

    Attributes:
        codes: i8 [n, dimension].
        scales: f32 [n].
        errors: f32 [n], length of the error.
        squares: f32 [n], squared length of the row from the origin.
    """

    codes: np.ndarray
    scales: np.ndarray
    errors: np.ndarray
    squares: np.ndarray


class Queries(NamedTuple):
    """Queries of a search.

    Attributes:
        vectors: f32 [n, dimension].
        squares: f32 [n], their squared lengths.
        rounded: Rounded from the search's origin; None where the processor gains nothing by it.
    """

    vectors: np.ndarray
    squares: np.ndarray
    rounded: Rounded | None

    @classmethod
    def of(cls, vectors: np.ndarray, origin: np.ndarray | None) -> Queries:
        """Prepare queries; `origin` f32 [dimension], None: they are not rounded."""
        rounded = None if origin is None else round_rows(vectors - origin)
        return cls(vectors, squared_lengths(vectors), rounded)

    @classmethod
    def join(cls, parts: Sequence[Queries]) -> Queries:
        """Queries one after the other."""
        vectors, squares = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        rounded = [part.rounded for part in parts if part.rounded is not None]
        joined = Rounded(*map(np.concatenate, zip(*rounded, strict=True))) if rounded else None
        return cls(vectors, squares, joined)


class Scores(NamedTuple):
    """Scores of some queries, and what bounds their errors.

    Attributes:
        values: f32 [n, m].
        squares: f64 [n], |x|^2 where |x - y|^2 = |x|^2 - 2 score.
        errors: f64 [n], most by which rounding to int8 changes a score.
        longest: Bound of |y|^2, and of the squares of what x and y are taken from.
    """

    values: np.ndarray
    squares: np.ndarray
    errors: np.ndarray
    longest: float

    def farthest(self) -> np.ndarray:
        """Squared distances f64 [n] that no vector has."""
        return 2 * (self.squares + self.longest)

    def slack(self, distances: np.ndarray, dimension: int) -> np.ndarray:
        """Bound, f64 [n], of the error of scores and of half distances.

        With u = 2^-24, a sum of d products has an error of at most d u times the sum of their
        magnitudes, in any order (Higham 2002, section 3.1). By |x||y| <= (|x|^2 + |y|^2) / 2, those
        of scores and of distances, also if they are taken from the origin or from the center of a
        list, are within d u (4 |x|^2 + 4 `longest` + distance).

        Args:
            distances: Squared distances that matter [n].
            dimension: d.
        """
        unit = (dimension + _ROUNDINGS) * 2.0**-24
        tiny = dimension * float(np.finfo(np.float32).tiny)
        return self.errors + unit * (4 * self.squares + 4 * self.longest + distances) + tiny


class VectorScores:
    """Scores queries against some vectors.

    Args:
        vectors: f32 [m, dimension], finite.
        center: f32 [dimension], what they are relative to; None: the queries' zero.
        origin: What the queries are rounded from; None: nothing is rounded.

    Attributes:
        vectors: As given.
        center: As given.
    """

    def __init__(
        self, vectors: np.ndarray, center: np.ndarray | None, origin: np.ndarray | None
    ) -> None:
        self.vectors, self.center = vectors, center
        self._exact: tuple[Callable[[np.ndarray], np.ndarray], float] | None = None
        self._rounded: Rounded | None = None
        if origin is None:
            self._make_exact()
            return
        self._rounded = round_together(vectors - (origin if center is None else origin - center))
        self._reach = float(self._rounded.squares.max()) ** 0.5
        self._minus_halves = torch.from_numpy(self._rounded.squares / np.float32(-2))
        self._longest = 2 * self._reach**2 + 3 * _square(origin) + _square(center)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        return self.vectors.shape[1]

    def __call__(self, queries: Queries, rows: np.ndarray) -> Scores:
        """Score queries[rows], roughly where that is faster."""
        ours = self._rounded
        if ours is None:
            return self.exactly(queries, rows)
        assert queries.rounded is not None
        mine = Rounded(*(part[rows] for part in queries.rounded))
        products = int8_product(mine.codes, ours.codes).float()
        scales = torch.from_numpy(mine.scales * ours.scales[0])
        values = torch.addcmul(self._minus_halves, products, scales[:, None]).numpy()
        squares = mine.squares.astype(np.float64)
        with np.errstate(invalid="ignore"):  # of rows that are not finite
            reaches = np.sqrt(squares) + mine.errors
            errors = reaches * float(ours.errors.max()) + mine.errors * self._reach
        return Scores(values, squares, errors, self._longest)

    def exactly(self, queries: Queries, rows: np.ndarray) -> Scores:
        """Score queries[rows] in single precision."""
        product, longest = self._exact or self._make_exact()
        squares = queries.squares[rows].astype(np.float64)
        return Scores(product(queries.vectors[rows]), squares, np.zeros(len(rows)), longest)

    def _make_exact(self) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
        """Faiss's own matrix product, which obeys its number of threads, and a bound of squares."""
        faiss, vectors = faiss_library(), self.vectors
        if self.center is not None:
            vectors = vectors + self.center
        squares = squared_lengths(vectors)
        product = faiss.LinearTransform(vectors.shape[1], len(vectors), True)
        faiss.copy_array_to_vector(vectors.reshape(-1), product.A)
        faiss.copy_array_to_vector(squares / np.float32(-2), product.b)
        product.is_trained = True
        self._exact = product.apply, float(squares.max()) + _square(self.center)
        return self._exact


def round_rows(rows: np.ndarray) -> Rounded:
    """Round rows f32 [n, dimension] to int8, each by a scale of its own."""
    return _rounded(rows, np.abs(rows).max(axis=1, keepdims=True, initial=0))


def round_together(rows: np.ndarray) -> Rounded:
    """Round rows f32 [n, dimension] to int8, all by one scale."""
    return _rounded(rows, max(rows.max(), -rows.min()))


def _rounded(rows: np.ndarray, longest: Any) -> Rounded:
    scales = np.maximum(longest, _LEAST) / np.float32(_STEPS)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = rows * (1 / scales)
        np.rint(steps, out=steps)
        codes = steps.astype(np.int8)
        steps *= scales
        steps -= rows
    scales = np.broadcast_to(np.asarray(scales, np.float32).reshape(-1), len(rows))
    return Rounded(codes, scales, np.sqrt(squared_lengths(steps)), squared_lengths(rows))


def _square(vector: np.ndarray | None) -> float:
    return 0.0 if vector is None else float(vector @ vector)


def squared_lengths(rows: np.ndarray) -> np.ndarray:
    """Squared lengths f32 [n] of rows f32 [n, dimension]."""
    return np.einsum("nd,nd->n", rows, rows)


def int8_product(left: np.ndarray, right: np.ndarray) -> torch.Tensor:
    """Products i32 [n, m] of all rows of `left` with all of `right`, i8 [n or m, dimension].

    The dimension must exceed 1: of a matrix with one row or column PyTorch cannot tell the layout.
    """
    return torch._int_mm(torch.from_numpy(left), torch.from_numpy(right).T)


@cache
def multiplies_int8_fast() -> bool:
    """Whether this processor multiplies int8 in one instruction, and exactly.

    Without such instructions, or where they are switched off, libraries may saturate sums.
    """
    if not processor_features() & _INT8:
        return False
    extreme = np.tile(np.array([[127, 127], [-127, -127], [127, -127]], np.int8), (6, 32))
    wide = extreme.astype(np.int32)
    try:
        found = int8_product(extreme, extreme).numpy()
    except (AttributeError, RuntimeError):  # PyTorch before 2.2
        return False
    return bool((found == wide @ wide.T).all())
