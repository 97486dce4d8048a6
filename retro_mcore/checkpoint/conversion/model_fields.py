"""What each option of the model means to others: one table, which tests hold complete.

An option that is added to `ModelArguments` has to be added here: with its name among Megatron's
arguments, or with the values with which our model computes what one without the option does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Flags = dict[str, Any]


@dataclass(frozen=True)
class ModelField:
    """An option of the model.

    Attributes:
        megatron: Its name among Megatron's arguments; None where they have none of its meaning.
        decoder: Whether it says what a GPT computes: --load-gpt takes it from the checkpoint, and
            a flag beside it must agree.
        default: What a checkpoint that does not say it has.
        is_neutral: Of ours alone: whether the model computes the same without it. None: it is no
            matter of numbers, or `targets.check_target` looks at it by itself.
        instructretro: Whether InstructRetro's code has it; if not, `default` is what it computes.
        megatron_core: The same of Megatron-core's Retro: there may be an argument that only the
            older code reads.
    """

    megatron: str | None
    decoder: bool = False
    default: Any = None
    is_neutral: Callable[[Any, Flags], bool] | None = None
    instructretro: bool = True
    megatron_core: bool = True


def _same(name: str, decoder: bool = False, **more: Any) -> tuple[str, ModelField]:
    return name, ModelField(name, decoder, **more)


def _decoder(name: str, **more: Any) -> tuple[str, ModelField]:
    return _same(name, decoder=True, **more)


def _ours(
    name: str, is_neutral: Callable[[Any, Flags], bool] | None, decoder: bool = False, **more: Any
) -> tuple[str, ModelField]:
    return name, ModelField(None, decoder, is_neutral=is_neutral, **more)


def _off(value: Any, flags: Flags) -> bool:
    return not value


def _as(other: str) -> Callable[[Any, Flags], bool]:
    return lambda value, flags: value is None or value == flags.get(other)


def _as_decoder_heads(value: Any, flags: Flags) -> bool:
    heads = flags["num_attention_heads"]
    channels = flags.get("kv_channels") or flags["hidden_size"] // heads
    groups = flags.get("num_query_groups") or heads
    usual = groups == heads and channels * heads == flags["hidden_size"]
    return value is None or (value == heads and usual)


#: By the option's name, in the order in which contradictions are told.
MODEL_FIELDS: Mapping[str, ModelField] = dict(
    (
        _decoder("num_layers"),
        _decoder("hidden_size"),
        _decoder("num_attention_heads"),
        _same("group_query_attention"),
        _decoder("num_query_groups"),
        _decoder("kv_channels"),
        _decoder("ffn_hidden_size"),
        _decoder("normalization"),
        _decoder("norm_epsilon"),
        _decoder("apply_layernorm_1p"),
        _decoder("swiglu"),
        _decoder("openai_gelu"),
        _decoder("squared_relu"),
        _decoder("position_embedding_type"),
        _decoder("rotary_percent"),
        _decoder("rotary_base", default=10000, instructretro=False),
        _decoder("rotary_interleaved", default=False, instructretro=False),
        _decoder("rotary_seq_len_interpolation_factor", instructretro=False),
        _decoder("use_rope_scaling", default=False, instructretro=False),
        _decoder("rope_scaling_factor"),
        _decoder("max_position_embeddings"),
        _decoder("untie_embeddings_and_output_weights"),
        ("disable_bias_linear", ModelField("add_bias_linear", decoder=True)),
        _decoder("add_qkv_bias", default=False, instructretro=False),
        _decoder("qk_layernorm", default=False, instructretro=False),
        ("sliding_window", ModelField("window_size", decoder=True, instructretro=False)),
        _ours("retro_deepnorm", _off, decoder=True, default=False),
        _ours("retro_mup_base_hidden_size", _off, decoder=True),
        _ours("retro_mup_base_kv_channels", _off),
        _same("hidden_dropout"),
        _same("attention_dropout"),
        _same("init_method_std"),
        _same("init_method_xavier_uniform"),
        _same("embedding_init_method_std"),
        _same("make_vocab_size_divisible_by"),
        _ours("retro_origin", None),
        ("no_retrieval", ModelField("retro_add_retriever")),
        _same("retro_attention_gate", default=1.0, megatron_core=False),
        _same("retro_num_neighbors"),
        _same("retro_num_retrieved_chunks"),
        ("retro_encoder_num_layers", ModelField("retro_encoder_layers")),
        _same("retro_encoder_hidden_dropout"),
        _same("retro_encoder_attention_dropout"),
        _ours("retro_encoder_cross_attention_dropout", _as("attention_dropout")),
        _ours("retro_encoder_hidden_size", _as("hidden_size")),
        _ours("retro_encoder_num_attention_heads", _as_decoder_heads),
        _ours("retro_encoder_ffn_hidden_size", _as("ffn_hidden_size")),
        _ours("retro_cross_attention_positions", lambda value, _: value in (None, "none")),
        _ours("retro_decoder_layers", None),
        _same("seq_length"),
        ("retro_chunk_length", ModelField("retro_gpt_chunk_length")),
        _same("vocab_size"),
        _same("padded_vocab_size"),
        _same("tokenizer_type"),
        _ours("tokenizer_fingerprint", None),
    )
)

#: Flags that must agree when a model takes a checkpoint's decoder.
DECODER_FLAGS = tuple(name for name, field in MODEL_FIELDS.items() if field.decoder)
#: Options that only ours have, with the values of a model that does not say them.
OURS_ALONE: Flags = {
    name: field.default
    for name, field in MODEL_FIELDS.items()
    if field.megatron is None and field.is_neutral is not None
}
