"""Megatron-Core's MLP, keeping one of its two wide activations for the backward pass.

The states before the activation function are kept anyway, for its own backward pass; what it
returns, which the second linear layer would keep, is computed again from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Activation = Callable[[Tensor], Tensor]

# Keep their input and nothing else for the backward pass.
_KEEP_THEIR_INPUT = (torch.nn.functional.gelu, torch.nn.functional.silu)


class RecomputingMLP(MLP):
    """Megatron's MLP of local linear layers; equal to it bit for bit, with less kept.

    Args:
        config: The block's configuration.
        **kwargs: What a transformer layer of the installed release hands over; of it the process
            groups are used, where it has them.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        groups = kwargs.get("pg_collection")
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=None if groups is None else groups.tp,
        )

    def forward(self, hidden_states: Tensor, per_token_scale: Any = None, **kwargs: Any) -> Any:
        """`[S, B, D]` to `[S, B, D]` and the output's bias, which is not added yet."""
        if not torch.is_grad_enabled() or not self._is_plain(per_token_scale):
            output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
            # A view: megatron's checkpoint function makes what it returns a result of its own, and
            # would then look for the gradient of this parameter in itself without end.
            return output, None if bias is None else bias.view_as(bias)
        states, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            states = states + bias
        gated = self.config.gated_linear_unit
        activation = self._gate if gated else self.config.activation_func
        if activation in _KEEP_THEIR_INPUT:
            activated = activation(states)
        else:
            activated = _KeepingInput.apply(states, activation)
        return _apply_without_keeping(self.linear_fc2, activation, states, activated)

    def _is_plain(self, per_token_scale: Any) -> bool:
        """Whether nothing but the activation function stands between the linear layers."""
        return not (
            per_token_scale is not None
            or self.config.bias_activation_fusion
            or self.config.use_te_activation_func
            or self.config.activation_func_clamp_value is not None
            or self.config.glu_linear_offset
        )

    def _gate(self, states: Tensor) -> Tensor:
        gate, up = states.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up


class _KeepingInput(torch.autograd.Function):
    """A function of one tensor that keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, function: Activation) -> Tensor:
        ctx.save_for_backward(states)
        ctx.function = function
        return function(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (states,) = ctx.saved_tensors
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            output = ctx.function(states)
        (of_states,) = torch.autograd.grad(output, states, gradient)
        return of_states, None


def _apply_without_keeping(
    linear: torch.nn.Module, function: Activation, states: Tensor, activated: Tensor
) -> Any:
    """`linear(activated)`, not keeping `activated`, which is `function(states)`."""
    source, place = states.detach(), _place(activated)

    def pack(tensor: Tensor) -> Tensor | None:
        return None if _place(tensor) == place else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return function(source)

    with saved_tensors_hooks(pack, unpack):
        return linear(activated)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are; a simulated tensor has no address."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
