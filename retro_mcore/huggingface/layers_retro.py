"""Layers of Retro: decoder with chunked cross-attention, and neighbor encoder.

Shapes: B batch, S tokens of the pass, N chunks, M chunk length, K neighbors, R retrieved length,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_retro import RetroChunkedCrossAttention, RetroCrossAttention, RetroSelfAttention
from .chunks_retro import ChunkPlan, RetroCache
from .configuration_retro import BlockSizes, RetroConfig
from .linear_retro import RetroNorm, linear
from .mlp_retro import RetroExperts, RetroMLP
from .rotary_retro import Angles, Rotary


class _Sublayers(nn.Module):
    """How sublayers are added: x + f(Norm(x)), or DeepNorm's Norm(alpha * x + f(x)).

    A family may also norm a sublayer's output, or multiply it, before it is added.
    """

    config: RetroConfig
    sizes: BlockSizes

    def _norms(self) -> tuple[RetroNorm | None, RetroNorm | None]:
        """The norms before a sublayer and after it; families differ in which they have."""
        place, size = self.sizes.sublayer_norms, self.sizes.hidden_size
        before = RetroNorm(self.config, size) if place in ("pre", "both") else None
        return before, RetroNorm(self.config, size) if place in ("post", "both") else None

    def _before(self, norm: nn.Module | None, states: Tensor) -> Tensor:
        return states if norm is None or self.config.retro_deepnorm else norm(states)

    def _add(
        self, norm: nn.Module | None, stream: Tensor, update: Tensor,
        post_norm: nn.Module | None = None, multiplier: float = 1.0,
    ) -> Tensor:  # fmt: skip
        update = update if post_norm is None else post_norm(update)
        update = update if multiplier == 1.0 else update * multiplier
        update = F.dropout(update, self.sizes.hidden_dropout, self.training)
        if self.config.retro_deepnorm:
            assert norm is not None
            return norm(stream * self.sizes.residual_scale + update)
        return stream + update


class RetroDecoderLayer(GradientCheckpointingLayer, _Sublayers):
    """A decoder layer: self-attention, in some layers cross-attention to neighbors, MLP."""

    def __init__(self, config: RetroConfig, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.config, self.sizes, self.index = config, config.decoder_sizes(), index
        self.self_attn_norm, self.self_attn_post_norm = self._norms()
        self.self_attn = RetroSelfAttention(config, self.sizes, rotary)
        self.cross_attn: RetroChunkedCrossAttention | None = None
        if index + 1 in config.cross_attention_layers:
            self.cross_attn_norm = RetroNorm(config, config.hidden_size)
            encoder_width = config.encoder_sizes().hidden_size
            self.cross_attn = RetroChunkedCrossAttention(config, self.sizes, encoder_width)
        self.mlp_norm, self.mlp_post_norm = self._norms()
        has_experts = config.has_experts(index + 1)
        self.mlp = (RetroExperts if has_experts else RetroMLP)(config, self.sizes)

    def forward(
        self, states: Tensor, neighbors: Tensor | None, *, angles: Angles | None,
        attention_mask: Tensor | None, causal: bool, plan: ChunkPlan | None,
        encode: Callable[[Tensor, Tensor | None], Tensor | None] | None,
        past_key_values: RetroCache | None, past: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Run the layer.

        Args:
            states: `[B, S, D]`.
            neighbors: Those of the plan's chunks: embedded for the first layer with
                cross-attention, encoded for the others.
            angles: Rotary angles of the positions.
            attention_mask, causal: See `attend`.
            plan: The chunks of the pass; None: retrieval is off.
            encode: The encoder, for the first layer with cross-attention.
            past_key_values: The cache, if any.
            past: Cached tokens.

        Returns:
            The states, and the encoded neighbors for later layers.
        """
        cache, layer_input = past_key_values, states
        attended = self.self_attn(
            self._before(self.self_attn_norm, states), angles, attention_mask, causal, cache,
            self.index,
        )  # fmt: skip
        multiplier = self.sizes.residual_multiplier
        states = self._add(
            self.self_attn_norm, states, attended, self.self_attn_post_norm, multiplier
        )
        if self.cross_attn is not None and (plan is not None or encode is not None):
            normed = self._before(self.cross_attn_norm, states)
            if encode is not None:
                neighbors = encode(normed, neighbors)
            if plan is not None and (neighbors is not None or _attends_earlier(cache)):
                update, attends = self.cross_attn(normed, neighbors, plan, cache, self.index, past)
                update = update * self.config.retro_attention_gate
                added = self._add(self.cross_attn_norm, states, update)
                states = torch.where(attends, added, states)
        mlp_input = layer_input if self.sizes.parallel_residual else states
        mlp = self.mlp(self._before(self.mlp_norm, mlp_input))
        return self._add(self.mlp_norm, states, mlp, self.mlp_post_norm, multiplier), neighbors


def _attends_earlier(cache: RetroCache | None) -> bool:
    return cache is not None and getattr(cache, "has", None) is not None


class RetroEncoderLayer(_Sublayers):
    """A bidirectional layer of the neighbor encoder; the first also attends to the chunk."""

    def __init__(self, config: RetroConfig, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.config, self.sizes = config, config.encoder_sizes()
        self.self_attn_norm, self.self_attn_post_norm = self._norms()
        self.self_attn = RetroSelfAttention(config, self.sizes, rotary)
        self.cross_attn: RetroCrossAttention | None = None
        if index == 0:
            self.cross_attn_norm = RetroNorm(config, self.sizes.hidden_size)
            self.cross_attn = RetroCrossAttention(config, self.sizes, config.hidden_size)
        self.mlp_norm, self.mlp_post_norm = self._norms()
        self.mlp = RetroMLP(config, self.sizes)

    def forward(
        self, states: Tensor, chunks: Tensor, mask: Tensor | None, angles: Angles | None
    ) -> Tensor:
        """Run the layer.

        Args:
            states: `[N * K, R, D]`.
            chunks: `[N, M, decoder's D]`, the retrieving chunks.
            mask: bool `[N * K, 1, 1, R]`, True = attended to.
            angles: Of a neighbor's positions.
        """
        attended = self.self_attn(self._before(self.self_attn_norm, states), angles, mask)
        states = self._add(self.self_attn_norm, states, attended)
        if self.cross_attn is not None:
            normed = self._before(self.cross_attn_norm, states)
            joined = normed.unflatten(0, (chunks.size(0), -1)).flatten(1, 2)
            update = self.cross_attn(joined, chunks).view_as(states)
            residual = normed if self.config.retro_encoder_residual == "normed" else states
            states = self._add(self.cross_attn_norm, residual, update)
        mlp = self.mlp(self._before(self.mlp_norm, states))
        return self._add(self.mlp_norm, states, mlp)


class RetroNeighborEncoder(nn.Module):
    """Encodes each neighbor, conditioned on the chunk that retrieved it."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.encoder_sizes()
        rotates = config.position_embedding_type == "rope" and config.retro_encoder_positions
        scaled = sizes.channels == config.kv_channels or config.retro_encoder_rotary_scaling
        self.rotary = Rotary(config, sizes.channels, stretched=scaled) if rotates else None
        self.input_projection: nn.Linear | None = None
        if sizes.hidden_size != config.hidden_size:
            widths = (sizes.hidden_size, config.hidden_size)
            self.input_projection = linear(config, *widths, bias=False)
        self.layers = nn.ModuleList(
            RetroEncoderLayer(config, index, self.rotary)
            for index in range(config.retro_encoder_num_layers)
        )

    def forward(self, embedded: Tensor, chunks: Tensor, mask: Tensor | None) -> Tensor:
        """Encode neighbors.

        Args:
            embedded: `[N * K, R, D]`.
            chunks: `[N, M, D]`, the decoder's states of the retrieving chunks.
            mask: bool `[N * K, R]`, True = real. None: all tokens are.

        Returns:
            `[N, K * R, encoder's D]`.
        """
        if self.config.retro_encoder_input == "normed":
            embedded = F.rms_norm(embedded, embedded.shape[-1:], eps=self.config.norm_epsilon)
        states = embedded if self.input_projection is None else self.input_projection(embedded)
        angles = None
        if self.rotary is not None:
            angles = self.rotary.angles(torch.arange(states.size(1), device=states.device))
        if mask is not None:
            # A missing neighbor attends to all of itself; the result is not read.
            mask = (mask | ~mask.any(1, keepdim=True)).to(states.device)[:, None, None]
        for layer in self.layers:
            states = layer(states, chunks.to(states.device), mask, angles)
        return states.unflatten(0, (chunks.size(0), -1)).flatten(1, 2)
