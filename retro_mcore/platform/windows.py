"""Sliding windows of self-attention, under Megatron's names and with its meaning."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

_SHARED: list[Any] = []


def shared_by_layers(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of hashable arguments that makes a mask: layers get the same tensor."""
    cached = lru_cache(maxsize=8)(mask)
    _SHARED.append(cached)
    return cached


def forget_masks() -> None:
    """Forget the masks that layers share."""
    for cached in _SHARED:
        cached.cache_clear()


def layer_window(config: Any, layer_number: int) -> int | None:
    """Number of tokens that a position of a layer attends to, itself included; None: all.

    Args:
        config: A TransformerConfig: `window_size` (tokens before a position, and after it) and
            `window_attn_skip_freq`, which says which layers have it.
        layer_number: The layer's number, from 1.
    """
    size, layers = config.window_size, config.window_attn_skip_freq
    if not is_layer_window_attention(size, layers, layer_number) or size[0] < 0:
        return None
    return int(size[0]) + 1


@shared_by_layers
def window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Causal mask of a window: bool `[queries, keys]`, True = attended to.

    The last query stands at the last key. All layers share the mask, and keep it for the backward
    pass.
    """
    with torch.inference_mode(mode=False):
        every = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return every.tril(keys - queries).triu(keys - queries + 1 - window)
