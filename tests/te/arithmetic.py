"""Transformer Engine's modules computed in plain PyTorch, from what the modules themselves hold.

Its kernels need a GPU. What they are told does not: widths, norms, scales, windows and masks lie in
the modules, and come with each call. So this shows whether they are told the same as local modules,
not whether they compute it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional


def _norm(states: Tensor, weight: Tensor, bias: Tensor | None, kind: str, module: Any) -> Tensor:
    gain = weight + 1 if module.zero_centered_gamma else weight
    if kind == "RMSNorm":
        return functional.rms_norm(states, gain.shape, gain, module.eps)
    return functional.layer_norm(states, gain.shape, gain, bias, module.eps)


def _layer_norm(self: Any, states: Tensor) -> Tensor:
    return _norm(states, self.weight, self.bias, "LayerNorm", self)


def _rms_norm(self: Any, states: Tensor) -> Tensor:
    return _norm(states, self.weight, None, "RMSNorm", self)


def _linear(self: Any, states: Tensor, is_first_microbatch: bool | None = None) -> Any:
    bias = self.bias if self.use_bias else None
    output = functional.linear(states, self.weight, bias if self.apply_bias else None)
    return (output, bias) if self.return_bias else output


def _norm_and_linear(self: Any, states: Tensor, is_first_microbatch: bool | None = None) -> Any:
    weight, bias = self.layer_norm_weight, self.layer_norm_bias
    return _linear(self, _norm(states, weight, bias, self.normalization, self))


def _attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    attn_mask_type: str | None = None,
) -> Tensor:
    """`[S, B, heads, channels]` to `[S, B, heads * channels]`; a causal mask reads no other."""
    told = (self.qkv_format, self.softcap, self.softmax_type, attn_mask_type, self.training)
    assert told == ("sbhd", 0.0, "vanilla", "causal", False)
    assert key.size(2) == self.num_gqa_groups_per_partition
    left, right = self.window_size
    assert right == 0
    seen = torch.ones(query.size(0), key.size(0), dtype=torch.bool).tril()
    seen = seen if left < 0 else seen.triu(-left)
    repeats = query.size(2) // key.size(2)
    key, value = (states.repeat_interleave(repeats, dim=2) for states in (key, value))
    scores = torch.einsum("sbhc,tbhc->bhst", query, key) * self.softmax_scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhc->sbhc", weights, value).flatten(2)


@contextmanager
def computed_here() -> Iterator[None]:
    """Within it, Transformer Engine's modules run."""
    from transformer_engine import pytorch

    computed = {
        pytorch.Linear: _linear,
        pytorch.LayerNormLinear: _norm_and_linear,
        pytorch.LayerNorm: _layer_norm,
        pytorch.RMSNorm: _rms_norm,
        pytorch.DotProductAttention: _attention,
    }
    with ExitStack() as patched:
        for kind, forward in computed.items():
            patched.enter_context(mock.patch.object(kind, "forward", forward))
        yield
