"""Core attention through PyTorch's scaled_dot_product_attention.

Takes the place of Megatron-Core's local DotProductAttention, which builds the whole score matrix.
PyTorch chooses its flash, memory-efficient or plain kernel by device, dtype and mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.windows import layer_window, shared_by_layers, window_mask


class SDPAttention(MegatronModule):
    """Scaled dot-product attention in Megatron's `[S, B, heads, channels]` layout.

    Works on this tensor-parallel rank's heads; grouped queries need no repeated keys.

    Args:
        config: Gives dropout, scaling and the options that are refused.
        layer_number: 1-based, for windows.
        attn_mask_type: The mask when `forward` is given none: causal or nothing.
        attention_dropout: Overrides the config's.
        softmax_scale: Overrides 1 / sqrt(channels).

    Raises:
        ConfigurationError: the configuration asks for something that these kernels cannot do.
    """

    #: Whether a rank that holds a part of each sequence attends to all of it.
    gathers_keys = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        if config.context_parallel_size > 1 and attention_type == "self" and not self.gathers_keys:
            raise ConfigurationError(
                "context_parallel_size",
                f"{config.context_parallel_size} with an attention within one rank",
                "Build the layers with this package's layer specs",
            )
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # Megatron's `apply_query_key_layer_scaling` changes nothing: its softmax multiplies the
        # scores by what they were divided by. It is for kernels that keep scores in fp16.
        self.softmax_scale = softmax_scale
        #: Limit of the scores (`FamilyOptions.attention_softcap`), in self-attention only.
        self.softcap = getattr(config, "attention_softcap", None)
        #: Tokens that a position attends to; None: all.
        self.window = layer_window(config, layer_number)
        if attention_type != "self":
            self.softcap = self.window = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[Sq, B, heads, channels]`.
            key, value: `[Sk, B, groups, channels]`.
            attention_mask: bool, broadcastable to `[B, heads, Sq, Sk]`, True = masked out. No row
                may be masked out whole. None: causal if the mask type says so, else everything.
            attention_bias: added to the scores, likewise broadcastable.

        Returns:
            `[Sq, B, heads * channels]`.
        """
        if packed_seq_params is not None:
            raise ConfigurationError(
                "packed_seq_params",
                "given to an attention that takes masks",
                "Give them to the model's forward pass, which makes a mask of them",
            )
        mask_type = attn_mask_type or self.attn_mask_type
        causal = attention_mask is None and mask_type in (
            AttnMaskType.causal,
            AttnMaskType.padding_causal,
        )
        mask = None if attention_mask is None else ~attention_mask
        band = self._band(query, key)
        if band is not None:
            mask, causal = band if mask is None else mask & band, False
        if attention_bias is not None:
            mask, causal = _merge_bias(attention_bias, mask, causal, query, key), False
        dropout = self.dropout if self.training else 0.0
        attend_here = partial(
            attend,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        if self.softcap is not None:
            attend_here = partial(
                attend_here, function=partial(attend_capped, softcap=self.softcap)
            )
        with self._dropout_random_state(dropout):
            if causal and _pays_off_in_halves(query, key):
                output = attend_in_halves(attend_here, query, key, value)
            else:
                causal = causal and query.size(0) > 1
                output = attend_here(query, key, value, attn_mask=mask, is_causal=causal)
        return output.flatten(2)

    def _band(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The window's mask, if there are more keys than it holds."""
        if self.window is None or key.size(0) <= self.window:
            return None
        return window_mask(query.size(0), key.size(0), self.window, query.device)

    def _dropout_random_state(self, dropout: float) -> Any:
        # Ranks hold different heads, so they must not drop the same entries. Under sequence
        # parallelism the whole block already runs in the forked state.
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    function: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention,
    **kwargs: Any,
) -> Tensor:
    """PyTorch's function, or `attend_capped`, in Megatron's layout."""
    query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
    return function(query, key, value, **kwargs).permute(2, 0, 1, 3)


def attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention with scores s limited to c * tanh(s / c); it holds all scores.

    Args:
        query, key, value: `[B, heads, S, channels]`.
        softcap: c.
        attn_mask: bool, True = attended to, or a bias of the limited scores.
        dropout_p, is_causal, scale, enable_gqa: As PyTorch takes them.
    """
    if enable_gqa:
        repeats = query.size(1) // key.size(1)
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.size(-1) ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.float().softmax(-1).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout_p) @ value


def _pays_off_in_halves(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's causal CPU kernel computes many scores that its mask hides.

    It looks at 512 keys at a time, hidden or not; benchmarks/causal_halves.py shows in which range
    halves are faster.
    """
    length = query.size(0)
    return query.device.type == "cpu" and 384 <= length <= 576 and length == key.size(0)


def attend_in_halves(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Causal attention; the first half of the queries sees the first half of the keys alone.

    Args:
        attend: `attend` of this module, or what calls it with more options.
        query, key, value: `[S, B, heads, channels]`, on the CPU.

    Returns:
        `[S, B, heads, channels]`.
    """
    half = query.size(0) // 2
    first = attend(query[:half], key[:half], value[:half], is_causal=True)
    mask = _mask_of_second_half(query.size(0), query.dtype)
    return torch.cat((first, attend(query[half:], key, value, attn_mask=mask)))


@shared_by_layers
def _mask_of_second_half(length: int, dtype: torch.dtype) -> Tensor:
    """What to add to its scores. One for all layers, which keep it for the backward pass."""
    half = length // 2
    with torch.inference_mode(mode=False):
        return torch.full((length - half, length), float("-inf"), dtype=dtype, device="cpu").triu(
            half + 1
        )


def _refuse_unsupported(config: TransformerConfig) -> None:
    unsupported = {
        "softmax_type": getattr(config, "softmax_type", "vanilla") != "vanilla",
    }
    for field, set_by_user in unsupported.items():
        if set_by_user:
            raise ConfigurationError(
                field,
                f"{getattr(config, field)!r} needs Transformer Engine's attention",
                "Use the Transformer Engine spec, or leave the option at its default",
            )


def _merge_bias(
    bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor
) -> Tensor:
    if causal:
        size = (query.size(0), key.size(0))
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias.to(query.dtype)
    return bias.to(query.dtype).masked_fill(~mask, float("-inf"))
