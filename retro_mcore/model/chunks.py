"""Cutting projected `[S, B, X]` states into chunks and putting them back.

Projections act on single tokens, so they commute with cutting: everything here happens between a
projection and the core attention, on the whole sequence, and knows nothing of parallelism.
Shapes: S sequence, B batch, L chunks per sample, M chunk length, X anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retro_mcore.chunking import ChunkGrid, PieceGrid


class RetrievingChunks(NamedTuple):
    """The chunks whose neighbors are encoded; the `context` of the encoder's layers.

    Attributes:
        states: `[S, B, D]`, the decoder's hidden states (under sequence parallelism this rank's
            part of S).
        length: M, tokens per chunk.
    """

    states: Tensor
    length: int


def split_chunks(states_SBX: Tensor, grid: ChunkGrid, filler_X: Tensor | None = None) -> Tensor:
    """The tokens of each chunk, for the encoder to be conditioned on.

    Args:
        states_SBX: `[S, B, ...]`.
        grid: The chunks of the S tokens. A left-aligned grid leaves out a trailing partial chunk;
            a right-aligned grid's partial first chunk is filled up at its end.
        filler_X: `[...]`, what the partial first chunk is filled up with; zeros by default.

    Returns:
        `[M, B * L, ...]`, chunk `(b, l)` at column `b * L + l`.
    """
    if grid.alignment == "left":
        return _stack_chunks(states_SBX[: grid.num_chunks * grid.chunk_length], grid)
    first = grid.first_chunk_length
    if first == grid.chunk_length:
        return _stack_chunks(states_SBX, grid)
    missing = grid.chunk_length - first
    shape = (missing, *states_SBX.shape[1:])
    filler = states_SBX.new_zeros(shape) if filler_X is None else filler_X.expand(shape)
    return _stack_chunks(torch.cat((states_SBX[:first], filler, states_SBX[first:])), grid)


def nearest_first(rows: Tensor, num_neighbors: int) -> Tensor:
    """Every chunk's nearest neighbor, then every chunk's second one, and so on.

    In this order a chunk's neighbors are a view away from being one sequence to attend to.

    Args:
        rows: `[B * L * K, ...]`, row `(b * L + l) * K + k`.
        num_neighbors: K.

    Returns:
        `[K * B * L, ...]`, row `k * B * L + b * L + l`.
    """
    return rows.unflatten(0, (-1, num_neighbors)).transpose(0, 1).flatten(0, 1)


def split_attending(states_SBX: Tensor, grid: ChunkGrid | PieceGrid) -> Tensor:
    """The M positions that attend to each chunk's neighbors: from the chunk's last token on.

    Positions outside of the sequence are zero.

    Args:
        states_SBX: `[S, B, ...]`.

    Returns:
        `[M, B * L, ...]`, chunk `(b, l)` at column `b * L + l`.
    """
    attending = states_SBX[max(grid.first_attending, 0) :]
    before = max(-grid.first_attending, 0)
    after = grid.num_chunks * grid.chunk_length - before - attending.size(0)
    padding = [0, 0] * (attending.dim() - 1) + [before, after]
    return _stack_chunks(torch.nn.functional.pad(attending, padding), grid)


def join_attending(chunks_MBLX: Tensor, grid: ChunkGrid | PieceGrid, batch_size: int) -> Tensor:
    """The inverse of `split_attending`; positions that do not attend are zero.

    Returns:
        `[S, B, ...]`.
    """
    sequence = (
        chunks_MBLX.unflatten(1, (batch_size, grid.num_chunks))
        .permute(2, 0, 1, *range(3, chunks_MBLX.dim() + 1))
        .flatten(0, 1)
    )
    first = grid.first_attending
    padding = [0, 0] * (sequence.dim() - 1) + [max(first, 0), 0]
    attending = sequence[max(-first, 0) : grid.sequence_length - first]
    return torch.nn.functional.pad(attending, padding)


def unread_neighbors(segments_BS: Tensor, grid: ChunkGrid) -> Tensor:
    """Mark the positions that must not read the neighbors of the chunk before them.

    A position reads them only if all tokens of the chunk belong to its own document: neighbors were
    searched and encoded with every token of the chunk.

    Args:
        segments_BS: `[B, S]`, the document of each token.
        grid: The chunks, all of them whole.

    Returns:
        bool `[B * L, M]`, for the M positions that attend to each chunk's neighbors.
    """
    segments_SB = segments_BS.t()
    chunks_MN = split_chunks(segments_SB, grid)
    owner_N = chunks_MN[-1]
    reads_MN = (split_attending(segments_SB, grid) == owner_N) & (chunks_MN == owner_N).all(dim=0)
    return ~reads_MN.t()


def attending_positions(grid: ChunkGrid | PieceGrid, has_neighbors_BL: Tensor) -> Tensor:
    """Mark the positions that attend to at least one retrieved token.

    Args:
        has_neighbors_BL: bool `[B * L]`, whether a chunk has any, or `[M, B * L]`, whether each of
            the positions that attend to it reads any.

    Returns:
        bool `[S, B, 1]`.
    """
    batch_size = has_neighbors_BL.size(-1) // grid.num_chunks
    by_position = has_neighbors_BL.expand(grid.chunk_length, -1)
    return join_attending(by_position, grid, batch_size).unsqueeze(-1)


def _stack_chunks(states_SBX: Tensor, grid: ChunkGrid | PieceGrid) -> Tensor:
    chunks_LMBX = states_SBX.unflatten(0, (grid.num_chunks, grid.chunk_length))
    return chunks_LMBX.permute(1, 2, 0, *range(3, chunks_LMBX.dim())).flatten(1, 2)
