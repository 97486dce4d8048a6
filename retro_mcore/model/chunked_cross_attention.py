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
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from retro_mcore.chunking import ChunkGrid
from retro_mcore.model.cached_attention import cross_attend
from retro_mcore.model.chunks import RetrievingChunks, split_chunks
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.context_parallel import (
    AttendingCut,
    with_chunks_before,
    without_chunk_before_text,
    without_chunks_before,
)
from retro_mcore.model.cross_attention import RetroCrossAttention
from retro_mcore.model.inference_context import InferenceContext

if TYPE_CHECKING:
    from retro_mcore.model.neighbor_encoder import NeighborEncoder


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
                Under context parallelism S is this rank's two pieces of the sequence, and L below
                includes the chunk before each piece, except for the embedded neighbors.
            attention_mask: bool `[K * B * L, R]`, True = padding or missing. None: all real. M more
                columns, equal for all K, mark which of the M positions that attend to a chunk's
                neighbors must not read them (`chunks.unread_neighbors`).
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
            return cross_attend(
                self, self.neighbor_encoders, hidden_states, key_value_states, inference_context
            )
        if key_value_states is None:
            return {"output": None, "bias": None, "context": None}
        gate = self.config.retro_attention_gate
        if gate == 0.0:
            return {"output": None, "bias": None, "context": key_value_states}
        attention_mask, unread_MN = self._part_mask(attention_mask)
        for encoder in self.neighbor_encoders:
            key_value_states = self._encode(
                encoder, key_value_states, hidden_states, attention_mask
            )

        query_SBHC = self.project_query(hidden_states)
        cut = AttendingCut.of(self.config, *query_SBHC.shape[:2])
        mask, has_neighbors_BL = self._retrieved_mask(attention_mask)
        # The attending tokens start with their chunk's last one.
        attended_MBLX = self.attend(
            self.rotate(cut.split(query_SBHC), first=self.config.retro_chunk_length - 1),
            self.project_neighbors(key_value_states, attention_mask),
            mask,
        )
        all_BL = attended_MBLX.new_ones(attended_MBLX.size(1), dtype=torch.bool)
        if self.config.context_parallel_size > 1:
            mark_BL = all_BL if has_neighbors_BL is None else has_neighbors_BL
            has_neighbors_BL = without_chunk_before_text(
                mark_BL, cut.batch_size, self.pg_collection.cp
            )
        reads_MN = (all_BL if has_neighbors_BL is None else has_neighbors_BL)[None]
        if unread_MN is not None:
            reads_MN = reads_MN & ~unread_MN
        if has_neighbors_BL is not None or unread_MN is not None:
            attended_MBLX = attended_MBLX * reads_MN[:, :, None]
        if self.config.sequence_parallel:  # the output projection scatters the sequence
            output, bias = self.linear_proj(cut.join(attended_MBLX))
        else:  # no padded copy of its input is kept for the backward pass
            output, bias = self.linear_proj(attended_MBLX)
            output = cut.join(output)
        # Only positions that attend get the bias; the others stay as they were.
        attends_SB1 = self._local_part(cut.attending(reads_MN))
        if bias is not None:
            bias = bias * attends_SB1
        if gate != 1.0:
            output, bias = output * gate, None if bias is None else bias * gate
        attended = {"output": output, "bias": bias, "attends": attends_SB1}
        return {**attended, "context": key_value_states}

    def project_neighbors(self, encoded: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of encoded neighbors, a chunk's in a row.

        With `retro_cross_attention_keys` "previous" a value lies at the key of the token before: a
        token that matches is answered with what followed it, as in kNN-LM's datastore (Khandelwal
        et al. 2020, section 2). With keys of their own, the encoder must first learn to carry the
        token before along (Olsson et al. 2022, "smeared keys"). A token after padding, and a
        neighbor's first one, keep their own key. "mixed": see `_own_keys`.

        Args:
            encoded: `[R, K * B * L, encoder's D]`.
            mask: bool `[K * B * L, R]`, True = padding.

        Returns:
            `[R * K, B * L, G, 2, C]`.
        """
        key_value = self.project_key_value(encoded)
        if self.config.retro_cross_attention_keys != "own":
            key, value = key_value.unbind(dim=-2)
            before = torch.cat((key[:1], key[:-1]))
            if mask is not None and self.config.retro_mask_padding:
                after_padding = mask.t().roll(1, dims=0)  # the first row: its own key either way
                before = key.where(after_padding[:, :, None, None], before)
            if self.config.retro_cross_attention_keys == "mixed":
                before = key.where(self._own_keys(key), before)
            key_value = torch.stack((before, value), dim=-2)
        return self.join_neighbors(self.rotate_keys(key_value))

    def _own_keys(self, key: Tensor) -> Tensor:
        """Which of this rank's query groups keep their own keys when they are mixed, bool `[G, 1]`:
        the second of every four. A single group has none."""
        groups = torch.arange(key.size(-2), device=key.device)
        return ((self.pg_collection.tp.rank() * key.size(-2) + groups) % 4 == 1)[:, None]

    def _encode(
        self, encoder: NeighborEncoder, embedded: Tensor, hidden_states: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The encoded neighbors of the chunks that this rank's positions attend to."""
        if self.config.context_parallel_size == 1:
            return encoder(embedded, hidden_states, mask)
        num_samples = self.config.retro_num_neighbors * hidden_states.size(1)
        if mask is not None:
            mask = without_chunks_before(mask, num_samples)
        encoded = encoder(embedded, hidden_states, mask)
        return with_chunks_before(encoded, num_samples, self.pg_collection.cp)

    def _part_mask(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The mask of retrieved tokens, and which positions must not read, bool `[M, B * L]`."""
        length = self.config.retro_retrieved_length
        if mask is None or mask.size(1) == length:
            return mask, None
        chunks = mask.size(0) // self.config.retro_num_neighbors
        return mask[:, :length], mask[:chunks, length:].t()

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
        key_value_states: RetrievingChunks | None = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """Attend to the retrieving chunk.

        Args:
            hidden_states: `[R, K * B * L, D]`, normed retrieved tokens.
            key_value_states: The retrieving chunks.

        Returns:
            "output" and "bias" for RetroBiasDropoutAdd, and its "residual" where that is not the
            stream.
        """
        assert key_value_states is not None, "the encoder always has its retrieving chunks"
        query = self.rotate(self.project_query(hidden_states))
        key_value = self.project_key_value(key_value_states.states)
        alignment = self.config.retro_chunk_alignment
        grid = ChunkGrid(key_value.size(0), key_value_states.length, alignment)
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
