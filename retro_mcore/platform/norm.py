"""LayerNorm and RMSNorm that work under sequence parallelism.

Megatron-Core's local norm refuses sequence parallelism and zero-centred gamma; both need no more
than a flag on the parameters and one addition.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from retro_mcore.errors import ConfigurationError


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
        return torch.nn.functional.layer_norm(states, weight.shape, weight, self.bias, self.eps)
