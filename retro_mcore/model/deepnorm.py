"""DeepNorm (Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", figure 2).

A sublayer f adds as x = Norm(alpha * x + f(x)), in place of x = x + f(Norm(x)), and the initial
weights that f's output is linear in are scaled by beta, so that the update that one step makes to
the model's output is bounded whatever the depth. There is no norm before a sublayer, and none
after the last layer, whose output is normed already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from retro_mcore.model.config import RetroConfig


class DeepNormAdd(MegatronModule):
    """Megatron's bias-dropout-add, the residual scaled, then a norm.

    Args:
        config: The block's configuration; its `deepnorm_alpha` scales the residual.
        norm: The norm's class.
    """

    def __init__(self, config: RetroConfig, norm: type, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.alpha = config.deepnorm_alpha
        self.norm = norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """A function of (output and bias, residual, dropout probability)."""
        bias_dropout_add = get_bias_dropout_add(training, fused)

        def add(output_and_bias: Any, residual: Tensor, probability: float) -> Tensor:
            output = output_and_bias[0]
            # Megatron calls this with gradients on, also where the model runs without: the norm's
            # parameters would then tie every layer's states into one graph.
            with torch.set_grad_enabled(output.requires_grad or residual.requires_grad):
                total = bias_dropout_add(output_and_bias, residual * self.alpha, probability)
                return self.norm(total)

        return add


class DeepNormCrossAdd(DeepNormAdd):
    """DeepNormAdd for the dictionaries that Retro's cross-attentions return.

    Positions that attend to nothing, and all of them where retrieval is off, stay as they are.
    """

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """A function of (attention's dictionary, residual, dropout probability)."""
        add_and_norm = super().forward(training, fused)

        def add(attention: dict[str, Any], stream: Tensor, probability: float) -> Tensor:
            if attention["output"] is None:
                return stream
            states = add_and_norm((attention["output"], attention["bias"]), stream, probability)
            attends = attention.get("attends")
            return states if attends is None else torch.where(attends, states, stream)

        return add
