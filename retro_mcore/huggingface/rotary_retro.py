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
        config: Gives base, share of the channels, scaling, frequencies and interleaving.
        channels: Width of a head.
        base: Base period of an embedding that rotates all channels and is not scaled, as
            cross-attention and Gemma 3's local layers have. None: the decoder's embedding.
        stretched: Whether scaling, interpolation and own frequencies apply.
    """

    def __init__(
        self,
        config: RetroConfig,
        channels: int,
        base: float | None = None,
        stretched: bool = True,
    ) -> None:
        decoders = int(config.kv_channels * config.rotary_percent)
        self._size = int(channels * config.rotary_percent) if base is None else channels
        self._base = config.rotary_base if base is None else base
        stretched = stretched and base is None
        #: Channels of the embedding whose frequencies are taken.
        self._given_size = decoders if stretched else self._size
        self._factor = config.rope_scaling_factor if stretched and config.use_rope_scaling else None
        self._interpolation = config.rotary_seq_len_interpolation_factor if stretched else None
        self._given = config.rotary_frequencies if stretched else None
        self._interleaved = config.rotary_interleaved
        #: Whether `rotary_attention_factor` applies: to the decoder's embedding alone.
        self.has_factor = base is None

    @property
    def rotated_channels(self) -> int:
        """Number of channels that are rotated, the first ones of a head."""
        return self._size

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
        frequencies = self._given_frequencies(device)
        pairs = len(range(0, self._size, 2))
        return frequencies if len(frequencies) == pairs else _resample(frequencies, pairs)

    def _given_frequencies(self, device: torch.device) -> Tensor:
        if self._given is not None:
            return torch.tensor(self._given, dtype=torch.float32, device=device)
        steps = torch.arange(0, self._given_size, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (self._base ** (steps / self._given_size))
        return frequencies if self._factor is None else _stretch(frequencies, self._factor)


def _resample(frequencies: Tensor, pairs: int) -> Tensor:
    """Frequencies of another number of pairs of channels, each at its share of the channels."""
    logs = frequencies.double().log()
    places = torch.arange(pairs, dtype=torch.float64, device=logs.device) * (len(logs) / pairs)
    first = places.long().clamp(max=max(len(logs) - 2, 0))
    second = (first + 1).clamp(max=len(logs) - 1)
    return torch.lerp(logs[first], logs[second], places - first).exp().float()


def _stretch(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's scaling, for models trained on 8,192 tokens: long periods are multiplied."""
    trained, low, high = 8192, 1, 4
    periods = 2 * math.pi / frequencies
    scaled = torch.where(periods > trained / low, frequencies / factor, frequencies)
    smooth = (trained / periods - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(periods < trained / high) & ~(periods > trained / low)
    return torch.where(is_between, between, scaled)
