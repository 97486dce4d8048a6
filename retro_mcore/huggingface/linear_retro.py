"""Norms and linear layers, with the deviations of their initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_retro import RetroConfig


class RetroNorm(nn.Module):
    """LayerNorm or RMSNorm; with `apply_layernorm_1p` its weight is stored minus one."""

    def __init__(self, config: RetroConfig, size: int) -> None:
        super().__init__()
        self.epsilon, self.centered = config.norm_epsilon, config.apply_layernorm_1p
        self.weight = nn.Parameter(torch.empty(size))
        has_bias = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.empty(size)) if has_bias else None

    def forward(self, states: Tensor) -> Tensor:
        """`[..., size]`, normed."""
        weight = self.weight + 1.0 if self.centered else self.weight
        if self.bias is None:
            return F.rms_norm(states, weight.shape, weight, self.epsilon)
        return F.layer_norm(states, weight.shape, weight, self.bias, self.epsilon)


class RetroAllHeadsNorm(RetroNorm):
    """RMSNorm over all heads together, in float32 as our model computes it."""

    def forward(self, states: Tensor) -> Tensor:
        """`[..., heads, channels]`, normed over the last two dimensions."""
        weight = self.weight.float() + 1.0 if self.centered else self.weight.float()
        wide = states.flatten(-2).float()
        mean_square = wide.square().sum(-1, keepdim=True) / wide.size(-1)
        normed = wide * torch.rsqrt(mean_square + self.epsilon) * weight
        return normed.to(states.dtype).view_as(states)


def linear(
    config: RetroConfig, rows: int, columns: int, bias: bool, *, output: bool = False,
    beta: float = 1.0, joined: int | None = None,
) -> nn.Linear:  # fmt: skip
    """A linear layer that knows the deviation of its initial weights.

    Args:
        config: The model's configuration.
        rows: Width of its output.
        columns: Width of its input.
        bias: Whether it has one.
        output: Whether its output is added to the stream.
        beta: DeepNorm's factor for it.
        joined: Rows of the matrix that it is a part of in Megatron, which Xavier's rule counts.
    """
    layer = nn.Linear(columns, rows, bias=bias)
    deviation = config.init_method_std / config.mup_width**0.5
    if config.retro_deepnorm:
        deviation = beta * (2.0 / (columns + rows)) ** 0.5
    elif config.init_method_xavier_uniform:
        deviation = (2.0 / (columns + (joined or rows))) ** 0.5
    elif output:
        deviation /= (2.0 * config.num_layers) ** 0.5
    layer.initial_deviation = deviation
    return layer
