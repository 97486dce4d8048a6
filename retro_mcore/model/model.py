"""RetroModel: a decoder with a neighbor encoder and chunked cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from retro_mcore.errors import ConfigurationError, ShapeError
from retro_mcore.model.chunks import nearest_first, unread_neighbors
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.documents import mask_apart
from retro_mcore.model.family_layers import resampled_frequencies
from retro_mcore.model.initialization import initialize_hidden_weights, scale_output_layer
from retro_mcore.model.neighbor_encoder import NeighborEncoder
from retro_mcore.model.pipeline import (
    EmbeddingGroups,
    carries_neighbors,
    finalize_with_copies,
    is_interleaved,
    stage_layer_numbers,
    unpack,
)
from retro_mcore.model.specs import RetroBlockSubmodules


class RetroModel(DecoderModel):
    """The Retro language model.

    Args:
        config: A RetroConfig.
        transformer_layer_spec: From `get_retro_decoder_block_spec(config, ...)`.
        vocab_size: Padded vocabulary size.
        max_sequence_length: Longest sequence, and longest retrieved text.
        **decoder_kwargs: As DecoderModel takes them (pre_process, post_process, vp_stage,
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
        **decoder_kwargs: Any,
    ) -> None:
        if not isinstance(transformer_layer_spec, RetroBlockSubmodules):
            raise ConfigurationError(
                "transformer_layer_spec",
                f"a {type(transformer_layer_spec).__name__}",
                "Build it with get_retro_decoder_block_spec(config, ...)",
            )
        super().__init__(
            config, transformer_layer_spec, vocab_size, max_sequence_length, **decoder_kwargs
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
        self._stage_input: Tensor | None = None
        self.embedding_groups: EmbeddingGroups | None = None  # set by `share_embedding`
        self.neighbor_encoder: NeighborEncoder | None = None
        if transformer_layer_spec.neighbor_encoder is not None:
            self.neighbor_encoder = NeighborEncoder(
                config,
                transformer_layer_spec.neighbor_encoder,
                rotary=self._encoder_rotary(),
                pg_collection=self.pg_collection,
            )
            self._first_retro_layer().cross_attention.encode_neighbors_with(self.neighbor_encoder)
            if not self.pre_process:
                self._copy_embedding()
        elif self.pre_process:
            self._mark_copied(self.embedding, is_copy=False)
        initialize_hidden_weights(self)
        if self.post_process:
            scale_output_layer(self)

    def _encoder_rotary(self) -> RotaryEmbedding | None:
        if self.position_embedding_type != "rope":
            return None
        channels = self.config.encoder_config().kv_channels
        if channels == self.config.kv_channels:
            return self.rotary_pos_emb
        rotary = self._build_rotary(channels)
        if self.config.retro_encoder_rotary_scaling:
            decoders = self.rotary_pos_emb
            rotary.seq_len_interpolation_factor = decoders.seq_len_interpolation_factor
            rotary.inv_freq = resampled_frequencies(decoders.inv_freq, rotary.inv_freq.numel())
        return rotary

    @property
    def has_embedding_copy(self) -> bool:
        """Whether this stage holds the embedding for the encoder, not for its own input."""
        return self.neighbor_encoder is not None and not self.pre_process

    @property
    def has_own_embedding_copy(self) -> bool:
        """Whether it also is not the last stage's tied output weight."""
        return self.has_embedding_copy and not self._output_is_embedding()

    def _output_is_embedding(self) -> bool:
        return self.post_process and self.share_embeddings_and_output_weights

    def _copy_embedding(self) -> None:
        """The embedding of the retrieved tokens, on a stage that is not the first."""
        self.embedding = self._build_embedding()
        self._mark_copied(self.embedding, is_copy=True)
        words: Any = self.embedding.word_embeddings.weight
        words.is_embedding_or_output_parameter = True  # as Megatron marks the first stage's
        if self._output_is_embedding():
            self.embedding.word_embeddings.weight = self.output_layer.weight

    def _mark_copied(self, embedding: LanguageModelEmbedding, is_copy: bool) -> None:
        if self.config.pipeline_model_parallel_size == 1:
            return
        for weight in embedding.parameters():
            # A gradient bucket of its own, so that the distributed optimizer cuts every copy alike.
            weight.shared_embedding = True  # type: ignore[attr-defined]
            if is_copy:  # left out of the gradient norm
                weight.shared = True  # type: ignore[attr-defined]

    def _first_retro_layer(self) -> Any:
        first = self.config.retro_layer_numbers[0]
        return next(layer for layer in self.decoder.layers if layer.layer_number == first)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        context_input_ids: Tensor | None = None,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Logits, or the loss of each token; other arguments are DecoderModel's.

        Args:
            input_ids: `[B, S]`; may be None on pipeline stages that are neither first nor last.
            position_ids: `[B, S]`, likewise.
            attention_mask: bool, broadcastable to `[B, 1, S, S]`, True = masked out; None: causal.
            context_input_ids: `[B * L * K, R]`, the retrieved tokens, row `(b * L + l) * K + k`.
                None: retrieval is off and the model is its GPT decoder. Every pipeline stage must
                get it, for the shape of what it receives.
            context_position_ids: `[B * L * K, R]`; None: each row counts from 0.
            context_mask: bool `[B * L * K, R]`, True = padding or missing; None: all are real.
                Under context parallelism `[B * (L + 2) * K, R]`, required: each of the rank's two
                pieces begins with the chunk before it. M more columns stand for `segments`
                (`RetroBatch.part` gives all arguments).
            labels: `[B, S]`.
            segments: `[B, S]`, the document of each token; positions read only neighbors of chunks
                of their own document, and attend to it alone; `attention_mask` masks out what it
                does besides. None: the text is one document.
            packed_seq_params: Instead of `segments`, the documents of the row (B is 1) in
                Megatron's form; positions are the caller's. Every pipeline stage must get these
                or the segments.

        Returns:
            `[B, S]` losses if labels are given, else `[B, S, V]` logits (this rank's part of V).

        Raises:
            ShapeError: the context or the segments do not have the shape that input and
                configuration imply, or there are several rows with `packed_seq_params`.
            ConfigurationError: there are `segments` with `packed_seq_params`; these contradict
                themselves or the row; either with an `attention_mask` that is not bool; or the
                layers cannot keep documents apart (Transformer Engine's; under context parallelism
                use `RetroBatch.part`).
        """
        context = None
        if self.training and self.embedding_groups is not None:
            finalize_with_copies(self.config, self.embedding_groups)
        if context_input_ids is not None:
            self._check_context(input_ids, context_input_ids, context_mask)
        if context_input_ids is None or not context_input_ids.numel():
            context_input_ids = context_mask = None
        elif self.config.pipeline_model_parallel_size > 1 and context_mask is None:
            context_mask = torch.zeros_like(context_input_ids, dtype=torch.bool)
        if not self.pre_process:
            context = self._unpack_stage_input(context_mask)
        if segments is not None or packed_seq_params is not None:
            text = self.text_shape(input_ids, decoder_input)
            if segments is not None:
                self._check_segments(segments, text, packed_seq_params)
            else:
                segments, padding_mask = self.read_packed(packed_seq_params, text, padding_mask)
            attention_mask = mask_apart(segments, attention_mask)
        if segments is not None and context_input_ids is not None:
            context_mask = self._with_unread(context_input_ids, context_mask, segments)
        if context_mask is not None:
            context_mask = nearest_first(context_mask, self.config.retro_num_neighbors)
        if context_input_ids is not None and self.neighbor_encoder is not None:
            context = self.embed_neighbors(context_input_ids, context_position_ids)
        hidden_SBD = self.run_decoder(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input,
            context=context,
            context_mask=context_mask,
            padding_mask=padding_mask,
        )
        return self.finish(hidden_SBD, labels, runtime_gather_output)

    def _check_segments(
        self,
        segments: Tensor,
        text: tuple[int, int, torch.device],
        packed: PackedSeqParams | None,
    ) -> None:
        if packed is not None:
            raise ConfigurationError(
                "packed_seq_params", "given together with segments", "Give one of them"
            )
        self.check_keeps_apart("segments")
        if tuple(segments.shape) != text[:2]:
            raise ShapeError(
                "segments",
                f"shape {tuple(segments.shape)}",
                f"Expected {text[:2]}, the document of each token",
            )

    def _with_unread(
        self, context_input_ids: Tensor, context_mask: Tensor | None, segments_BS: Tensor
    ) -> Tensor:
        """The context's mask with M more columns; see `ChunkedCrossAttention.forward`.

        Raises:
            ConfigurationError: the first chunk of a right-aligned grid is partial.
        """
        grid = self.config.chunk_grid(segments_BS.size(1))
        if grid.first_chunk_length != grid.chunk_length:
            raise ConfigurationError(
                "segments or packed_seq_params",
                f"{segments_BS.size(1)} tokens on a right-aligned grid",
                f"Give a multiple of the chunk length {grid.chunk_length}",
            )
        if context_mask is None:
            context_mask = torch.zeros_like(context_input_ids, dtype=torch.bool)
        unread = unread_neighbors(segments_BS, grid)
        unread = unread.repeat_interleave(self.config.retro_num_neighbors, dim=0)
        return torch.cat((context_mask, unread), dim=1)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the previous stage sent; `forward` knows how to unpack it."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self._stage_input = input_tensor

    def _unpack_stage_input(self, context_mask: Tensor | None) -> Tensor | None:
        """Hand the hidden states to the decoder; the encoded neighbors, if they came along."""
        assert self._stage_input is not None, "the schedule sets the input of a later stage first"
        hidden, neighbors = self._stage_input, None
        previous_layer = stage_layer_numbers(self.config, self.vp_stage).start - 1
        arriving = carries_neighbors(self.config, previous_layer)
        if context_mask is not None and (arriving or is_interleaved(self.config)):
            hidden, neighbors = unpack(hidden, self.config, context_mask.size(0))
            neighbors = neighbors.to(self.config.params_dtype) if arriving else None
        self.decoder.set_input_tensor(hidden)
        return neighbors

    def embed_neighbors(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The embedded neighbors, which `forward` gives to the decoder as `context`.

        Args:
            tokens: `[N * K, R]`, row `n * K + k` the k-th neighbor of chunk n.
            positions: `[N * K, R]`; None: each row counts from 0.

        Returns:
            `[R, K * N, D]`, column `k * N + n`.
        """
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        num_neighbors = self.config.retro_num_neighbors
        return self.embedding(
            nearest_first(tokens, num_neighbors), nearest_first(positions, num_neighbors)
        )

    def _check_context(
        self, input_ids: Tensor | None, context: Tensor, mask: Tensor | None
    ) -> None:
        if input_ids is None:  # stages in the middle of a pipeline need no text
            return
        batch_size, sequence_length = input_ids.shape
        num_chunks = self.config.chunk_grid(sequence_length).num_chunks
        if self.config.context_parallel_size > 1:
            self._check_pieces(sequence_length)
        self._check_shape("context_input_ids", context, batch_size, num_chunks)
        if self.config.context_parallel_size > 1:
            # M more columns: positions that must not read a chunk's neighbors.
            retrieved = self.config.retro_retrieved_length
            assert retrieved is not None  # set by the configuration
            if mask is not None and mask.size(1) == retrieved + self.config.retro_chunk_length:
                mask = mask[:, :retrieved]
            self._check_shape("context_mask", mask, batch_size, num_chunks + 2)
        elif mask is not None:
            self._check_shape("context_mask", mask, batch_size, num_chunks)

    def _check_pieces(self, sequence_length: int) -> None:
        if sequence_length % (2 * self.config.retro_chunk_length):
            raise ShapeError(
                "input_ids",
                f"{sequence_length} tokens of each sample on this rank",
                "Under context parallelism a rank holds two pieces of whole chunks: choose a "
                f"multiple of {2 * self.config.retro_chunk_length}",
            )

    def _check_shape(
        self, name: str, tensor: Tensor | None, batch_size: int, num_chunks: int
    ) -> None:
        config = self.config
        expected = (
            batch_size * num_chunks * config.retro_num_neighbors,
            config.retro_retrieved_length,
        )
        found = None if tensor is None else tuple(tensor.shape)
        if found != expected:
            raise ShapeError(
                name,
                f"shape {found}",
                f"Expected {expected}: {batch_size} samples x {num_chunks} chunks x "
                f"{config.retro_num_neighbors} neighbors, "
                f"{config.retro_retrieved_length} retrieved tokens",
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """DecoderModel's, with each layer under its own name, because the layers differ."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_embedding_copy:
            for key, entry in state.items():
                if key.startswith(f"{prefix}embedding.") and isinstance(entry, ShardedBase):
                    # Not the main replica: the first stage's (0) and the tied output's (1) differ.
                    entry.replica_id = (2, *entry.replica_id[1:])
        return state
