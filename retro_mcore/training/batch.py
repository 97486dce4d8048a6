"""From samples to the model's inputs.

A sample holds S+1 tokens: the first S are the input, the last S the labels. Every rank of a tensor
parallel group reads the same samples itself, so nothing is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RetroBatch:
    """A micro batch.

    Attributes:
        tokens: int64 [B, S].
        labels: int64 [B, S], the next token of each position.
        loss_mask: float32 [B, S], 1 where a position counts in the loss. Documents are packed
            without masking, as Megatron does unless told otherwise, so all of them count.
        position_ids: int64 [B, S], from 0 in each sample.
        retrieved_tokens: int64 [B*L*K, R], row (b*L + i)*K + j; None without retrieval.
        retrieved_mask: bool [B*L*K, R], True where there is only padding; None without retrieval.
        sample_ids: The samples' indices in their dataset, for error messages.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    retrieved_tokens: Tensor | None
    retrieved_mask: Tensor | None
    sample_ids: list[int]

    def to(self, device: torch.device) -> RetroBatch:
        """This batch on `device`."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> RetroBatch:
        """This batch in page-locked memory; the DataLoader calls it where it was asked to."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> RetroBatch:
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward pass but the labels."""
        inputs: dict[str, Tensor | None] = {
            "input_ids": self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": None,
        }
        if self.retrieved_tokens is not None:
            inputs["context_input_ids"] = self.retrieved_tokens
            inputs["context_position_ids"] = position_ids(self.retrieved_tokens)
            inputs["context_mask"] = self.retrieved_mask
        return inputs


def position_ids(tokens: Tensor) -> Tensor:
    """0, 1, 2, … along the last dimension of `tokens` [N, length]."""
    positions = torch.arange(tokens.shape[-1], dtype=torch.long, device=tokens.device)
    return positions.expand_as(tokens)


def collate(samples: Sequence[Mapping]) -> RetroBatch:
    """Samples of a dataset into a batch.

    Args:
        samples: Each with `text` int64 [S+1] and `sample_id`; with retrieval also
            `neighbor_tokens` int64 [L, K, R] and `neighbor_mask` bool [L, K, R].
    """
    text = _stack(samples, "text")
    tokens = text[:, :-1].contiguous()
    retrieved = mask = None
    if "neighbor_tokens" in samples[0]:
        retrieved = _stack(samples, "neighbor_tokens").flatten(0, 2)
        mask = _stack(samples, "neighbor_mask").flatten(0, 2)
    return RetroBatch(
        tokens=tokens,
        labels=text[:, 1:].contiguous(),
        loss_mask=torch.ones(tokens.shape, dtype=torch.float32),
        position_ids=position_ids(tokens).contiguous(),
        retrieved_tokens=retrieved,
        retrieved_mask=mask,
        sample_ids=[int(sample["sample_id"]) for sample in samples],
    )


def _stack(samples: Sequence[Mapping], key: str) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(sample[key]) for sample in samples]))
