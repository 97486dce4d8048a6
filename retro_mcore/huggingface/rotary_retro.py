"""Rotary position embedding.

Shapes: S tokens of the pass, C channels per head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .configuration_retro import RetroConfig

#: Cosines and sines of rotary angles, `[..., S, rotated channels]`.
Angles = tuple[Tensor, Tensor]


class Rotary:
    """Rotary position embedding, in float32 whatever the model's precision.

    Args:
        config: Gives base, scaling and interleaving.
        channels: Width of a head.
        stretched: Whether scaling and interpolation apply.
        whole: Rotate all channels by the usual periods, as cross-attention does.
    """

    def __init__(
        self, config: RetroConfig, channels: int, stretched: bool = True, whole: bool = False
    ) -> None:
        self._size = channels if whole else int(channels * config.rotary_percent)
        self._base = 10000 if whole else config.rotary_base
        stretched = stretched and not whole
        self._factor = config.rope_scaling_factor if stretched and config.use_rope_scaling else None
        self._interpolation = config.rotary_seq_len_interpolation_factor if stretched else None
        self._interleaved = config.rotary_interleaved

    def angles(self, positions: Tensor) -> Angles:
        """Angles of positions `[...]`."""
        positions = positions.float()
        if self._interpolation is not None:
            positions = positions * (1 / self._interpolation)
        angles = positions[..., None] * self._frequencies(positions.device)
        if self._interleaved:
            angles = angles.repeat_interleave(2, -1)
        else:
            angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def rotate(self, states: Tensor, angles: Angles) -> Tensor:
        """`[..., S, C]`, its first channels rotated."""
        cosines, sines = (each.to(states.device, states.dtype) for each in angles)
        rotated, rest = states.split((self._size, states.size(-1) - self._size), dim=-1)
        if self._interleaved:
            turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
        else:
            turned = torch.cat(
                (-rotated[..., self._size // 2 :], rotated[..., : self._size // 2]), -1
            )
        return torch.cat((rotated * cosines + turned * sines, rest), -1)

    def _frequencies(self, device: torch.device) -> Tensor:
        steps = torch.arange(0, self._size, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (self._base ** (steps / self._size))
        return frequencies if self._factor is None else _stretch(frequencies, self._factor)


def _stretch(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's scaling, for models trained on 8,192 tokens: long periods are multiplied."""
    trained, low, high = 8192, 1, 4
    periods = 2 * math.pi / frequencies
    scaled = torch.where(periods > trained / low, frequencies / factor, frequencies)
    smooth = (trained / periods - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(periods < trained / high) & ~(periods > trained / low)
    return torch.where(is_between, between, scaled)
