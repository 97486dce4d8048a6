"""LayerNorm and RMSNorm that work under sequence parallelism.

Megatron-Core's local norm refuses sequence parallelism and zero-centred gamma; both need no more
than a flag on the parameters and one addition.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from retro_mcore.errors import ConfigurationError

_HALF = (torch.bfloat16, torch.float16)


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm over the hidden dimension, as `config.normalization` says.

    With `layernorm_zero_centered_gamma` (LayerNorm-1p) the stored weight is gamma - 1.

    Args:
        config: Gives `normalization`, `layernorm_zero_centered_gamma`, `sequence_parallel`.
        hidden_size: D.
        eps: Added to the variance.

    Raises:
        ConfigurationError: any other normalization.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ConfigurationError(
                "normalization", f"{config.normalization!r}", "Use 'LayerNorm' or 'RMSNorm'"
            )
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        for parameter in self.parameters():
            # Each rank norms its part of the sequence: megatron sums these gradients over TP.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gamma one, bias zero."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Norm `[..., D]` over the last dimension."""
        weight = self.weight + 1.0 if self.zero_centered_gamma else self.weight
        if self.bias is None:
            return torch.nn.functional.rms_norm(states, weight.shape, weight, self.eps)
        if states.dtype in _HALF and states.device.type == "cpu" and type(states) is Tensor:
            return _HalfLayerNorm.apply(states, weight, self.bias, self.eps)  # not if simulated
        return torch.nn.functional.layer_norm(states, weight.shape, weight, self.bias, self.eps)


class _HalfLayerNorm(torch.autograd.Function):
    """LayerNorm in half precision whose gradients are computed in single precision.

    PyTorch's on the CPU sums those of weight and bias in half precision: over 16,384 rows in bf16
    they are off by 15% (2.13).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(states, weight, bias)
        ctx.eps = eps
        return torch.nn.functional.layer_norm(states, weight.shape, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = (saved.float() for saved in ctx.saved_tensors)
        _, mean, deviation = torch.native_layer_norm(states, weight.shape, weight, bias, ctx.eps)
        gradients = torch.ops.aten.native_layer_norm_backward(
            *(gradient.float(), states, weight.shape, mean, deviation, weight, bias),
            [*ctx.needs_input_grad[:3]],
        )
        found = zip(gradients, ctx.saved_tensors, strict=True)
        return *(each if each is None else each.to(saved.dtype) for each, saved in found), None
