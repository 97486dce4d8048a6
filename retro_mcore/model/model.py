"""RetroModel: Megatron-Core's GPTModel with a neighbor encoder and chunked cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from retro_mcore.errors import ConfigurationError, ShapeError
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.neighbor_encoder import NeighborEncoder
from retro_mcore.model.specs import RetroBlockSubmodules


class RetroModel(GPTModel):
    """The Retro language model.

    Args:
        config: A RetroConfig.
        transformer_layer_spec: From `get_retro_decoder_block_spec(config, ...)`.
        vocab_size: Padded vocabulary size.
        max_sequence_length: Longest sequence, and longest retrieved text.
        **gpt_model_kwargs: As GPTModel takes them (pre_process, post_process, vp_stage,
            share_embeddings_and_output_weights, position_embedding_type, rotary_percent, ...).

    Raises:
        ConfigurationError: an argument does not fit Retro.
    """

    def __init__(
        self,
        config: RetroConfig,
        transformer_layer_spec: RetroBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *args: Any,
        **gpt_model_kwargs: Any,
    ) -> None:
        if not isinstance(transformer_layer_spec, RetroBlockSubmodules):
            raise ConfigurationError(
                "transformer_layer_spec",
                f"a {type(transformer_layer_spec).__name__}",
                "Build it with get_retro_decoder_block_spec(config, ...)",
            )
        super().__init__(
            config,
            transformer_layer_spec,
            vocab_size,
            max_sequence_length,
            *args,
            **gpt_model_kwargs,
        )
        self.config: RetroConfig = config
        learned_positions = self.position_embedding_type == "learned_absolute"
        retrieved_length = config.retro_num_retrieved_chunks * config.retro_chunk_length
        if learned_positions and retrieved_length > max_sequence_length:
            raise ConfigurationError(
                "max_sequence_length",
                f"{max_sequence_length} positions for {retrieved_length} retrieved tokens",
                "Raise it to retro_num_retrieved_chunks * retro_chunk_length",
            )
        self.neighbor_encoder: NeighborEncoder | None = None
        if transformer_layer_spec.neighbor_encoder is not None:
            self.neighbor_encoder = NeighborEncoder(
                config,
                transformer_layer_spec.neighbor_encoder,
                rotary=getattr(self, "rotary_pos_emb", None),
                pg_collection=self.pg_collection,
            )
            self._first_retro_layer().cross_attention.encode_neighbors_with(self.neighbor_encoder)

    def _first_retro_layer(self) -> Any:
        first = self.config.retro_layer_numbers[0]
        return next(layer for layer in self.decoder.layers if layer.layer_number == first)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        context_input_ids: Tensor | None = None,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits, or the loss of each token.

        Args:
            input_ids: `[B, S]`.
            position_ids: `[B, S]`.
            attention_mask: bool, broadcastable to `[B, 1, S, S]`, True = masked out; None: causal.
            context_input_ids: `[B * L * K, R]`, the retrieved tokens, row `(b * L + l) * K + k`.
                None: retrieval is off and the model is its GPT decoder.
            context_position_ids: `[B * L * K, R]`; None: each row counts from 0.
            context_mask: bool `[B * L * K, R]`, True = padding or missing; None: all are real.
            labels: `[B, S]`.

        Returns:
            `[B, S]` losses if labels are given, else `[B, S, V]` logits (this rank's part of V).

        Raises:
            ShapeError: the context does not have the shape that input and configuration imply.
        """
        context = None
        if context_input_ids is not None:
            self._check_context(input_ids, context_input_ids, context_mask)
        if context_input_ids is not None and context_input_ids.numel():
            if context_position_ids is None:
                positions = torch.arange(context_input_ids.size(1), device=context_input_ids.device)
                context_position_ids = positions.expand_as(context_input_ids)
            context = self.embedding(context_input_ids, context_position_ids)
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            decoder_input=decoder_input,
            labels=labels,
            inference_context=inference_context,
            extra_block_kwargs={"context": context, "context_mask": context_mask},
            **kwargs,
        )

    def _check_context(self, input_ids: Tensor, context: Tensor, mask: Tensor | None) -> None:
        batch_size, sequence_length = input_ids.shape
        num_chunks = self.config.chunk_grid(sequence_length).num_chunks
        rows = batch_size * num_chunks * self.config.retro_num_neighbors
        expected = (rows, self.config.retro_retrieved_length)
        for name, tensor in {"context_input_ids": context, "context_mask": mask}.items():
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ShapeError(
                    name,
                    f"shape {tuple(tensor.shape)}",
                    f"Expected {expected}: {batch_size} samples x {num_chunks} chunks x "
                    f"{self.config.retro_num_neighbors} neighbors, "
                    f"{self.config.retro_retrieved_length} retrieved tokens",
                )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As GPTModel's; layers differ from one another, so each is stored under its own name."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)
