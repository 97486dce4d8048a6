"""From samples to the model's inputs.

A sample holds S+1 tokens: the first S are the input, the last S the labels. Every rank of a tensor
parallel group reads the same samples itself, so nothing is broadcast.

Shapes: B samples, S sequence, L chunks per sample, K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_mcore.chunking import ChunkGrid
from retro_mcore.errors import ShapeError
from retro_mcore.model.chunks import unread_neighbors
from retro_mcore.model.documents import segment_mask, segment_positions
from retro_mcore.platform.context_parallel import ContextPart


@dataclass
class RetroBatch:
    """A micro batch.

    Attributes:
        tokens: int64 [B, S].
        labels: int64 [B, S], the next token of each position.
        loss_mask: float32 [B, S], 1 where a position counts in the loss: everywhere where
            documents are packed, as in Megatron by default; within documents where they are
            padded (aligned); on the answers in instruction tuning.
        position_ids: int64 [B, S], from 0 in each sample, or in each document.
        retrieved_tokens: int64 [B*L*K, R], row (b*L + i)*K + j; None without retrieval.
        retrieved_mask: bool [B*L*K, R], True where there is only padding; None without retrieval.
        sample_ids: The samples' indices in their dataset, for error messages.
        segments: int64 [B, S], equal for tokens that may attend to one another; None: all may.
        attention_mask: bool [B, 1, S, S], True = masked out, in place of `segments`; only in parts
            of a batch, whose keys are those of whole samples.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    retrieved_tokens: Tensor | None
    retrieved_mask: Tensor | None
    sample_ids: list[int]
    segments: Tensor | None = None
    attention_mask: Tensor | None = None

    @classmethod
    def from_text(
        cls,
        text: Tensor,
        neighbors: tuple[Tensor, Tensor] | None = None,
        loss_mask: Tensor | None = None,
        segments: Tensor | None = None,
        sample_ids: Sequence[int] = (),
        positions: Tensor | None = None,
    ) -> RetroBatch:
        """A batch of samples.

        Args:
            text: int64 [B, S+1].
            neighbors: Retrieved tokens int64 and mask bool, [B, L, K, R] or [B*L, K, R]; None
                without retrieval.
            loss_mask: float32 [B, S]; None: every position counts.
            segments: int64 [B, S], equal for tokens that may attend to one another.
            sample_ids: The samples' indices in their dataset.
            positions: int64 [B, S]; None: from 0 in every segment.
        """
        tokens = text[:, :-1].contiguous()
        retrieved, mask = neighbors or (None, None)
        return cls(
            tokens=tokens,
            labels=text[:, 1:].contiguous(),
            loss_mask=_ones_like(tokens) if loss_mask is None else loss_mask,
            position_ids=_positions(tokens, segments) if positions is None else positions,
            retrieved_tokens=None if retrieved is None else retrieved.flatten(0, -2),
            retrieved_mask=None if mask is None else mask.flatten(0, -2),
            sample_ids=list(sample_ids),
            segments=segments,
        )

    def to(self, device: torch.device) -> RetroBatch:
        """Copy this batch to `device`."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> RetroBatch:
        """Copy this batch to page-locked memory; called by the DataLoader if pinning is on."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> RetroBatch:
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def part(self, part: ContextPart, chunk_length: int | None = None) -> RetroBatch:
        """The part of this batch that a context parallel rank reads; S is divided by the ranks.

        The rank gets the retrieved tokens of its own chunks. The mask also covers the chunk before
        each of the two pieces, whose neighbors another rank encodes: L + 2 chunks of each sample.
        With segments it has M more columns (`chunks.unread_neighbors`).

        Args:
            part: The rank's part.
            chunk_length: M; not needed without retrieval.

        Raises:
            ShapeError: the pieces do not have the same length, or do not hold whole chunks.
        """
        if part.size == 1:
            return self
        retrieved, retrieved_mask = self.retrieved_tokens, self.retrieved_mask
        if retrieved is None:
            self._check_divisible(2 * part.size)
        else:
            assert chunk_length is not None, "samples with neighbors have chunks"
            self._check_divisible(2 * part.size * chunk_length)
            retrieved_mask = self._mask_with_unread(retrieved, chunk_length)
            shape = (len(self.tokens), self.tokens.shape[1] // chunk_length)
            retrieved, retrieved_mask = _retrieved_part(retrieved, retrieved_mask, shape, part)
        mask = None if self.segments is None else segment_mask(self.segments)
        return replace(
            self,
            tokens=part.take(self.tokens, 1),
            labels=part.take(self.labels, 1),
            loss_mask=part.take(self.loss_mask, 1),
            position_ids=part.take(self.position_ids, 1),
            retrieved_tokens=retrieved,
            retrieved_mask=retrieved_mask,
            segments=None,
            attention_mask=None if mask is None else part.take(mask, 2),
        )

    def _mask_with_unread(self, retrieved: Tensor, chunk_length: int) -> Tensor:
        """The mask [B*L*K, R] of what was retrieved, with M more columns where there are segments:
        the positions that must not read it. A rank's part of the segments would not tell."""
        mask = self.retrieved_mask
        mask = torch.zeros_like(retrieved, dtype=torch.bool) if mask is None else mask
        if self.segments is None:
            return mask
        unread = unread_neighbors(self.segments, ChunkGrid(self.tokens.shape[1], chunk_length))
        rows = len(mask) // len(unread)
        return torch.cat((mask, unread.repeat_interleave(rows, dim=0)), dim=1)

    def _check_divisible(self, divisor: int) -> None:
        length = self.tokens.shape[1]
        if length % divisor:
            raise ShapeError(
                "--context-parallel-size",
                f"samples of {length} tokens",
                f"Their length must be a multiple of {divisor}: two pieces of whole chunks on each "
                "rank",
            )

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward pass, except the labels."""
        inputs: dict[str, Tensor | None] = {
            "input_ids": self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": (
                self.attention_mask if self.segments is None else segment_mask(self.segments)
            ),
        }
        if self.retrieved_tokens is not None:
            inputs |= retrieved_inputs(self.retrieved_tokens, self.retrieved_mask)
            if self.segments is not None:
                inputs["segments"] = self.segments
        return inputs


def retrieved_inputs(tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    """The model's arguments for what was retrieved.

    Args:
        tokens: int64 [..., R], as many rows as [B, L, K] has.
        mask: bool of the same shape, True = padding or missing.
    """
    rows = tokens.flatten(0, -2)
    return {
        "context_input_ids": rows,
        "context_position_ids": position_ids(rows),
        "context_mask": None if mask is None else mask.flatten(0, -2),
    }


def _retrieved_part(
    tokens: Tensor, mask: Tensor, shape: tuple[int, int], part: ContextPart
) -> tuple[Tensor, Tensor]:
    """The retrieved tokens of a rank's chunks, and the mask of these and of the chunks before.

    Args:
        tokens: int64 [B*L*K, R].
        mask: bool of as many rows, True = padding or missing.
        shape: B and L.
        part: The rank's part.
    """
    tokens_BLX, mask_BLX = (rows.unflatten(0, (*shape, -1)) for rows in (tokens, mask))
    length = shape[1] // (2 * part.size)
    # No chunk comes before the first one.
    before_BLX = torch.cat((torch.ones_like(mask_BLX[:, :1]), mask_BLX), dim=1)
    masks = [before_BLX[:, piece * length :][:, : length + 1] for piece in part.pieces]
    return part.take(tokens_BLX, 1).flatten(0, 2), torch.cat(masks, dim=1).flatten(0, 2)


def _positions(tokens: Tensor, segments: Tensor | None) -> Tensor:
    return position_ids(tokens).contiguous() if segments is None else segment_positions(segments)


def position_ids(tokens: Tensor) -> Tensor:
    """0, 1, 2, … along the last dimension of `tokens` [N, length]."""
    positions = torch.arange(tokens.shape[-1], dtype=torch.long, device=tokens.device)
    return positions.expand_as(tokens)


_OPTIONAL = ("neighbor_tokens", "neighbor_mask", "loss_mask", "segments", "position_ids")


def collate(samples: Sequence[Mapping]) -> RetroBatch:
    """Collate samples of a dataset into a batch.

    Args:
        samples: Each with `text` int64 [S+1] and `sample_id`; with retrieval also
            `neighbor_tokens` int64 [L, K, R] and `neighbor_mask` bool [L, K, R]; in an aligned
            project and in instruction tuning with `loss_mask` float32 [S], and where documents or
            instruction samples are kept apart `segments` and `position_ids` int64 [S].
    """
    optional = {name: _stack(samples, name) for name in _OPTIONAL if name in samples[0]}
    neighbors = None
    if "neighbor_tokens" in optional:
        neighbors = (optional["neighbor_tokens"], optional["neighbor_mask"])
    return RetroBatch.from_text(
        _stack(samples, "text"),
        neighbors,
        optional.get("loss_mask"),
        optional.get("segments"),
        [int(sample["sample_id"]) for sample in samples],
        optional.get("position_ids"),
    )


def _ones_like(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape, dtype=torch.float32, device=tokens.device)


def _stack(samples: Sequence[Mapping], key: str) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(sample[key]) for sample in samples]))
