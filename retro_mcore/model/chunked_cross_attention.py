"""Retro's two cross-attentions (Borgeaud et al. 2022, section 2.4 and Algorithm 1).

In the decoder, chunked cross-attention (CCA): M consecutive positions, from a chunk's last token
on, attend to the encoded neighbors of that chunk. In the neighbor encoder: each retrieved token
attends to the chunk that retrieved it.

Both project first, in Megatron's ordinary `[S, B, D]` layout, where its parallel linears handle
tensor and sequence parallelism, and cut into chunks between projection and core attention.
Shapes: S sequence, B batch, D hidden, L chunks per sample, M chunk length, K neighbors,
R retrieved length, H heads and G query groups of this rank, C channels per head. Neighbors lie as
`chunks.nearest_first` orders them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from retro_mcore.model.cached_attention import cross_attend
from retro_mcore.model.chunks import (
    attending_positions,
    join_attending,
    split_attending,
    split_chunks,
)
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.inference_context import InferenceContext

if TYPE_CHECKING:
    from retro_mcore.model.neighbor_encoder import NeighborEncoder


class RetroCrossAttention(MegatronModule):
    """Projections and core attention that both cross-attentions share.

    Args:
        config: The block's configuration.
        submodules: linear_q, linear_kv, core_attention and linear_proj.
        layer_number: Within the model, 1-based.
        pg_collection: Process groups; Megatron's global ones by default.
        attention_dropout: Overrides the config's.
        key_value_size: Width of what is attended to; the config's hidden size by default.
    """

    def __init__(
        self,
        config: RetroConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        attention_dropout: float | None = None,
        key_value_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.config: RetroConfig = config
        self.layer_number = layer_number
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(
            required_pgs=["tp", "cp"]
        )
        channels = config.kv_channels
        self.linear_q = self._build_projection(
            submodules.linear_q, config.hidden_size, channels * config.num_attention_heads
        )
        self.linear_kv = self._build_projection(
            submodules.linear_kv,
            key_value_size or config.hidden_size,
            2 * channels * config.num_query_groups,
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
            attention_dropout=attention_dropout,
            softmax_scale=config.softmax_scale,
            pg_collection=self.pg_collection,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            channels * config.num_attention_heads,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.pg_collection.tp,
        )
        self.rotary: RotaryEmbedding | None = None
        if config.retro_cross_attention_positions == "rotary":
            self.rotary = RotaryEmbedding(
                channels,
                rotary_percent=1.0,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
        self.recompute_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def _build_projection(self, linear: Any, input_size: int, output_size: int) -> torch.nn.Module:
        return build_module(
            linear,
            input_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=self.config.add_bias_linear,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def project_query(self, states: Tensor) -> Tensor:
        """`[S, B, D]`, this rank's part of S, to `[S, B, H, C]`, the whole S, this rank's heads."""
        query, _ = self.linear_q(states)
        return query.unflatten(-1, (-1, self.config.kv_channels))

    def project_key_value(self, states: Tensor) -> Tensor:
        """`[S, B, D]` to `[S, B, G, 2, C]`: per group a key, then a value."""
        key_value, _ = self.linear_kv(states)
        return self._unflatten_key_value(key_value)

    def key_value_of_zeros(self) -> Tensor | None:
        """`[G, 2, C]`, what a zero state projects to; None for zero."""
        bias = getattr(self.linear_kv, "bias", None)
        return None if bias is None or bias.numel() == 0 else self._unflatten_key_value(bias)

    def _unflatten_key_value(self, key_value: Tensor) -> Tensor:
        return key_value.unflatten(-1, (-1, 2, self.config.kv_channels))

    def rotate(self, states: Tensor, first: int = 0) -> Tensor:
        """Rotary embedding of `[S, B, H, C]` at positions `first`, `first + 1`, ...; as they are
        without relative positions."""
        if self.rotary is None:
            return states
        angles = self.rotary(first + states.size(0))[first:]
        return apply_rotary_pos_emb(states, angles, self.config, cp_group=self.pg_collection.cp)

    def rotate_keys(self, key_value: Tensor) -> Tensor:
        """As `rotate`, for the keys of `[S, B, G, 2, C]`."""
        if self.rotary is None:
            return key_value
        key, value = key_value.unbind(dim=-2)
        return torch.stack((self.rotate(key), value), dim=-2)

    def join_neighbors(self, states: Tensor) -> Tensor:
        """`[R, K * B * L, ...]` to `[R * K, B * L, ...]`, a view: a chunk's neighbors in a row."""
        return states.unflatten(1, (self.config.retro_num_neighbors, -1)).flatten(0, 1)

    def part_neighbors(self, states: Tensor) -> Tensor:
        """The inverse of `join_neighbors`."""
        return states.unflatten(0, (-1, self.config.retro_num_neighbors)).flatten(1, 2)

    def attend(self, query: Tensor, key_value: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[Sq, B, H, C]` over `[Sk, B, G, 2, C]` to `[Sq, B, H * C]`; mask True = masked out."""
        key, value = key_value.unbind(dim=-2)
        if self.recompute_core_attention and self.training:
            return tensor_parallel.checkpoint(self._attend, False, query, key, value, mask)
        return self._attend(query, key, value, mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.core_attention(query, key, value, mask, attn_mask_type=AttnMaskType.no_mask)


class ChunkedCrossAttention(RetroCrossAttention):
    """The decoder's cross-attention to the neighbors of the preceding chunk.

    The first of these layers also encodes the neighbors, because the encoder is conditioned on its
    normed hidden states: RetroModel hands it the encoder through `encode_neighbors_with`.
    """

    def __init__(self, config: RetroConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **{**kwargs, "key_value_size": config.encoder_hidden_size})
        # In a tuple, so that torch does not register the encoder here too: it is the model's.
        self.neighbor_encoders: tuple[NeighborEncoder, ...] = ()

    def encode_neighbors_with(self, encoder: NeighborEncoder) -> None:
        """Make this layer the one that encodes the embedded neighbors."""
        self.neighbor_encoders = (encoder,)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """Attend to the neighbors.

        Args:
            hidden_states: `[S, B, D]`, normed (under sequence parallelism this rank's part of S).
            attention_mask: bool `[K * B * L, R]`, True = padding or missing. None: all real.
            key_value_states: `[R, K * B * L, D]`, the embedded neighbors, for the first of these
                layers; `[R, K * B * L, encoder's D]`, the encoded ones, for the others. None:
                retrieval is off.
            inference_context: An InferenceContext: see `cached_attention.cross_attend`.

        Returns:
            "output" `[S, B, D]` and "bias" `[S, B, D]` or None for RetroBiasDropoutAdd (output
            None: retrieval is off), "attends" `[S, B, 1]`, which positions have neighbors, and
            "context", the encoded neighbors for the next layers.
        """
        if isinstance(inference_context, InferenceContext):
            return cross_attend(self, hidden_states, key_value_states, inference_context)
        if key_value_states is None:
            return {"output": None, "bias": None, "context": None}
        gate = self.config.retro_attention_gate
        if gate == 0.0:
            return {"output": None, "bias": None, "context": key_value_states}
        for encoder in self.neighbor_encoders:
            key_value_states = encoder(key_value_states, hidden_states, attention_mask)

        query_SBHC = self.project_query(hidden_states)
        sequence_length, batch_size = query_SBHC.shape[:2]
        grid = self.config.chunk_grid(sequence_length)
        mask, has_neighbors_BL = self._retrieved_mask(attention_mask)
        # The attending tokens start with their chunk's last one.
        attended_MBLX = self.attend(
            self.rotate(split_attending(query_SBHC, grid), first=grid.chunk_length - 1),
            self.join_neighbors(self.rotate_keys(self.project_key_value(key_value_states))),
            mask,
        )
        if has_neighbors_BL is None:
            has_neighbors_BL = attended_MBLX.new_ones(attended_MBLX.size(1), dtype=torch.bool)
        else:
            attended_MBLX = attended_MBLX * has_neighbors_BL[None, :, None]
        if self.config.sequence_parallel:  # the output projection scatters the sequence
            output, bias = self.linear_proj(join_attending(attended_MBLX, grid, batch_size))
        else:  # no padded copy of its input is kept for the backward pass
            output, bias = self.linear_proj(attended_MBLX)
            output = join_attending(output, grid, batch_size)
        # Only positions that attend get the bias; the others stay as they were.
        attends_SB1 = self._local_part(attending_positions(grid, has_neighbors_BL))
        if bias is not None:
            bias = bias * attends_SB1
        if gate != 1.0:
            output, bias = output * gate, None if bias is None else bias * gate
        attended = {"output": output, "bias": bias, "attends": attends_SB1}
        return {**attended, "context": key_value_states}

    def _retrieved_mask(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The core attention's mask `[B * L, 1, 1, R * K]`, and which chunks have neighbors
        `[B * L]`."""
        if mask is None or not self.config.retro_mask_padding:
            return None, None
        mask_BLX = self.join_neighbors(mask.transpose(0, 1)).transpose(0, 1)
        missing_BL = mask_BLX.all(dim=1)
        # A row that is masked out whole would be NaN: its result is dropped instead.
        mask_BLX = mask_BLX & ~missing_BL[:, None]
        return mask_BLX[:, None, None, :], ~missing_BL

    def _local_part(self, states_S: Tensor) -> Tensor:
        """This rank's part of the sequence under sequence parallelism."""
        if not self.config.sequence_parallel:
            return states_S
        group = self.pg_collection.tp
        return states_S.chunk(group.size(), dim=0)[group.rank()]


class EncoderCrossAttention(RetroCrossAttention):
    """The neighbor encoder's cross-attention to the retrieving chunk.

    A chunk's keys and values are projected once and shared by its K neighbors.

    Args:
        config: The encoder's configuration.
        *args, **kwargs: As RetroCrossAttention takes them; `key_value_size` is the decoder's width.
    """

    def __init__(self, config: RetroConfig, *args: Any, **kwargs: Any) -> None:
        dropout = config.retro_encoder_cross_attention_dropout
        super().__init__(config, *args, **{**kwargs, "attention_dropout": dropout})

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """Attend to the retrieving chunk.

        Args:
            hidden_states: `[R, K * B * L, D]`, normed retrieved tokens.
            key_value_states: `[S, B, D]`, the decoder's hidden states.

        Returns:
            "output" and "bias" for RetroBiasDropoutAdd, and its "residual" where that is not the
            stream.
        """
        assert key_value_states is not None, "the encoder always has its retrieving chunks"
        query = self.rotate(self.project_query(hidden_states))
        key_value = self.project_key_value(key_value_states)
        grid = self.config.chunk_grid(key_value.size(0))
        attended = self.attend(
            self.join_neighbors(query),
            self.rotate_keys(split_chunks(key_value, grid, self.key_value_of_zeros())),
        )
        output, bias = self.linear_proj(attended)
        output = self.part_neighbors(output)
        normed = self.config.retro_encoder_residual == "normed"
        return {"output": output, "bias": bias, "residual": hidden_states if normed else None}


class RetroBiasDropoutAdd(MegatronModule):
    """Megatron's bias-dropout-add for the dictionaries that Retro's cross-attentions return."""

    def __init__(self, config: RetroConfig, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(self, training: bool, fused: bool) -> Callable[[dict, Tensor, float], Tensor]:
        """A function of (attention's dictionary, residual, dropout probability)."""
        bias_dropout_add = get_bias_dropout_add(training, fused)

        def add(attention: dict[str, Tensor | None], stream: Tensor, probability: float) -> Tensor:
            if attention["output"] is None:
                return stream
            residual = attention.get("residual")
            return bias_dropout_add(
                (attention["output"], attention["bias"]),
                stream if residual is None else residual,
                probability,
            )

        return add
