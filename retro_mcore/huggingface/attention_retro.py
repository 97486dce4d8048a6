"""Self-attention, and both cross-attentions.

Shapes: B batch, S tokens of the pass, N chunks, M chunk length, K neighbors, R retrieved length,
D hidden size, H heads, G key and value heads, C channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunks_retro import ChunkPlan, RetroCache
from .configuration_retro import BlockSizes, RetroConfig
from .linear_retro import RetroAllHeadsNorm, RetroNorm, linear
from .rotary_retro import Angles, Rotary


def attend(
    module: RetroSelfAttention | RetroCrossAttention, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None,
    scale: float, dropout: float, causal: bool = False, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention with the implementation that the model was loaded with.

    Limited scores have no kernel in PyTorch: they are always computed eagerly.

    Args:
        module: Gives `config` and whether it trains.
        query: `[B, H, S, C]`.
        key, value: `[B, G, T, C]`.
        mask: Broadcastable to `[B, H, S, T]`: bool, True = attended to, or a float to add.
        scale: Factor of the scores.
        dropout: Rate in training.
        causal: Only keys up to the query's position; without mask.
        softcap: Limit c of the scores s: c * tanh(s / c).

    Returns:
        `[B, S, H * C]`.
    """
    dropout = dropout if module.training else 0.0
    if softcap is not None or module.config._attn_implementation == "eager":
        attended = _attend_eagerly(query, key, value, mask, scale, dropout, causal, softcap)
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale,
            enable_gqa=key.size(1) != query.size(1),
        )  # fmt: skip
    return attended.transpose(1, 2).flatten(2)


def _attend_eagerly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float,
    causal: bool, softcap: float | None,
) -> Tensor:  # fmt: skip
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return F.dropout(weights.to(query.dtype), dropout) @ value


class RetroSelfAttention(nn.Module):
    """Self-attention of the decoder, or of the neighbor encoder.

    Args:
        config: The model's configuration.
        sizes: Those of the block that it belongs to.
        rotary: The rotary embedding of the layer; None: it has none.
    """

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
        self.q_norm, self.k_norm = (self._norm(heads) for heads in (sizes.heads, sizes.groups))

    def _norm(self, heads: int) -> nn.Module:
        if not self.config.qk_layernorm:
            return nn.Identity()
        if self.sizes.norms_all_heads:
            return RetroAllHeadsNorm(self.config, heads * self.sizes.channels)
        return RetroNorm(self.config, self.sizes.channels)

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
            query, key = self._rotate(query, angles), self._rotate(key, angles)
        if cache is not None:
            key, value = cache.update(key, value, layer)
        attended = attend(
            self, query, key, value, mask, sizes.softmax_scale, sizes.attention_dropout, causal,
            sizes.attention_softcap,
        )  # fmt: skip
        return self.o_proj(attended)

    def _rotate(self, states: Tensor, angles: Angles) -> Tensor:
        """Rotate; YaRN's and LongRoPE's factor multiplies the channels that are rotated."""
        assert self.rotary is not None
        factor, rotated = self.sizes.rotary_factor, self.rotary.rotated_channels
        if factor != 1.0 and self.rotary.has_factor:
            states = torch.cat((states[..., :rotated] * factor, states[..., rotated:]), -1)
        return self.rotary.rotate(states, angles)


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
        self.rotary = Rotary(config, sizes.channels, base=10000) if rotates else None

    def query(self, states: Tensor, positions: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, H, S, C]`, rotated to positions `[S]` or `[B, S]`."""
        query = self.q_proj(states).unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2)
        return self._rotate(query, positions)

    def key_value(
        self, states: Tensor, positions: Tensor, of_previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`[N, T, D]` to keys, rotated to positions `[T]`, and values, `[N, G, T, C]` each.

        of_previous: bool, broadcastable to `[N, G, T]`, which keys are those of the token before.
        """
        key, value = (
            projection(states).unflatten(-1, (self.sizes.groups, -1)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        if of_previous is not None:
            key = key.roll(1, 2).where(of_previous[..., None], key)
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

    def neighbors_key_value(
        self, neighbors: Tensor, positions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `key_value`; a token's key may be that of the real token before it in its neighbor.

        mask: bool `[N, T]`, True = real.
        """
        if self.config.retro_cross_attention_keys == "own":
            return self.key_value(neighbors, positions)
        of_previous = (positions > 0)[None, None]
        if mask is not None:
            of_previous = of_previous & mask.to(of_previous.device).roll(1, 1)[:, None]
        if self.config.retro_cross_attention_keys == "mixed":
            groups = torch.arange(self.sizes.groups, device=of_previous.device)
            of_previous = of_previous & (groups % 4 != 1)[:, None]
        return self.key_value(neighbors, positions, of_previous)

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
            key_value = self.neighbors_key_value(neighbors, positions, plan.mask)
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
