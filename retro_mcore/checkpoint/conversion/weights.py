"""Weights of whole models, read only when they are wanted.

Every reader of a checkpoint gives a dictionary from our own parameter names, as an unsharded model
with local layers has them, to `Weight`; every writer takes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.names import split_expert_name


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint.

    Attributes:
        shape: Of the whole tensor, over all tensor parallel ranks.
        dtype: As it is stored.
        load: Reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        """A tensor that is in memory (or mapped into it) already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


Weights = Mapping[str, Weight]

_COLUMN = ("linear_qkv", "linear_q", "linear_kv", "linear_fc1", "word_embeddings", "output_layer")
_ROW = ("linear_proj", "linear_fc2")


def partition_dim(name: str) -> int | None:
    """The dimension that tensor parallelism cuts; None for what every rank holds whole.

    >>> partition_dim("decoder.layers.0.mlp.linear_fc2.weight")
    1
    """
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    if module in _COLUMN and kind in ("weight", "bias"):
        return 0
    return 1 if module in _ROW and kind == "weight" else None


def stack_experts(weights: Weights) -> dict[str, Weight]:
    """Weights as Megatron stores them: those of a layer's experts as one tensor."""
    stacked: dict[str, dict[int, Weight]] = {}
    others: dict[str, Weight] = {}
    for name, weight in weights.items():
        found = split_expert_name(name)
        if found is None:
            others[name] = weight
        else:
            stacked.setdefault(found[0], {})[found[1]] = weight
    return others | {name: _stack(experts) for name, experts in stacked.items()}


def _stack(experts: Mapping[int, Weight]) -> Weight:
    parts = [experts[number] for number in range(len(experts))]
    shape, dtype = (len(parts), *parts[0].shape), parts[0].dtype
    return Weight(shape, dtype, lambda: torch.stack([part.load() for part in parts]))


def is_vocabulary(name: str) -> bool:
    """Whether its rows are the padded vocabulary."""
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def cut(name: str, whole: Tensor, rank: int, size: int, gated: bool) -> Tensor:
    """A tensor parallel rank's part.

    Args:
        name: Of the parameter.
        whole: The weight of the whole model.
        rank: Tensor parallel rank.
        size: Tensor parallel size; it divides the dimension that is cut.
        gated: Whether the MLP's first layer holds [gate; up], each of which is cut.
    """
    dim = partition_dim(name)
    if dim is None or size == 1:
        return whole
    if gated and "linear_fc1." in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank]


def join(name: str, parts: Sequence[Tensor], gated: bool) -> Tensor:
    """The whole weight from the parts of all tensor parallel ranks; the inverse of `cut`."""
    dim = partition_dim(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    if gated and "linear_fc1." in name:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat((*gates, *ups))
    return torch.cat(list(parts), dim)


def joined_weight(name: str, parts: Sequence[Weight], gated: bool) -> Weight:
    """`join`, when it is wanted."""
    dim = partition_dim(name)
    shape = list(parts[0].shape)
    if dim is not None:
        shape[dim] = sum(part.shape[dim] for part in parts)
    return Weight(
        tuple(shape), parts[0].dtype, lambda: join(name, [part.load() for part in parts], gated)
    )


def fit_vocabulary(whole: Tensor, rows: int, vocab_size: int) -> Tensor:
    """The same vocabulary with another padding.

    New padding rows are the mean of the real ones: as an output weight such a row gives the mean
    logit, so that by Jensen's inequality P rows of padding raise no token's loss by more than
    log(1 + P / V). (Rows of zeros would give a logit of 0, which a trained model's real logits may
    all lie below.)

    Args:
        whole: `[padded vocabulary, D]`.
        rows: The padded vocabulary wanted, at least `vocab_size`.
        vocab_size: V, the tokenizer's.
    """
    if rows == whole.size(0):
        return whole
    if rows < whole.size(0):
        return whole[:rows]
    padding = whole[:vocab_size].float().mean(0).to(whole.dtype)
    return torch.cat([whole, padding.expand(rows - whole.size(0), -1)])
