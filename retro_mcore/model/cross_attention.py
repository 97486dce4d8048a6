"""Projections, rotary positions and core attention of both of Retro's cross-attentions.

Shapes: S sequence, B batch, D hidden, L chunks per sample, K neighbors, R retrieved length, H heads
and G query groups of this rank, C channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from retro_mcore.model.config import RetroConfig


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
                rotary_interleaved=config.rotary_interleaved,
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
        # Without a bias, backends' layers have None, an empty tensor or no attribute.
        bias = getattr(self.linear_kv, "bias", None)
        return None if bias is None or bias.numel() == 0 else self._unflatten_key_value(bias)

    def _unflatten_key_value(self, key_value: Tensor) -> Tensor:
        return key_value.unflatten(-1, (-1, 2, self.config.kv_channels))

    def rotate(self, states: Tensor, first: int = 0) -> Tensor:
        """Rotary embedding of `[S, B, H, C]` at positions `first`, `first + 1`, ...; as they are
        without relative positions."""
        if self.rotary is None:
            return states
        # "Packed": for whole chunks, also under context parallelism.
        angles = self.rotary(first + states.size(0), packed_seq=True)[first:]
        return apply_rotary_pos_emb(states, angles, self.config, cp_group=self.pg_collection.cp)

    def rotate_keys(self, key_value: Tensor) -> Tensor:
        """Rotate the keys of `[S, B, G, 2, C]`; see `rotate`."""
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
