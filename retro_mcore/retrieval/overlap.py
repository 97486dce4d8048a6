"""Runs of tokens that two chunks share, the leakage measure of Borgeaud et al. 2022."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Number of pairs compared at once.
_ROWS = 512


def longest_common_runs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Length of the longest common substring of each pair.

    Args:
        first: Tokens i64 [n, A]; negative where padded.
        second: Tokens i64 [n, B]; negative where padded.

    Returns:
        i64 [n].
    """
    longest = np.zeros(len(first), np.int64)
    # A block of runs fits into the processor's cache, and lengths of short runs fit into a byte.
    fits_byte = min(first.shape[1], second.shape[1]) < 256
    for start in range(0, len(first), _ROWS):
        rows = slice(start, start + _ROWS)
        longest[rows] = _longest_runs(
            first[rows], second[rows], np.uint8 if fits_byte else np.int32
        )
    return longest


def _longest_runs(first: np.ndarray, second: np.ndarray, dtype: Any) -> np.ndarray:
    # Transposed, so that operations use contiguous memory; any token fits into 32 bits.
    first_AN = np.ascontiguousarray(first.T, np.int32)
    second_BN = np.ascontiguousarray(second.T, np.int32)
    second_BN[second_BN < 0] = -2  # never equal to padding of `first`
    run_BN: np.ndarray = np.zeros((len(second_BN) + 1, len(first)), dtype)
    longest_BN = np.zeros_like(run_BN)
    for token_N in first_AN:
        # A run that ends here extends the run that ended one token earlier in both.
        run_BN[1:] = (run_BN[:-1] + dtype(1)) * (token_N == second_BN)
        np.maximum(longest_BN, run_BN, out=longest_BN)
    return longest_BN.max(0)


def shared_positions(
    first: np.ndarray, second: np.ndarray, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mark the tokens of two sequences that are in common runs of at least `shortest` tokens.

    Args:
        first: Tokens [A].
        second: Tokens [B].
        shortest: Length of the shortest run that counts.

    Returns:
        bool [A] and bool [B].
    """
    lengths = covering_runs(first, second, shortest)
    return lengths[0] > 0, lengths[1] > 0


def covering_runs(
    first: np.ndarray, second: np.ndarray, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Length of the longest common run that covers each token of two sequences.

    Args:
        first: Tokens [A].
        second: Tokens [B].
        shortest: Length of the shortest run that counts.

    Returns:
        i64 [A] and i64 [B]; 0 where no run covers the token.
    """
    same = first[:, None] == second
    run = np.zeros((len(first) + 1, len(second) + 1), np.int64)
    for row in range(len(first)):
        run[row + 1, 1:] = np.where(same[row], run[row, :-1] + 1, 0)
    covering = np.zeros(len(first), np.int64), np.zeros(len(second), np.int64)
    for row, column in np.argwhere(run >= shortest):
        length = run[row, column]
        for lengths, end in zip(covering, (row, column), strict=True):
            covered = lengths[end - length : end]
            np.maximum(covered, length, out=covered)
    return covering
