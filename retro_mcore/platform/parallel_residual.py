"""A transformer layer whose MLP reads the layer's input (GPT-J, GPT-NeoX)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class ParallelResidual:
    """Mixin for Megatron's TransformerLayer: x + attention(norm(x)) + MLP(norm(x)).

    A cross-attention in between adds to the stream as usual; the MLP does not see it. `mlp_bda`
    must add to its `stream` instead of the residual that it is given.
    """

    _layer_input: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLayer's forward."""
        self._layer_input = args[0] if args else kwargs["hidden_states"]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._layer_input = None

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.mlp_bda.stream = hidden_states  # type: ignore[attr-defined]
        try:
            return super()._forward_mlp(self._layer_input, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.mlp_bda.stream = None  # type: ignore[attr-defined]
