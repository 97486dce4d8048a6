"""Copies of query chunks among their neighbors, exact and near."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.overlap import longest_common_runs

#: Number of first neighbors in which near copies are looked for: the usual K.
FIRST = 2
#: Tokens in a row that make a near copy: the 13-grams of Brown et al. 2020, appendix C.
NEAR_RUN = 13


def find_copies(
    database: ChunkDatabase, chunks: Sequence[np.ndarray], neighbors: np.ndarray
) -> np.ndarray:
    """Mark the neighbors that have the same tokens as the chunk that they were found for.

    Args:
        database: The retrieval database.
        chunks: Tokens of each chunk.
        neighbors: Chunk ids [n, k], NO_NEIGHBOR where missing.

    Returns:
        bool [n, k].
    """
    queries, lengths = _padded(chunks)
    _, _, start, end, _ = np.moveaxis(database.chunks[np.maximum(neighbors, 0)], -1, 0)
    copies = (neighbors != NO_NEIGHBOR) & (end - start == lengths[:, None])
    rows, columns = np.nonzero(copies)
    tokens, _ = database.padded_tokens(neighbors[rows, columns], queries.shape[1], -1)
    copies[rows, columns] = (tokens == queries[rows]).all(axis=1)
    return copies


def find_near_copies(
    database: ChunkDatabase, chunks: Sequence[np.ndarray], neighbors: np.ndarray
) -> np.ndarray:
    """Mark the first `FIRST` neighbors that share `NEAR_RUN` tokens in a row with their chunk.

    Args:
        database: The retrieval database.
        chunks: Tokens of each chunk.
        neighbors: Chunk ids [n, k], NO_NEIGHBOR where missing.

    Returns:
        bool [n, at most `FIRST`].
    """
    first = neighbors[:, :FIRST]
    near = first != NO_NEIGHBOR
    if not near.any():
        return near
    rows, _ = np.nonzero(near)
    _, _, start, end, _ = database.chunks[first[near]].T
    tokens, _ = database.padded_tokens(first[near], int((end - start).max()), -1)
    near[near] = longest_common_runs(_padded(chunks)[0][rows], tokens) >= NEAR_RUN
    return near


def _padded(chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Chunks in one array, i64 [n, longest], padded with -1, and their lengths."""
    lengths = np.array([len(chunk) for chunk in chunks])
    rows = np.full((len(chunks), max(lengths, default=0)), -1, np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.concatenate(chunks)
    return rows, lengths
