"""Attention with a cache: what the decoder's layers do when they get an InferenceContext.

The results are those of the whole text's forward pass at the new positions.
Shapes: as in inference_context.py; H heads of this rank, M the longest run of positions that
attend to the neighbors of one chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.cross_attention import RetroCrossAttention
from retro_mcore.model.family_layers import local_rotary
from retro_mcore.model.family_options import family_option
from retro_mcore.model.inference_context import InferenceContext, NewChunk
from retro_mcore.platform.attention import SDPAttention, attend_capped
from retro_mcore.platform.compatibility import config_value
from retro_mcore.platform.windows import layer_window, window_mask

if TYPE_CHECKING:
    from retro_mcore.model.neighbor_encoder import NeighborEncoder


class RetroSelfAttention(SelfAttention):
    """Megatron's self-attention, which runs over new tokens only if it gets an InferenceContext.

    Keys are cached with their rotary embedding, so a step costs one pass over them. (Megatron's
    own static context keeps them as projected and rotates the whole cache in every step.)

    It also computes what families do otherwise: layers without rotary positions or with a base of
    their own, and YaRN's and LongRoPE's factor on rotated queries and keys.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.has_rope = self.layer_number not in (family_option(config, "no_rope_layers") or ())
        self.local_rotary = local_rotary(config, self.layer_number, self.pg_collection.cp)
        self.window = layer_window(config, self.layer_number)
        self.rotation_config = without_fused_rotation(config)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; the channels to be rotated are multiplied by `rotary_attention_factor`."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        factor = family_option(self.config, "rotary_attention_factor")
        if factor != 1.0 and self.has_rope and self.local_rotary is None:
            rotated = 2 * len(self.config.rotary_frequencies)
            query, key = (_scale_channels(states, rotated, factor) for states in (query, key))
        return query, key, *rest

    def _own_angles(self, angles: Any, positions_SB: Tensor | None = None) -> Any:
        """The rotary embedding of this layer, given that of the model."""
        if angles is None or not self.has_rope:
            return None
        if self.local_rotary is None:
            return angles
        if positions_SB is None:
            # Megatron takes this rank's part of the whole sequence's angles.
            return self.local_rotary(angles.size(0) * self.config.context_parallel_size)
        return self.local_rotary(int(positions_SB.max()) + 1)[:, 0][positions_SB]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's forward; with an InferenceContext, `rotary_pos_emb` is `[S, B, 1, C]`.

        Raises:
            ConfigurationError: there is a mask, which the core attention does not read.
        """
        if isinstance(inference_context, InferenceContext):
            positions_SB = inference_context.current.positions_SB
            angles = self._own_angles(rotary_pos_emb, positions_SB)
            return self._forward_cached(hidden_states, inference_context, angles)
        if attention_mask is not None and not isinstance(self.core_attention, SDPAttention):
            raise ConfigurationError(
                "attention_mask",
                "given to Transformer Engine's causal attention, which reads no mask",
                "Build the model with local layers (--transformer-impl local), or give None",
            )
        rotary_pos_emb = self._own_angles(rotary_pos_emb)
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            **kwargs,
        )

    def _forward_cached(
        self, hidden_states: Tensor, context: InferenceContext, angles: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        if angles is not None:
            query, key = (
                apply_rotary_pos_emb(
                    states, angles, self.rotation_config, cp_group=self.pg_collection.cp
                )
                for states in (query, key)
            )
        context.remember_keys(self.layer_number, key, value)
        query_BHSC = query.permute(1, 2, 0, 3)
        key_BGTC, value_BGTC = context.past(self.layer_number)
        cap = family_option(self.config, "attention_softcap")
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        if cap is not None:
            attend = partial(attend_capped, softcap=cap)
        if context.current.is_step:
            # The heads of a group as its queries: their keys need not be repeated.
            mask = context.current.keys_beyond(self.window)
            attended_BHSC = attend(
                query_BHSC.unflatten(1, (key.size(2), -1)).flatten(2, 3),
                key_BGTC,
                value_BGTC,
                attn_mask=None if mask is None else ~mask,
                scale=self._scale(),
            ).view_as(query_BHSC)
        else:
            length, window = query.size(0), self.window
            narrow = window is not None and length > window
            attended_BHSC = attend(
                query_BHSC,
                key_BGTC,
                value_BGTC,
                attn_mask=window_mask(length, length, window, query.device) if narrow else None,
                is_causal=length > 1 and not narrow,
                scale=self._scale(),
                enable_gqa=key.size(2) != query.size(2),
            )
        return self.linear_proj(attended_BHSC.permute(2, 0, 1, 3).flatten(2))

    def _scale(self) -> float:
        return self.config.softmax_scale or self.config.kv_channels**-0.5


def without_fused_rotation(config: TransformerConfig) -> TransformerConfig:
    """The configuration with a rotary embedding at positions of each text's own.

    Transformer Engine's fused one takes the same positions for all texts.
    """
    if not config.apply_rope_fusion:
        return config
    config = copy.copy(config)
    config.apply_rope_fusion = False
    return config


def _scale_channels(states: Tensor, rotated: int, factor: float) -> Tensor:
    """Multiply the first `rotated` channels."""
    if rotated == states.size(-1):
        return states * factor
    return torch.cat((states[..., :rotated] * factor, states[..., rotated:]), dim=-1)


def check_cacheable(config: TransformerConfig) -> None:
    """Reject models that the cached self-attention does not run.

    Raises:
        ConfigurationError: naming the field.
    """
    for field, plain in {
        "attention_output_gate": False,
        "multi_latent_attention": False,
        "no_rope_freq": None,
        "softmax_type": "vanilla",
        "sequence_parallel": False,  # a step of one token cannot be shared out over ranks
    }.items():
        found = config_value(config, field, absent=plain)
        if found and found != plain:
            raise ConfigurationError(
                field, f"{found!r} does not run with a cache", "Generate by full recomputation"
            )


def cross_attend(
    layer: RetroCrossAttention,
    encoders: Sequence[NeighborEncoder],
    hidden_SBD: Tensor,
    neighbors: Tensor | None,
    context: InferenceContext,
) -> dict[str, Tensor | None]:
    """Chunked cross-attention of new tokens.

    Args:
        layer: The layer.
        encoders: The neighbor encoder, in the first of these layers; else empty.
        hidden_SBD: Its normed input.
        neighbors: Those of the chunks that this pass completes: embedded, `[R, K * N, D]`, for the
            first of these layers, encoded for the others. None: there are no such chunks.
        context: The cache.

    Returns:
        As `ChunkedCrossAttention.forward`.
    """
    gate = layer.config.retro_attention_gate
    if gate == 0.0:
        return {"output": None, "bias": None, "context": neighbors}
    for encoder in encoders:
        context.remember_states(hidden_SBD)
        if neighbors is not None:
            neighbors = _encode(encoder, neighbors, context)
            context.current.encoded = neighbors
    if not context.attends:
        return {"output": None, "bias": None, "context": neighbors}
    attended_SBX, attends_SB1 = _attend(layer, hidden_SBD, neighbors, context)
    output, bias = layer.linear_proj(attended_SBX)
    if bias is not None:
        bias = bias * attends_SB1
    if gate != 1.0:
        output, bias = output * gate, None if bias is None else bias * gate
    return {"output": output, "bias": bias, "attends": attends_SB1, "context": neighbors}


def _encode(encoder: NeighborEncoder, embedded: Tensor, context: InferenceContext) -> Tensor:
    """Encode the neighbors of all new chunks, those of one length together."""
    chunks, mask = context.current.chunks, context.current.chunk_mask
    parts, order = [], []
    for length in {chunk.length for chunk in chunks}:
        places = [place for place, chunk in enumerate(chunks) if chunk.length == length]
        columns = [first + p for first in range(0, embedded.size(1), len(chunks)) for p in places]
        states = context.chunk_states([chunks[place] for place in places])
        part_mask = None if mask is None else mask[columns]
        parts.append(encoder(embedded[:, columns], states, part_mask, length))
        order += columns
    return torch.cat(parts, dim=1)[:, torch.tensor(order).argsort()]


def _attend(
    layer: RetroCrossAttention,
    hidden_SBD: Tensor,
    neighbors: Tensor | None,
    context: InferenceContext,
) -> tuple[Tensor, Tensor]:
    """The attended values `[S, B, H * C]`, and which positions attend `[S, B, 1]`."""
    query = layer.project_query(hidden_SBD)
    number = layer.layer_number
    key_value = None
    if neighbors is not None:
        key_value = layer.project_neighbors(neighbors, context.current.chunk_mask)
        context.remember_neighbors(number, key_value)
    if not context.current.is_step:
        assert key_value is not None
        return _attend_prompts(layer, query, key_value, context)
    offsets = context.offsets_in_chunk()
    key_value, mask, has_neighbors_B = context.neighbors_now(number)
    query = _rotate_at(layer, query, offsets, context)
    attended = layer.attend(query, key_value, None if mask is None else mask[:, None, None])
    return attended * has_neighbors_B[None, :, None], has_neighbors_B[None, :, None]


def _attend_prompts(
    layer: RetroCrossAttention, query: Tensor, key_value: Tensor, context: InferenceContext
) -> tuple[Tensor, Tensor]:
    """In a prefill, the positions from each chunk's last token on attend to its neighbors."""
    current = context.current
    first_MN, valid_MN, rows_N = _runs(current.chunks, context.lengths[current.first_row :], query)
    where = (first_MN, rows_N.expand_as(first_MN))
    starts = torch.tensor([chunk.start for chunk in current.chunks], device=query.device)
    mask = current.attention_mask
    attended_MNX = layer.attend(
        _rotate_at(layer, query[where], first_MN - starts, context),
        key_value,
        None if mask is None else mask[:, None, None],
    )
    if current.missing is not None:
        valid_MN = valid_MN & ~current.missing
    attended_SBX = attended_MNX.new_zeros(*query.shape[:2], attended_MNX.size(2))
    attends_SB1 = valid_MN.new_zeros(*query.shape[:2], 1)
    taken = (first_MN[valid_MN], where[1][valid_MN])
    attended_SBX[taken] = attended_MNX[valid_MN]
    attends_SB1[taken] = True
    return attended_SBX, attends_SB1


def _runs(
    chunks: list[NewChunk] | Any, lengths: list[int], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions `[M, N]` that attend to each chunk's neighbors, which are valid, the rows."""
    ends = []
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        same_text = following is not None and following.row == chunk.row
        ends.append(following.last if same_text else lengths[chunk.row])
    lasts = torch.tensor([chunk.last for chunk in chunks], device=like.device)
    stops = torch.tensor(ends, device=like.device)
    longest = max(end - chunk.last for end, chunk in zip(ends, chunks, strict=True))
    positions = lasts + torch.arange(longest, device=like.device)[:, None]
    valid = positions < stops
    rows = torch.tensor([chunk.row for chunk in chunks], device=like.device)
    return positions.clamp(max=like.size(0) - 1), valid, rows


def _rotate_at(
    layer: RetroCrossAttention, states: Tensor, offsets: Tensor, context: InferenceContext
) -> Tensor:
    """Rotary embedding of `[S, B, H, C]` at positions of their own `[S, B]`."""
    rotary = layer.rotary
    if rotary is None:
        return states
    longest = context.max_sequence_length + layer.config.retro_chunk_length
    angles = rotary(longest)[:, 0][offsets]
    config = without_fused_rotation(layer.config)
    return apply_rotary_pos_emb(states, angles, config, cp_group=layer.pg_collection.cp)
