"""How many tokens two chunks share in one run: the measure of leakage of Borgeaud et al. 2022."""

from __future__ import annotations

import numpy as np


def longest_common_runs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Length of the longest common substring of each pair.

    Args:
        first: Tokens i64 [n, A]; negative where padded.
        second: Tokens i64 [n, B]; negative where padded.

    Returns:
        i64 [n].
    """
    run = np.zeros((len(first), second.shape[1] + 1), np.int64)
    longest = np.zeros(len(first), np.int64)
    for column in range(first.shape[1]):
        token = first[:, column, None]
        same = (token == second) & (token >= 0)
        run[:, 1:] = np.where(same, run[:, :-1] + 1, 0)
        np.maximum(longest, run.max(1), out=longest)
    return longest


def shared_positions(
    first: np.ndarray, second: np.ndarray, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of two sequences lie in common runs of at least `shortest` tokens.

    Args:
        first: Tokens [A].
        second: Tokens [B].
        shortest: Tokens of the shortest run that counts.

    Returns:
        bool [A] and bool [B].
    """
    same = first[:, None] == second
    run = np.zeros((len(first) + 1, len(second) + 1), np.int64)
    for row in range(len(first)):
        run[row + 1, 1:] = np.where(same[row], run[row, :-1] + 1, 0)
    marked = np.zeros(len(first), bool), np.zeros(len(second), bool)
    for row, column in np.argwhere(run >= shortest):
        length = run[row, column]
        marked[0][row - length : row] = True
        marked[1][column - length : column] = True
    return marked
