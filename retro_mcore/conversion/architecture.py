"""What a checkpoint says that its model is, in the names of our flags; and what contradicts it."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from retro_mcore.conversion.weights import Weights
from retro_mcore.errors import CheckpointError

Flags = dict[str, Any]

# Attributes of Megatron's arguments that are called the same here.
_SAME = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "swiglu",
    "openai_gelu",
    "squared_relu",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "add_qkv_bias",
    "qk_layernorm",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "retro_num_neighbors",
    "retro_num_retrieved_chunks",
    "retro_encoder_num_layers",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
    "retro_chunk_length",
    "seq_length",
    "vocab_size",
    "padded_vocab_size",
    "tokenizer_type",
    "retro_attention_gate",
    "seed",
    "bf16",
    "fp16",
)
_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "retro_encoder_layers": "retro_encoder_num_layers",
    "retro_gpt_chunk_length": "retro_chunk_length",
}
#: Flags that must agree when a model takes a checkpoint's decoder.
DECODER_FLAGS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "swiglu",
    "openai_gelu",
    "squared_relu",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "retro_deepnorm",
    "retro_mup_base_hidden_size",
)
#: What changes a model's numbers, and only ours have.
OURS_ALONE: Flags = {"retro_deepnorm": False, "retro_mup_base_hidden_size": None}
_ROTARY = tuple(name for name in DECODER_FLAGS if name.startswith(("rotary_", "rope_", "use_rope")))
_LAYER = re.compile(r"^(decoder|neighbor_encoder)\.layers\.(\d+)\.")


def flags_of_arguments(args: Namespace) -> Flags:
    """Flags from the arguments that Megatron (or we) saved in a checkpoint."""
    values = vars(args)
    if is_ours(args):
        heads = {
            "num_query_groups": values.get("num_query_groups") or values["num_attention_heads"]
        }
        return {**{name: value for name, value in values.items() if value is not None}, **heads}
    flags: Flags = {_RENAMED.get(name, name): value for name, value in values.items()}
    flags = {name: flags[name] for name in _SAME if flags.get(name) is not None}
    if values.get("use_rotary_position_embeddings"):  # the flag before --position-embedding-type
        flags["position_embedding_type"] = "rope"
    if "num_attention_heads" in flags:
        grouped = "no_retrieval" in values or values.get(
            "group_query_attention"
        )  # ours, Megatron's
        groups = values.get("num_query_groups") if grouped else None
        flags["num_query_groups"] = groups or flags["num_attention_heads"]
    if "add_bias_linear" in values:
        flags["disable_bias_linear"] = not values["add_bias_linear"]
    # Megatron's fused GELU, which it takes unless told otherwise, is the approximation.
    if values.get("bias_gelu_fusion") and not values.get("swiglu"):
        flags["openai_gelu"] = True
    return flags


def is_ours(args: Namespace) -> bool:
    """Whether our own trainer saved them."""
    return "no_retrieval" in vars(args)


def flags_of_weights(weights: Weights) -> Flags:
    """Flags that the weights' names and shapes show.

    Raises:
        CheckpointError: it has no decoder layers.
    """
    layer = "decoder.layers.0."
    shapes = {name.removeprefix(layer): w.shape for name, w in weights.items() if layer in name}
    if "mlp.linear_fc2.weight" not in shapes or "embedding.word_embeddings.weight" not in weights:
        raise CheckpointError(
            "the checkpoint",
            f"has no dense decoder layers (found {', '.join(sorted(weights)[:4])}, ...)",
            "Name a GPT or Retro checkpoint",
        )
    ffn = shapes["mlp.linear_fc2.weight"][1]
    vocabulary, hidden = weights["embedding.word_embeddings.weight"].shape
    flags: Flags = {
        "num_layers": _count(weights, "decoder"),
        "hidden_size": hidden,
        "padded_vocab_size": vocabulary,
        "ffn_hidden_size": ffn,
        "swiglu": shapes["mlp.linear_fc1.weight"][0] == 2 * ffn,
        "normalization": "LayerNorm" if "input_layernorm.bias" in shapes else "RMSNorm",
        "disable_bias_linear": "mlp.linear_fc2.bias" not in shapes,
        "qk_layernorm": "self_attention.q_layernorm.weight" in shapes,
        "untie_embeddings_and_output_weights": "output_layer.weight" in weights,
    }
    flags["add_qkv_bias"] = (
        "self_attention.linear_qkv.bias" in shapes and flags["disable_bias_linear"]
    )
    positions = weights.get("embedding.position_embeddings.weight")
    flags["position_embedding_type"] = "rope" if positions is None else "learned_absolute"
    if positions is not None:
        flags["max_position_embeddings"] = positions.shape[0]
    return {**flags, **_retro_flags(weights, flags["num_layers"])}


def _retro_flags(weights: Weights, num_layers: int) -> Flags:
    numbers = {
        int(match[2]) + 1
        for name in weights
        if "cross_attention." in name and (match := _LAYER.match(name)) and match[1] == "decoder"
    }
    if not numbers:
        return {"no_retrieval": True}
    usual = set(range(6 if num_layers <= 15 else 9, num_layers + 1, 3))
    return {
        "no_retrieval": False,
        "retro_decoder_layers": None if numbers == usual else sorted(numbers),
        "retro_encoder_num_layers": _count(weights, "neighbor_encoder"),
    }


def _count(weights: Weights, block: str) -> int:
    numbers = [int(m[2]) for name in weights if (m := _LAYER.match(name)) and m[1] == block]
    return max(numbers, default=-1) + 1


def check_decoder(found: Mapping[str, Any], wanted: Mapping[str, Any], source: object) -> None:
    """Refuse a model whose decoder is another than the checkpoint's.

    Args:
        found: The checkpoint's flags; what it does not say is not compared.
        wanted: The model's flags, all of `DECODER_FLAGS`, resolved.
        source: The checkpoint, for the error.

    Raises:
        CheckpointError: naming every flag that contradicts it, and both values.
    """
    problems = []
    rotary = wanted["position_embedding_type"] == "rope"
    for name in DECODER_FLAGS:
        if name not in found or _same(found[name], wanted[name]):
            continue
        if (name in _ROTARY and not rotary) or (name == "max_position_embeddings" and rotary):
            continue
        if name == "rope_scaling_factor" and not found.get("use_rope_scaling"):
            continue
        if name == "apply_layernorm_1p" and wanted["normalization"] == "RMSNorm":
            continue
        problems.append(f"--{name.replace('_', '-')} is {wanted[name]}, expected {found[name]}")
    if problems:
        raise CheckpointError(
            f"--load-gpt {source}",
            "the model's flags contradict the checkpoint: " + "; ".join(problems),
            "Give the flags as the checkpoint has them",
        )


def _same(one: Any, other: Any) -> bool:
    if None not in (one, other) and float in (type(one), type(other)):
        return math.isclose(float(one), float(other), rel_tol=1e-6)
    return one == other
