"""Layers of Retro: decoder with chunked cross-attention, and neighbor encoder.

Shapes: B batch, S tokens of the pass, N chunks, M chunk length, K neighbors, R retrieved length,
D hidden size, H heads, G key and value heads, C channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .chunks_retro import ChunkPlan, RetroCache
from .configuration_retro import BlockSizes, RetroConfig

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


class RetroNorm(nn.Module):
    """LayerNorm or RMSNorm; with `apply_layernorm_1p` its weight is stored minus one."""

    def __init__(self, config: RetroConfig, size: int) -> None:
        super().__init__()
        self.epsilon, self.centered = config.norm_epsilon, config.apply_layernorm_1p
        self.weight = nn.Parameter(torch.empty(size))
        has_bias = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.empty(size)) if has_bias else None

    def forward(self, states: Tensor) -> Tensor:
        """`[..., size]`, normed."""
        weight = self.weight + 1.0 if self.centered else self.weight
        if self.bias is None:
            return F.rms_norm(states, weight.shape, weight, self.epsilon)
        return F.layer_norm(states, weight.shape, weight, self.bias, self.epsilon)


def linear(
    config: RetroConfig, rows: int, columns: int, bias: bool, *, output: bool = False,
    beta: float = 1.0, joined: int | None = None,
) -> nn.Linear:  # fmt: skip
    """A linear layer that knows the deviation of its initial weights.

    Args:
        config: The model's configuration.
        rows: Width of its output.
        columns: Width of its input.
        bias: Whether it has one.
        output: Whether its output is added to the stream.
        beta: DeepNorm's factor for it.
        joined: Rows of the matrix that it is a part of in Megatron, which Xavier's rule counts.
    """
    layer = nn.Linear(columns, rows, bias=bias)
    deviation = config.init_method_std / config.mup_width**0.5
    if config.retro_deepnorm:
        deviation = beta * (2.0 / (columns + rows)) ** 0.5
    elif config.init_method_xavier_uniform:
        deviation = (2.0 / (columns + (joined or rows))) ** 0.5
    elif output:
        deviation /= (2.0 * config.num_layers) ** 0.5
    layer.initial_deviation = deviation
    return layer


def attend(
    module: RetroSelfAttention | RetroCrossAttention, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None,
    scale: float, dropout: float, causal: bool = False,
) -> Tensor:  # fmt: skip
    """Attention with the implementation that the model was loaded with.

    Args:
        module: Gives `config` and whether it trains.
        query: `[B, H, S, C]`.
        key, value: `[B, G, T, C]`.
        mask: Broadcastable to `[B, H, S, T]`: bool, True = attended to, or a float to add.
        scale: Factor of the scores.
        dropout: Rate in training.
        causal: Only keys up to the query's position; without mask.

    Returns:
        `[B, S, H * C]`.
    """
    dropout = dropout if module.training else 0.0
    if module.config._attn_implementation == "eager":
        attended = _attend_eagerly(query, key, value, mask, scale, dropout, causal)
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale,
            enable_gqa=key.size(1) != query.size(1),
        )  # fmt: skip
    return attended.transpose(1, 2).flatten(2)


def _attend_eagerly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return F.dropout(weights.to(query.dtype), dropout) @ value


class RetroSelfAttention(nn.Module):
    """Self-attention of the decoder, or of the neighbor encoder."""

    def __init__(self, config: RetroConfig, sizes: BlockSizes, rotary: Rotary | None) -> None:
        super().__init__()
        self.config, self.sizes, self.rotary = config, sizes, rotary
        width, queries = sizes.hidden_size, sizes.heads * sizes.channels
        keys, biases = sizes.groups * sizes.channels, not config.disable_bias_linear
        in_bias, beta = biases or config.add_qkv_bias, sizes.deepnorm_beta
        joined = queries + 2 * keys
        self.q_proj = linear(config, queries, width, in_bias, joined=joined)
        self.k_proj = linear(config, keys, width, in_bias, joined=joined)
        self.v_proj = linear(config, keys, width, in_bias, beta=beta, joined=joined)
        self.o_proj = linear(config, width, queries, biases, output=True, beta=beta)
        self.q_norm = RetroNorm(config, sizes.channels) if config.qk_layernorm else nn.Identity()
        self.k_norm = RetroNorm(config, sizes.channels) if config.qk_layernorm else nn.Identity()

    def forward(
        self, states: Tensor, angles: Angles | None, mask: Tensor | None, causal: bool = False,
        cache: RetroCache | None = None, layer: int = 0,
    ) -> Tensor:  # fmt: skip
        """`[B, S, D]` to `[B, S, D]`; see `attend` for the mask."""
        sizes = self.sizes
        query = self.q_norm(self.q_proj(states).unflatten(-1, (sizes.heads, sizes.channels)))
        key = self.k_norm(self.k_proj(states).unflatten(-1, (sizes.groups, sizes.channels)))
        value = self.v_proj(states).unflatten(-1, (sizes.groups, sizes.channels)).transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary is not None and angles is not None:
            query, key = self.rotary.rotate(query, angles), self.rotary.rotate(key, angles)
        if cache is not None:
            key, value = cache.update(key, value, layer)
        attended = attend(
            self, query, key, value, mask, sizes.softmax_scale, sizes.attention_dropout, causal
        )
        return self.o_proj(attended)


class RetroCrossAttention(nn.Module):
    """Projections of both cross-attentions, and the neighbor encoder's own forward pass.

    Args:
        config: The model's configuration.
        sizes: Those of the block that it belongs to.
        key_value_size: Width of what is attended to.
    """

    def __init__(self, config: RetroConfig, sizes: BlockSizes, key_value_size: int) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        queries, keys = sizes.heads * sizes.channels, sizes.groups * sizes.channels
        biases, beta = not config.disable_bias_linear, sizes.deepnorm_beta
        self.q_proj = linear(config, queries, sizes.hidden_size, biases)
        self.k_proj = linear(config, keys, key_value_size, biases, joined=2 * keys)
        self.v_proj = linear(config, keys, key_value_size, biases, beta=beta, joined=2 * keys)
        self.o_proj = linear(config, sizes.hidden_size, queries, biases, output=True, beta=beta)
        rotates = config.retro_cross_attention_positions == "rotary"
        self.rotary = Rotary(config, sizes.channels, whole=True) if rotates else None

    def query(self, states: Tensor, positions: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, H, S, C]`, rotated to positions `[S]` or `[B, S]`."""
        query = self.q_proj(states).unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2)
        return self._rotate(query, positions)

    def key_value(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, T, D]` to keys, rotated to positions `[T]`, and values, `[N, G, T, C]` each."""
        key, value = (
            projection(states).unflatten(-1, (self.sizes.groups, -1)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        return self._rotate(key, positions), value

    def _rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        if self.rotary is None:
            return states
        angles = self.rotary.angles(positions)
        if positions.dim() == 2:
            angles = (angles[0][:, None], angles[1][:, None])
        return self.rotary.rotate(states, angles)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """See `attend`; mask bool `[N, T]`, True = attended to."""
        mask = None if mask is None else mask.to(query.device)[:, None, None]
        scale, dropout = self.sizes.softmax_scale, self.sizes.cross_attention_dropout
        return attend(self, query, key, value, mask, scale, dropout)

    def forward(self, states: Tensor, chunks: Tensor) -> Tensor:
        """The neighbor encoder's cross-attention to the retrieving chunk.

        Args:
            states: `[N, K * R, D]`, normed.
            chunks: `[N, M, decoder's D]`.
        """
        within = torch.arange(self.config.retrieved_length, device=states.device)
        query = self.query(states, within.repeat(self.config.retro_num_neighbors))
        key, value = self.key_value(chunks, torch.arange(chunks.size(1), device=states.device))
        return self.o_proj(self.attend(query, key, value, None))


class RetroChunkedCrossAttention(RetroCrossAttention):
    """The decoder's cross-attention: from a chunk's last token on, M positions attend to its
    neighbors."""

    def forward(  # type: ignore[override]
        self, states: Tensor, neighbors: Tensor | None, plan: ChunkPlan,
        cache: RetroCache | None, layer: int, past: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attend to neighbors.

        Args:
            states: `[B, S, D]`, normed.
            neighbors: `[N, K * R, encoder's D]`, those of the plan's chunks; None: it has none.
            plan: The chunks that the pass completes.
            cache: The cache of growing texts, which may hold earlier neighbors.
            layer: The layer's number in it.
            past: Cached tokens.

        Returns:
            The output `[B, S, D]`, zero where nothing is attended to, and where that is not so,
            bool `[B, S, 1]`.
        """
        key_value = None
        if neighbors is not None:
            within = torch.arange(self.config.retrieved_length, device=states.device)
            positions = within.repeat(self.config.retro_num_neighbors)
            key_value = self.key_value(neighbors, positions)
        if cache is not None:
            plan, key_value = cache.join_neighbors(layer, plan, key_value)
            if past and states.size(1) == 1:
                return self._step(states, cache, layer, past)
        assert key_value is not None
        size = self.config.retro_chunk_length
        offsets = torch.arange(size - 1, 2 * size - 1, device=states.device)
        attended = self.attend(self.query(plan.attending(states), offsets), *key_value, plan.mask)
        attends = plan.attends(states.device)
        return plan.put_back(self.o_proj(attended)) * attends, attends

    def _step(
        self, states: Tensor, cache: RetroCache, layer: int, past: int
    ) -> tuple[Tensor, Tensor]:
        """One new token of every row, which attends to its row's last complete chunk."""
        assert cache.has is not None
        offsets = [0 if start is None else past - start for start in cache.starts]
        positions = torch.tensor(offsets, device=states.device)[:, None]
        attended = self.attend(
            self.query(states, positions),
            cache.neighbor_keys[layer],
            cache.neighbor_values[layer],
            cache.mask,
        )
        has = cache.has.to(states.device)[:, None, None]
        return self.o_proj(attended) * has, has


class RetroMLP(nn.Module):
    """The MLP, gated or not."""

    def __init__(self, config: RetroConfig, sizes: BlockSizes) -> None:
        super().__init__()
        width, inner, beta = sizes.hidden_size, sizes.ffn_hidden_size, sizes.deepnorm_beta
        biases = not config.disable_bias_linear
        part = partial(linear, config, inner, width, biases, beta=beta)
        self.gate_proj = part(joined=2 * inner) if config.swiglu else None
        self.up_proj = part(joined=2 * inner) if config.swiglu else part()
        self.down_proj = linear(config, width, inner, biases, output=True, beta=beta)
        self.kind = "relu" if config.squared_relu else "tanh" if config.openai_gelu else "gelu"

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        inner = self.up_proj(states)
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(states)) * inner)
        if self.kind == "relu":
            return self.down_proj(F.relu(inner).square())
        return self.down_proj(F.gelu(inner, approximate="tanh" if self.kind == "tanh" else "none"))


class _Sublayers(nn.Module):
    """How sublayers are added: x + f(Norm(x)), or DeepNorm's Norm(alpha * x + f(x))."""

    config: RetroConfig
    sizes: BlockSizes

    def _before(self, norm: nn.Module, states: Tensor) -> Tensor:
        return states if self.config.retro_deepnorm else norm(states)

    def _add(self, norm: nn.Module, stream: Tensor, update: Tensor) -> Tensor:
        update = F.dropout(update, self.sizes.hidden_dropout, self.training)
        if self.config.retro_deepnorm:
            return norm(stream * self.sizes.residual_scale + update)
        return stream + update


class RetroDecoderLayer(GradientCheckpointingLayer, _Sublayers):
    """A decoder layer: self-attention, in some layers cross-attention to neighbors, MLP."""

    def __init__(self, config: RetroConfig, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.config, self.sizes, self.index = config, config.decoder_sizes(), index
        width = config.hidden_size
        self.self_attn_norm = RetroNorm(config, width)
        self.self_attn = RetroSelfAttention(config, self.sizes, rotary)
        self.cross_attn: RetroChunkedCrossAttention | None = None
        if index + 1 in config.cross_attention_layers:
            self.cross_attn_norm = RetroNorm(config, width)
            encoder_width = config.encoder_sizes().hidden_size
            self.cross_attn = RetroChunkedCrossAttention(config, self.sizes, encoder_width)
        self.mlp_norm = RetroNorm(config, width)
        self.mlp = RetroMLP(config, self.sizes)

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
        cache = past_key_values
        attended = self.self_attn(
            self._before(self.self_attn_norm, states), angles, attention_mask, causal, cache,
            self.index,
        )  # fmt: skip
        states = self._add(self.self_attn_norm, states, attended)
        if self.cross_attn is not None and (plan is not None or encode is not None):
            normed = self._before(self.cross_attn_norm, states)
            if encode is not None:
                neighbors = encode(normed, neighbors)
            if plan is not None and (neighbors is not None or _attends_earlier(cache)):
                update, attends = self.cross_attn(normed, neighbors, plan, cache, self.index, past)
                update = update * self.config.retro_attention_gate
                added = self._add(self.cross_attn_norm, states, update)
                states = torch.where(attends, added, states)
        mlp = self.mlp(self._before(self.mlp_norm, states))
        return self._add(self.mlp_norm, states, mlp), neighbors


def _attends_earlier(cache: RetroCache | None) -> bool:
    return cache is not None and getattr(cache, "has", None) is not None


class RetroEncoderLayer(_Sublayers):
    """A bidirectional layer of the neighbor encoder; the first also attends to the chunk."""

    def __init__(self, config: RetroConfig, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.config, self.sizes = config, config.encoder_sizes()
        width = self.sizes.hidden_size
        self.self_attn_norm = RetroNorm(config, width)
        self.self_attn = RetroSelfAttention(config, self.sizes, rotary)
        self.cross_attn: RetroCrossAttention | None = None
        if index == 0:
            self.cross_attn_norm = RetroNorm(config, width)
            self.cross_attn = RetroCrossAttention(config, self.sizes, config.hidden_size)
        self.mlp_norm = RetroNorm(config, width)
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
        same = sizes.channels == config.kv_channels
        self.rotary = Rotary(config, sizes.channels, stretched=same) if rotates else None
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
