"""Retro's neighbor encoder (Borgeaud et al. 2022, Algorithm 1, ENCODER).

A bidirectional transformer over each neighbor's R tokens. Its first layer also cross-attends to
the chunk that retrieved the neighbor, so it runs inside the decoder, at the first layer with
chunked cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from torch import Tensor

from retro_mcore.model.chunks import RetrievingChunks
from retro_mcore.model.config import RetroConfig


class NeighborEncoder(TransformerBlock):
    """The encoder block; `RetroModel.neighbor_encoder`.

    Args:
        config: The model's configuration (the encoder derives its own).
        submodules: The layers (`get_neighbor_encoder_block_spec`).
        rotary: The rotary embedding of the retrieved tokens (for this encoder's channels per
            head), or None for none.
        pg_collection: Process groups.
    """

    def __init__(
        self,
        config: RetroConfig,
        submodules: TransformerBlockSubmodules,
        rotary: RotaryEmbedding | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config=config.encoder_config(),
            spec=submodules,
            post_layer_norm=False,
            post_process=False,
            pg_collection=pg_collection,
        )
        self._rotary = rotary
        self.input_projection: torch.nn.Linear | None = None
        if config.encoder_hidden_size != config.hidden_size:
            self.input_projection = self._build_input_projection(config)

    def _build_input_projection(self, config: RetroConfig) -> torch.nn.Linear:
        """The projection to the encoder's width; whole on every tensor-parallel rank."""
        projection = torch.nn.Linear(
            config.hidden_size, config.encoder_hidden_size, bias=False, dtype=config.params_dtype
        )
        config.init_method(projection.weight)
        # Each rank projects its part of R: megatron sums these gradients over TP.
        projection.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return projection

    def forward(  # type: ignore[override]
        self,
        embedded_neighbors: Tensor,
        decoder_states: Tensor,
        mask: Tensor | None = None,
        chunk_length: int | None = None,
    ) -> Tensor:
        """Encode neighbors.

        Runs the layers itself. TransformerBlock's forward would fork the random states again under
        sequence parallelism, after the decoder around it, and a recomputation that runs outside of
        the decoder would then draw other numbers.

        Args:
            embedded_neighbors: `[R, K * B * L, D]`, ordered by `chunks.nearest_first`.
            decoder_states: `[S, B, D]`, the states that the encoder is conditioned on.
            mask: bool `[K * B * L, R]`, True = padding or missing.
            chunk_length: M, the length of the retrieving chunks; the configuration's by default.

        Returns:
            `[R, K * B * L, encoder's D]`.
        """
        if self.config.retro_encoder_input == "normed":
            embedded_neighbors = torch.nn.functional.rms_norm(
                embedded_neighbors,
                embedded_neighbors.shape[-1:],
                eps=self.config.layernorm_epsilon,
            )
        if self.input_projection is not None:
            embedded_neighbors = self.input_projection(embedded_neighbors)
        rotary = None
        if self._rotary is not None and self.config.retro_encoder_positions:
            # "Packed": for whole neighbors, also under context parallelism.
            rotary = self._rotary(self.config.retro_retrieved_length, packed_seq=True)
        chunks = RetrievingChunks(decoder_states, chunk_length or self.config.retro_chunk_length)
        attention_mask, hidden_states = self._self_attention_mask(mask), embedded_neighbors
        for layer in self.layers:
            hidden_states, _ = layer(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                context=chunks,
                rotary_pos_emb=rotary,
            )
        return hidden_states

    def _self_attention_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or not self.config.retro_mask_padding:
            return None
        # A missing neighbor attends to all of itself; the result is not read.
        mask = mask & ~mask.all(dim=1, keepdim=True)
        return mask[:, None, None, :]
