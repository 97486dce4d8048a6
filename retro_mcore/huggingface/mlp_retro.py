"""MLPs, and mixtures of experts.

Shapes: T tokens, D hidden size, E experts, k experts of a token.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_retro import BlockSizes, RetroConfig
from .linear_retro import linear


class RetroMLP(nn.Module):
    """The MLP, gated or not."""

    def __init__(self, config: RetroConfig, sizes: BlockSizes) -> None:
        super().__init__()
        width, inner, beta = sizes.hidden_size, sizes.ffn_hidden_size, sizes.deepnorm_beta
        biases = not config.disable_bias_linear
        part = partial(linear, config, inner, width, biases, beta=beta)
        self.gate_proj = part(joined=2 * inner) if config.swiglu else None
        self.up_proj = part(joined=2 * inner) if config.swiglu else part()
        self.down_proj = linear(config, width, inner, biases, output=True, beta=beta)
        self.kind = "relu" if config.squared_relu else "tanh" if config.openai_gelu else "gelu"

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        inner = self.up_proj(states)
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(states)) * inner)
        if self.kind == "relu":
            return self.down_proj(F.relu(inner).square())
        return self.down_proj(F.gelu(inner, approximate="tanh" if self.kind == "tanh" else "none"))
