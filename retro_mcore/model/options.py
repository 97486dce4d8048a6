"""The model's options: declared once, with all that the package needs to know about each.

`RetroConfig` inherits Retro's; flags, checkpoints and conversions read them all from here. See
`option_traits` for the metadata. This module imports neither torch nor megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from retro_mcore.errors import ConfigurationError, flag_of, raise_problems
from retro_mcore.model.expert_options import ExpertOptions, problems_of_experts
from retro_mcore.model.family_options import FamilyOptions
from retro_mcore.model.option_traits import (
    MEGATRON,
    at_least,
    between,
    checked_separately,
    decoder,
    opposite,
    ours,
    shared,
)

#: Releases of Megatron whose Retro computes otherwise than the paper's.
Origin = Literal["mcore-0.15", "mcore-0.5", "legacy"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)


def _is_off(value: Any, flags: Mapping[str, Any]) -> bool:
    return not value


def _is_none(value: Any, flags: Mapping[str, Any]) -> bool:
    return value in (None, "none")


def _is_raw(value: Any, flags: Mapping[str, Any]) -> bool:
    return value in (None, "raw")


def _is_own(value: Any, flags: Mapping[str, Any]) -> bool:
    return value in (None, "own")


def _is_decoders_dropout(value: Any, flags: Mapping[str, Any]) -> bool:
    return value is None or value == flags.get("attention_dropout")


def _is_decoders_width(value: Any, flags: Mapping[str, Any]) -> bool:
    return value is None or value == flags.get("hidden_size")


def _is_decoders_mlp(value: Any, flags: Mapping[str, Any]) -> bool:
    return value is None or value == flags.get("ffn_hidden_size")


def _are_decoders_heads(value: Any, flags: Mapping[str, Any]) -> bool:
    heads = flags["num_attention_heads"]
    channels = flags.get("kv_channels") or flags["hidden_size"] // heads
    groups = flags.get("num_query_groups") or heads
    usual = groups == heads and channels * heads == flags["hidden_size"]
    return value is None or (value == heads and usual)


@dataclass(kw_only=True)
class DecoderOptions(ExpertOptions, FamilyOptions):
    """The decoder, with or without retrieval."""

    num_layers: int = field(metadata=at_least(1) | decoder(sets="config"))
    """Number of decoder layers."""
    hidden_size: int = field(metadata=at_least(1) | decoder(sets="config"))
    """Width of the decoder's hidden states."""
    num_attention_heads: int = field(metadata=at_least(1) | decoder(sets="config", needed="always"))
    """Number of attention heads."""
    group_query_attention: bool = field(default=False, metadata=shared(sets=None))
    """Grouped-query attention with --num-query-groups."""
    num_query_groups: int | None = field(default=None, metadata=at_least(1) | decoder(sets=None))
    """Number of key and value heads (grouped-query attention). Default: one per attention head."""
    ffn_hidden_size: int | None = field(default=None, metadata=at_least(1) | decoder(sets=None))
    """Width of the MLP. Default: 4 hidden sizes, with --swiglu two thirds of that."""
    kv_channels: int | None = field(default=None, metadata=at_least(1) | decoder(sets="config"))
    """Width of an attention head. Default: hidden size / attention heads."""
    normalization: Literal["LayerNorm", "RMSNorm"] = field(
        default="LayerNorm", metadata=decoder(sets="config")
    )
    """Kind of norm."""
    norm_epsilon: float = field(
        default=1e-5,
        metadata=decoder("layernorm_epsilon", sets="config.layernorm_epsilon", needed="always"),
    )
    """Epsilon of the norms."""
    apply_layernorm_1p: bool = field(
        default=False, metadata=decoder(sets="config.layernorm_zero_centered_gamma")
    )
    """Center the norms' gain around zero (the published Retro checkpoints do)."""
    swiglu: bool = field(default=False, metadata=decoder(sets=None))
    """Use a gated SiLU in the MLP instead of GELU."""
    openai_gelu: bool = field(default=False, metadata=decoder(sets=None))
    """Use the tanh approximation of GELU, as GPT-2 does."""
    geglu: bool = field(default=False, metadata=ours(_is_off, sets=None, gpt="same", absent=False))
    """Use a gated GELU in the MLP, in its tanh approximation, instead of GELU (Gemma)."""
    squared_relu: bool = field(default=False, metadata=decoder(sets=None))
    """Use squared ReLU in the MLP instead of GELU."""
    position_embedding_type: Literal["learned_absolute", "rope"] = field(
        default="learned_absolute", metadata=decoder(sets="model")
    )
    """Kind of position embedding."""
    rotary_percent: float = field(default=1.0, metadata=decoder(sets="model", needed="rotary"))
    """Share of a head's width that is rotated."""
    rotary_base: int = field(
        default=10000, metadata=decoder(sets="model", absent=10000, computed_by=MEGATRON)
    )
    """Base period of the rotary embedding."""
    use_rope_scaling: bool = field(
        default=False,
        metadata=decoder(sets="model.rope_scaling", absent=False, computed_by=MEGATRON),
    )
    """Stretch the rotary embedding's long periods, as Llama 3.1 and later do. In a neighbor encoder
    with heads of another width only with --retro-encoder-rotary-scaling."""
    rope_scaling_factor: float = field(default=8.0, metadata=decoder(sets="model"))
    """Factor by which --use-rope-scaling stretches them."""
    max_position_embeddings: int | None = field(
        default=None, metadata=at_least(1) | decoder(sets=None, reuse="texts")
    )
    """Number of learned positions. Default: the longer of a sample and a neighbor's text."""
    rotary_interleaved: bool = field(
        default=False, metadata=decoder(sets="config", absent=False, computed_by=MEGATRON)
    )
    """Rotate even and odd dimensions as pairs instead of the two halves."""
    rotary_seq_len_interpolation_factor: float | None = field(
        default=None,
        metadata=decoder(sets="model.seq_len_interpolation_factor", computed_by=MEGATRON),
    )
    """Stretch rotary positions: a sequence this many times longer gets the same angles. In the
    neighbor encoder as --use-rope-scaling."""
    untie_embeddings_and_output_weights: bool = field(default=False, metadata=decoder(sets=None))
    """Give the output layer weights of its own."""
    disable_bias_linear: bool = field(
        default=False, metadata=opposite("add_bias_linear", sets=None, gpt="same")
    )
    """Leave out the biases of the linear layers."""
    add_qkv_bias: bool = field(
        default=False, metadata=decoder(sets="config", absent=False, computed_by=MEGATRON)
    )
    """Biases on queries, keys and values although the other linear layers have none (Qwen2)."""
    qk_layernorm: bool = field(
        default=False,
        # The layers of Megatron's Retro are built without these norms, whatever its flags say.
        metadata=decoder(sets="config", absent=False, computed_by=frozenset({"megatron-gpt"})),
    )
    """Norms on the heads of queries and keys in self-attention (Qwen3)."""
    sliding_window: int | None = field(
        default=None,
        # What others compute is checked with the texts' length (`targets.check_window`).
        metadata=at_least(1) | decoder("window_size", sets=None, form="other"),
    )
    """Number of tokens, its own included, that each position of the decoder attends to in
    self-attention; Megatron's --window-size 127,0 is --sliding-window 128. Default: all."""
    window_attn_skip_freq: list[int] | None = field(
        default=None, metadata=decoder(sets=None, form="other")
    )
    """Layers with the window: N leaves every N-th layer without, or a list of 1 (window) and 0 for
    each layer, also written as ([1]*5+[0]*1)*4. Default: all layers."""
    hidden_dropout: float = field(
        default=0.1, metadata=between(0, 1) | shared(sets="config", gpt="default", reuse="free")
    )
    """Dropout of hidden states in the decoder."""
    attention_dropout: float = field(
        default=0.1, metadata=between(0, 1) | shared(sets="config", gpt="default", reuse="free")
    )
    """Dropout of attention probabilities in the decoder."""
    init_method_std: float = field(default=0.02, metadata=shared(sets="config", reuse="free"))
    """Standard deviation of the initial weights."""
    init_method_xavier_uniform: bool = field(default=False, metadata=shared(sets=None))
    """Draw initial weights from Xavier's uniform distribution instead of a normal one."""
    embedding_init_method_std: float | None = field(default=None, metadata=shared(sets="config"))
    """Standard deviation of the embeddings' initial weights. Default: --init-method-std."""
    make_vocab_size_divisible_by: int = field(
        default=128, metadata=at_least(1) | shared(sets=None, reuse="padding")
    )
    """Pad the vocabulary to a multiple of this times the tensor parallel size."""


@dataclass(kw_only=True)
class RetroOptions:
    """Retrieval: cross-attention and neighbor encoder. `RetroConfig` has the same fields."""

    retro_attention_gate: float = field(
        default=1.0,
        # Megatron-Core's Retro has the argument too, and does not read it.
        metadata=between(0, math.inf)
        | shared(sets="config", absent=1.0, computed_by=frozenset({"instructretro"})),
    )
    """Scale of the cross-attention's output; 0 leaves the decoder alone and does not run the
    encoder, as in InstructRetro."""
    retro_num_neighbors: int = field(
        default=2, metadata=at_least(1) | shared(sets="config", needed="retrieval")
    )
    """Number of neighbors per chunk, K."""
    retro_num_retrieved_chunks: int = field(
        default=2, metadata=at_least(1) | shared(sets="config", needed="retrieval")
    )
    """Number of chunks per neighbor: 2 is the neighbor and its continuation."""
    retro_encoder_num_layers: int = field(
        default=2, metadata=at_least(1) | shared("retro_encoder_layers", sets="config")
    )
    """Number of layers of the neighbor encoder; the first cross-attends to the chunk."""
    retro_encoder_hidden_dropout: float = field(
        default=0.1, metadata=between(0, 1) | shared(sets="config", reuse="free")
    )
    """Dropout of hidden states in the neighbor encoder."""
    retro_encoder_attention_dropout: float = field(
        default=0.1, metadata=between(0, 1) | shared(sets="config", reuse="free")
    )
    """Dropout of attention probabilities in the neighbor encoder."""
    retro_encoder_cross_attention_dropout: float | None = field(
        default=None,
        metadata=between(0, 1) | ours(_is_decoders_dropout, sets="config", reuse="free"),
    )
    """Dropout of attention probabilities in the encoder's cross-attention to the chunk. Default:
    --retro-encoder-attention-dropout; Megatron's implementations use the decoder's."""
    retro_encoder_hidden_size: int | None = field(
        default=None, metadata=at_least(1) | ours(_is_decoders_width, sets="config")
    )
    """Width of the neighbor encoder. Default: --hidden-size."""
    retro_encoder_num_attention_heads: int | None = field(
        default=None, metadata=at_least(1) | ours(_are_decoders_heads, sets="config")
    )
    """Number of attention heads of the neighbor encoder, each with its own key and value. Default:
    the decoder's heads and query groups."""
    retro_encoder_ffn_hidden_size: int | None = field(
        default=None, metadata=at_least(1) | ours(_is_decoders_mlp, sets="config")
    )
    """Width of the neighbor encoder's MLP. Default: the decoder's, in proportion to the width."""
    retro_encoder_input: Literal["raw", "normed"] | None = field(
        default=None, metadata=ours(_is_raw, sets="config", absent="raw")
    )
    """Embedded tokens as they enter the neighbor encoder. normed: scaled to a mean square of 1, so
    that small embeddings are not lost among what the layers add. raw: as they are. Default: normed,
    and raw with --retro-origin."""
    retro_cross_attention_keys: Literal["own", "previous", "mixed"] | None = field(
        default=None, metadata=ours(_is_own, sets="config", absent="own")
    )
    """What the decoder finds a retrieved token by. own: itself, as in the paper. previous: the
    encoded token before it, so that what follows a match is read. mixed: itself in the second of
    every four query groups, the one before in the others. Default: mixed, and own with
    --retro-origin."""
    retro_encoder_rotary_scaling: bool = field(
        default=False, metadata=ours(_is_off, sets="config", absent=False)
    )
    """Scale the rotary embedding of a neighbor encoder whose heads are of another width than the
    decoder's as the decoder's is: each channel gets the frequency at its share of the decoder's.
    (An encoder with heads of the same width always shares the decoder's embedding.)"""
    retro_cross_attention_positions: Literal["none", "rotary"] | None = field(
        default=None, metadata=ours(_is_none, sets="config")
    )
    """Relative positions in both cross-attentions. rotary: queries and keys are rotated by their
    distance, where a chunk and its neighbors start at the same position. Default: none."""
    retro_decoder_layers: list[int] | None = field(
        default=None, metadata=checked_separately(sets="config")
    )
    """Decoder layers with cross-attention, from 1. Default: every third from 6 (9 above 15)."""
    retro_deepnorm: bool = field(
        default=False, metadata=ours(_is_off, sets="config", gpt="same", absent=False)
    )
    """DeepNorm (Wang et al. 2022), for very deep stacks: scaled residuals, norms after adding, and
    the initial weights that go with them."""
    retro_mup_base_hidden_size: int | None = field(
        default=None,
        metadata=at_least(1) | ours(_is_off, sets="config", gpt="same", our_trainer=True),
    )
    """Hidden size at which --lr and --init-method-std were tuned; muP (Yang et al. 2022) carries
    them over to this one. Default: off."""
    retro_mup_base_kv_channels: int | None = field(
        default=None,
        metadata=at_least(1) | ours(_is_off, sets="config", gpt="same", our_trainer=True),
    )
    """Width of an attention head at that size, if different."""


@dataclass(kw_only=True)
class ModelOptions(RetroOptions, DecoderOptions):
    """The model. Its checkpoints store these options, so they suffice to rebuild it."""

    retro_origin: Origin | None = field(default=None, metadata=checked_separately(sets=None))
    """Compute as a Retro that Megatron shipped (its converted checkpoints need it): mcore-0.15
    (0.8 to 0.15), mcore-0.5 (0.5 to 0.7) or legacy (InstructRetro). Default: as in the paper."""
    no_retrieval: bool = field(default=False, metadata=opposite("retro_add_retriever", sets=None))
    """Train the same GPT without encoder, cross-attention and neighbors."""

    def check_model(self) -> None:
        """Reject conflicting activations, --group-query-attention without a number of groups, and
        options of experts that cannot work.

        Raises:
            ConfigurationError: naming the flag.
        """
        raise_problems([*problems_of_activations(self)])
        if self.group_query_attention and self.num_query_groups is None:
            raise ConfigurationError(
                "--group-query-attention", "given without --num-query-groups", "Add the number"
            )
        raise_problems([*problems_of_experts(self, self.num_layers)])


def problems_of_activations(options: Any) -> Iterator[ConfigurationError]:
    """An error if more than one activation of the MLP is given.

    Args:
        options: An object that holds them; those that it lacks are off.
    """
    names = ("squared_relu", "openai_gelu", "swiglu", "geglu")
    given = [flag_of(name) for name in names if getattr(options, name, False)]
    if len(given) > 1:
        yield ConfigurationError(given[0], f"given together with {given[1]}", "Choose one")


#: Options whose default changed: the value of models that do not state them (older checkpoints and
#: Megatron's implementations), and of new models.
CHANGED_DEFAULTS = {
    "retro_encoder_input": ("raw", "normed"),
    "retro_cross_attention_keys": ("own", "mixed"),
}


def changed_defaults(origin: Origin | None) -> dict[str, str]:
    """Values of the options of `CHANGED_DEFAULTS` that are not given."""
    return {name: new if origin is None else old for name, (old, new) in CHANGED_DEFAULTS.items()}


def with_unstated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A Retro checkpoint's arguments with the values that it has without stating them."""
    return {**{name: old for name, (old, _) in CHANGED_DEFAULTS.items()}, **arguments}


@dataclass(kw_only=True)
class ModelArguments(ModelOptions):
    """The model's options and sizes from its project: all that a checkpoint needs to state."""

    seq_length: int = field(metadata=shared(sets=None, needed="always", reuse="texts"))
    """S, tokens per sample; also the default number of learned positions."""
    retro_chunk_length: int = field(
        metadata=shared("retro_gpt_chunk_length", sets=None, needed="retrieval")
    )
    """M, tokens per chunk."""
    vocab_size: int = field(metadata=shared(sets=None))
    """Size of the tokenizer's vocabulary."""
    padded_vocab_size: int = field(metadata=shared(sets=None, reuse="padding"))
    """Rows of the embedding."""
    tokenizer_type: str = field(metadata=shared(sets=None))
    """Type of the project's tokenizer."""
    tokenizer_fingerprint: str = field(metadata=checked_separately(sets=None))
    """Hash over the tokenizer's files."""

    def __post_init__(self) -> None:
        # Stated, because checkpoints from before the option have another value than new models.
        for name, value in changed_defaults(self.retro_origin).items():
            if getattr(self, name) is None and not self.no_retrieval:
                setattr(self, name, value)
