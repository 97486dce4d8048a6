"""Retro under context parallelism (docs/decisions/0026-context-parallelism.md).

A rank holds two pieces of every sequence (`ContextPart`), each of whole chunks, and encodes the
neighbors of its own chunks. The first M - 1 positions of a piece attend to the neighbors of the
chunk before it, which another rank encodes and sends: once per forward pass, with their gradient on
the way back. So behind the encoder each piece has one chunk more than its own.

Shapes: P tokens of a piece, n = P / M its chunks, B batch, K neighbors, R retrieved length (under
sequence parallelism this rank's part), E encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retro_mcore.chunking import ChunkGrid, PieceGrid
from retro_mcore.model.chunks import attending_positions, join_attending, split_attending
from retro_mcore.model.config import RetroConfig


@dataclass(frozen=True)
class AttendingCut:
    """Cuts `[S, B, ...]` states of a rank into the positions that attend to one chunk each.

    Attributes:
        grid: The chunks of a sequence, or of a piece.
        pieces: 1 if the S tokens are whole sequences, 2 if they are pieces.
        batch_size: B.
    """

    grid: ChunkGrid | PieceGrid
    pieces: int
    batch_size: int

    @classmethod
    def of(cls, config: RetroConfig, sequence_length: int, batch_size: int) -> AttendingCut:
        """The cut of a rank's `sequence_length` tokens."""
        if config.context_parallel_size == 1:
            return cls(config.chunk_grid(sequence_length), 1, batch_size)
        return cls(PieceGrid(sequence_length // 2, config.retro_chunk_length), 2, batch_size)

    def split(self, states_SBX: Tensor) -> Tensor:
        """`[S, B, ...]` to `[M, B * L, ...]`; see `chunks.split_attending`."""
        return split_attending(self._pieces_as_samples(states_SBX), self.grid)

    def join(self, chunks_MBLX: Tensor) -> Tensor:
        """The inverse of `split`; positions that do not attend are zero."""
        samples = self.batch_size * self.pieces
        return self._samples_as_pieces(join_attending(chunks_MBLX, self.grid, samples))

    def attending(self, has_neighbors_BL: Tensor) -> Tensor:
        """Mark the positions that attend; see `chunks.attending_positions`."""
        return self._samples_as_pieces(attending_positions(self.grid, has_neighbors_BL))

    def _pieces_as_samples(self, states: Tensor) -> Tensor:
        if self.pieces == 1:
            return states
        by_piece = states.unflatten(0, (self.pieces, -1))
        return by_piece.movedim(0, 2).flatten(1, 2)

    def _samples_as_pieces(self, states: Tensor) -> Tensor:
        if self.pieces == 1:
            return states
        return states.unflatten(1, (self.batch_size, -1)).movedim(2, 0).flatten(0, 1)


def chunks_in_context(config: RetroConfig, sequence_length: int) -> int:
    """Chunks per sample whose encoded neighbors a rank holds: L, or its own and two more.

    Args:
        config: The model's configuration.
        sequence_length: S, of the whole sequence.
    """
    num_chunks = config.chunk_grid(sequence_length).num_chunks
    ranks = config.context_parallel_size
    return num_chunks if ranks == 1 else num_chunks // ranks + 2


def without_chunk_before_text(mark_BL: Tensor, batch_size: int, group: dist.ProcessGroup) -> Tensor:
    """Clear the marks of the chunk before each sequence's first token, on the rank that has it.

    Args:
        mark_BL: bool `[B * 2 * (n + 1)]`.
        batch_size: B.
        group: The context parallel group.
    """
    if group.rank() > 0:
        return mark_BL
    mark = mark_BL.unflatten(0, (batch_size, -1)).clone()
    mark[:, 0] = False
    return mark.flatten()


def without_chunks_before(mask: Tensor, num_samples: int) -> Tensor:
    """A mask `[K * B * 2 * (n + 1), R]` of only the pieces' own chunks, `[K * B * 2 * n, R]`.

    Args:
        mask: The mask, in the order of `chunks.nearest_first`.
        num_samples: K * B.
    """
    return mask.unflatten(0, (num_samples, 2, -1))[:, :, 1:].flatten(0, 2)


def with_chunks_before(encoded: Tensor, num_samples: int, group: dist.ProcessGroup) -> Tensor:
    """Put the encoded neighbors of the chunk before each piece in front of the piece's own.

    Args:
        encoded: `[R, K * B * 2 * n, E]`, in the order of `chunks.nearest_first`.
        num_samples: K * B.
        group: The context parallel group.

    Returns:
        `[R, K * B * 2 * (n + 1), E]`; zeros where there is no chunk before.
    """
    pieces = encoded.unflatten(1, (num_samples, 2, -1))
    lasts = pieces[:, :, :, -1].movedim(2, 0)
    before: Tensor = _ChunksBefore.apply(lasts, group)
    return torch.cat((before.movedim(0, 2).unsqueeze(3), pieces), dim=3).flatten(1, 3)


class _ChunksBefore(torch.autograd.Function):
    """The last chunks of a rank's two pieces, exchanged for those before its two pieces.

    Piece r + 1 follows piece r and is the next rank's first one. The second pieces lie in reverse
    order, and the last rank's two pieces follow one another.
    """

    @staticmethod
    def forward(ctx: Any, lasts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        first, second = lasts.contiguous()
        from_previous, from_next = _exchange(to_next=first, to_previous=second, group=group)
        before_first = torch.zeros_like(first) if from_previous is None else from_previous
        before_second = first if from_next is None else from_next
        return torch.stack((before_first, before_second))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        before_first, before_second = gradients[0].contiguous()
        from_previous, from_next = _exchange(
            to_next=before_second, to_previous=before_first, group=ctx.group
        )
        first = before_second if from_next is None else from_next
        second = torch.zeros_like(first) if from_previous is None else from_previous
        return torch.stack((first, second)), None


def _exchange(
    to_next: Tensor, to_previous: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """What the previous and the next rank sent here; None at the ends of the group."""
    rank, last = group.rank(), group.size() - 1
    operations: list[dist.P2POp] = []

    def swap(sent: Tensor, peer: int) -> Tensor:
        received = torch.empty_like(sent)
        where = dist.get_global_rank(group, peer)
        operations.append(dist.P2POp(dist.isend, sent, where, group))
        operations.append(dist.P2POp(dist.irecv, received, where, group))
        return received

    from_previous = swap(to_previous, rank - 1) if rank > 0 else None
    from_next = swap(to_next, rank + 1) if rank < last else None
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return from_previous, from_next
