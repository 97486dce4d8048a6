"""Context parallelism: the part of every sequence that a rank holds.

A sequence is cut into 2c pieces of equal length for c ranks, and rank r holds the pieces r and
2c - 1 - r, as Megatron's `get_batch_on_this_cp_rank` cuts a batch. Early pieces attend to few keys
and late ones to many, so all ranks do the same work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextPart:
    """The two pieces of each sequence that a context parallel rank holds.

    Attributes:
        rank: r, in its context parallel group.
        size: c, the number of ranks in the group. 1: the rank holds whole sequences.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ContextPart:
        """This rank's part in a context parallel group."""
        return cls(group.rank(), group.size())

    @property
    def pieces(self) -> tuple[int, int]:
        """Numbers of the two pieces, in ascending order."""
        return self.rank, 2 * self.size - 1 - self.rank

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's pieces of a dimension, whose length is a multiple of 2c."""
        if self.size == 1:
            return whole
        pieces = whole.chunk(2 * self.size, dim)
        return torch.cat([pieces[number] for number in self.pieces], dim)

    def restore(self, gathered: Tensor, dim: int) -> Tensor:
        """The whole dimension, from the parts of all ranks one after the other; undoes `take`."""
        if self.size == 1:
            return gathered
        pieces = gathered.chunk(2 * self.size, dim)
        late = [pieces[2 * rank + 1] for rank in reversed(range(self.size))]
        return torch.cat([*pieces[::2], *late], dim)


def gather_parts(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The whole dimension on every rank of a context parallel group, without gradients."""
    place = ContextPart.of(group)
    if place.size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(place.size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return place.restore(torch.cat(parts, dim), dim)
