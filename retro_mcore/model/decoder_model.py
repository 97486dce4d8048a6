"""The decoder as a language model: a GPT, and the base of `RetroModel`.

It stands on Megatron-Core's LanguageModule and TransformerBlock (docs/decisions/0031). Attributes
have the names that Megatron's schedules, trainers and checkpoints look up.

Shapes: B batch, S sequence, D hidden, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from retro_mcore.errors import ConfigurationError, ShapeError, raise_problems
from retro_mcore.model.documents import mask_apart, read_packed
from retro_mcore.model.family_layers import scale_embedding, scale_logits, set_frequencies
from retro_mcore.platform.attention import SDPAttention
from retro_mcore.platform.compatibility import config_value
from retro_mcore.platform.offloading import ActivationOffloading

PositionEmbedding = Literal["learned_absolute", "rope", "none"]

#: Fields of Megatron's configurations that would change the model, and that it does not have.
_UNSUPPORTED = (
    "mtp_num_layers",
    "multi_latent_attention",
    "use_mup",
    "enable_mhc_connections",
    "quant_recipe",
    "fp8_output_proj",
    "fine_grained_activation_offloading",
    "overlap_moe_expert_parallel_comm",
    "moe_paged_stash",
)


_OF_LINEAR = re.compile(r"\.linear_\w+\._extra_state$")


class DecoderModel(LanguageModule):
    """A decoder-only language model, or one pipeline stage of it.

    Args:
        config: A DecoderConfig, or Megatron's TransformerConfig.
        transformer_layer_spec: The layers of this stage (`get_gpt_decoder_block_spec`).
        vocab_size: Padded vocabulary size.
        max_sequence_length: Longest sequence; the number of learned positions.
        pre_process: Whether this stage embeds tokens.
        post_process: Whether this stage computes logits.
        parallel_output: Whether logits stay divided over tensor parallel ranks.
        share_embeddings_and_output_weights: Whether the output layer uses the embedding's weights.
        position_embedding_type: "learned_absolute", "rope" or "none".
        rotary_percent: Share of a head's channels that is rotated.
        rotary_base: Base period of the rotary embedding.
        rope_scaling: Whether to stretch the long periods, as Llama 3.1 does.
        rope_scaling_factor: Factor by which they are stretched.
        seq_len_interpolation_factor: Factor by which rotary positions are divided.
        pg_collection: Process groups; default: Megatron's global ones.
        vp_stage: Virtual pipeline stage.

    Raises:
        ConfigurationError: the configuration has features that this model does not have. Names
            all of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: PositionEmbedding = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        seq_len_interpolation_factor: float | None = None,
        pg_collection: Any = None,
        vp_stage: int | None = None,
    ) -> None:
        raise_problems([*_unsupported(config, position_embedding_type)])
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder  # schedules ask for it
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.rotary_percent, self.rotary_base = rotary_percent, rotary_base
        # The order of construction decides which random numbers become which weights.
        if pre_process:
            self.embedding = self._build_embedding()
        if position_embedding_type == "rope":
            self.rotary_pos_emb = self._build_rotary(
                config.kv_channels,
                rope_scaling=rope_scaling,
                rope_scaling_factor=rope_scaling_factor,
                seq_len_interpolation_factor=seq_len_interpolation_factor,
            )
            set_frequencies(self.rotary_pos_emb, config)
        self.decoder = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        self.offloading = ActivationOffloading(_layers_to_offload(config))
        if self.offloading.num_layers:
            self.decoder.offload_context = self.offloading
        if post_process:
            self.output_layer = self._build_output_layer()
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _build_embedding(self) -> LanguageModelEmbedding:
        embedding = LanguageModelEmbedding(
            config=self.config,
            vocab_size=self.vocab_size,
            max_sequence_length=self.max_sequence_length,
            position_embedding_type=self.position_embedding_type,
            tp_group=self.pg_collection.tp,
        )
        scale_embedding(embedding, self.config)
        return embedding

    def _build_rotary(self, channels: int, **scaling: Any) -> RotaryEmbedding:
        return RotaryEmbedding(
            channels,
            rotary_percent=self.rotary_percent,
            rotary_interleaved=self.config.rotary_interleaved,
            rotary_base=self.rotary_base,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
            **scaling,
        )

    def _build_output_layer(self) -> ColumnParallelLinear:
        config = self.config
        # Megatron's schedules find the buffers of `defer_embedding_wgrad_compute` on the model.
        deferred = config.defer_embedding_wgrad_compute
        self.embedding_activation_buffer: list[Tensor] | None = [] if deferred else None
        self.grad_output_buffer: list[Tensor] | None = [] if deferred else None
        layer = ColumnParallelLinear(
            config.hidden_size,
            self.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=not self.parallel_output,
            skip_weight_param_allocation=(
                self.pre_process and self.share_embeddings_and_output_weights
            ),
            embedding_activation_buffer=self.embedding_activation_buffer,
            grad_output_buffer=self.grad_output_buffer,
            tp_group=self.pg_collection.tp,
        )
        scale_logits(layer, config)
        return layer

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states that the previous stage sent."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Logits, or the loss of each token.

        Args:
            input_ids: `[B, S]`; read on the first pipeline stage only.
            position_ids: `[B, S]`, likewise.
            attention_mask: bool, broadcastable to `[B, 1, S, S]`, True = masked out; None: causal.
            decoder_input: `[S, B, D]`, embedded tokens to use instead of `input_ids`.
            labels: `[B, S]`.
            packed_seq_params: The documents of the row (B is 1), in Megatron's form; they do not
                attend to one another. Every pipeline stage must get it.
            padding_mask: bool `[B, S]`, True = left out of the experts' balance, beside what
                `packed_seq_params` calls padding.
            runtime_gather_output: Whether to gather logits over tensor parallel ranks; None: as
                the model was built.

        Returns:
            On the last stage `[B, S]` losses if labels are given, else `[B, S, V]` logits. On
            other stages hidden states `[S, B, D]`.

        Raises:
            ConfigurationError: `packed_seq_params` contradicts itself or the row, or comes with an
                `attention_mask` that is not bool, or these layers cannot keep documents apart.
            ShapeError: there are several rows with `packed_seq_params`.
        """
        if packed_seq_params is not None:
            text = self.text_shape(input_ids, decoder_input)
            segments, padding_mask = self.read_packed(packed_seq_params, text, padding_mask)
            attention_mask = mask_apart(segments, attention_mask)
        hidden_SBD = self.run_decoder(
            input_ids, position_ids, attention_mask, decoder_input, padding_mask=padding_mask
        )
        return self.finish(hidden_SBD, labels, runtime_gather_output)

    def text_shape(
        self, input_ids: Tensor | None, decoder_input: Tensor | None
    ) -> tuple[int, int, torch.device]:
        """B, S and the device of what this stage computes, which may be without `input_ids`.

        Under sequence parallelism S is the whole length, though each rank holds a part.
        """
        states = decoder_input if self.pre_process else self.decoder.input_tensor
        if states is None:
            assert input_ids is not None, "the first stage embeds tokens, or gets them embedded"
            return input_ids.size(0), input_ids.size(1), input_ids.device
        parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return states.size(1), states.size(0) * parts, states.device

    def read_packed(
        self,
        packed: PackedSeqParams,
        text: tuple[int, int, torch.device],
        padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The documents of a packed row, and what the experts' balance leaves out.

        Args:
            packed: As `documents.packed_segments` reads it.
            text: From `text_shape`.
            padding_mask: bool `[1, S]`, or None.

        Returns:
            int64 `[1, S]`; `padding_mask` with the padding of documents.

        Raises:
            ConfigurationError, ShapeError: as `forward` says.
        """
        self.check_keeps_apart("packed_seq_params")
        rows, length, device = text
        if rows != 1:
            raise ShapeError(
                "packed_seq_params",
                f"given with {rows} rows",
                "Put all documents into one row, or give segments",
            )
        segments, padding = read_packed(packed, length)
        if padding is not None and self.config.num_moe_experts is not None:
            padding = padding.to(device)
            padding = padding if padding_mask is None else padding | padding_mask.bool()
            padding_mask = padding & ~padding.all()  # all balance, where none would
        return segments.to(device), padding_mask

    def check_keeps_apart(self, name: str) -> None:
        """Reject documents where attention cannot keep them apart.

        Args:
            name: The argument that describes them.

        Raises:
            ConfigurationError: the attention takes no mask, or each rank has a part of the row.
        """
        if self.config.context_parallel_size > 1:
            raise ConfigurationError(
                name,
                "given under context parallelism, where a rank does not see whole documents",
                "Give RetroBatch.from_text(..., segments=...).part(...).model_inputs() "
                "(docs/training.md)",
            )
        for layer in self.decoder.layers:
            attention = getattr(layer.self_attention, "core_attention", None)
            if not isinstance(attention, SDPAttention):
                raise ConfigurationError(
                    name,
                    f"given to layers with {type(attention).__name__}, which was never run with "
                    "documents kept apart",
                    "Build local layers (use_transformer_engine=False, --transformer-impl local)",
                )

    def run_decoder(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        **to_layers: Any,
    ) -> Tensor:
        """Hidden states `[S, B, D]` after this stage's layers; they get `to_layers` as well."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        rotary = None
        if self.position_embedding_type == "rope":
            length = self.rotary_pos_emb.get_rotary_seq_len(
                None, self.decoder, decoder_input, self.config
            )
            rotary = self.rotary_pos_emb(length)
        with self.offloading.forward_pass():
            return self.decoder(
                hidden_states=decoder_input,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary,
                **to_layers,
            )

    def finish(
        self, hidden_SBD: Tensor, labels: Tensor | None, gather_output: bool | None = None
    ) -> Tensor:
        """Logits `[B, S, V]`, or losses `[B, S]` of labels; hidden states before the last stage."""
        if not self.post_process:
            return hidden_SBD
        logits_SBV = self.logits(hidden_SBD, gather_output)
        if labels is None:
            return logits_SBV.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits_SBV)

    def logits(self, hidden_SBD: Tensor, gather_output: bool | None = None) -> Tensor:
        """Logits `[S, B, V]` of hidden states after the last layer."""
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits_SBV, _ = self.output_layer(
            hidden_SBD, weight=weight, runtime_gather_output=gather_output
        )
        return logits_SBV

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Megatron's, without extra states that are always empty.

        Those are the output layer's, which no GPT checkpoint has, and those of Transformer Engine's
        norms, which no checkpoint of local layers has.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key in [key for key in state if key.endswith("_extra_state")]:
            if not _OF_LINEAR.search(key):
                data = state.pop(key).data
                assert data is None or len(data) == 0, f"{key} is not empty"
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.state_dict(keep_vars=True):
            if name.endswith("_extra_state"):  # empty where a checkpoint lacks it
                state_dict.setdefault(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _layers_to_offload(config: TransformerConfig) -> int:
    """Number of layers; none if Transformer Engine's own offloading was asked for."""
    return 0 if config.cpu_offloading else config.cpu_offloading_num_layers


def _unsupported(
    config: TransformerConfig, position_embedding_type: str
) -> Iterator[ConfigurationError]:
    for name in _UNSUPPORTED:
        value = config_value(config, name, absent=None)
        if value:
            yield ConfigurationError(
                name, f"{value}, which this model does not have", "Leave it out"
            )
    if config_value(config, "use_te_activation_func", absent=False) and (
        config.activation_func is torch.nn.functional.gelu
    ):
        yield ConfigurationError(
            "use_te_activation_func",
            "True with GELU, of which Transformer Engine has the tanh approximation alone",
            "Leave it out",
        )
    if position_embedding_type not in ("learned_absolute", "rope", "none"):
        yield ConfigurationError(
            "position_embedding_type",
            f"{position_embedding_type!r}",
            "Use learned_absolute, rope or none",
        )
