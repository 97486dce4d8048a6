"""Flags of a checkpoint's model, from its arguments and weights, and flags that contradict it."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from retro_mcore.checkpoint.arguments import in_our_form
from retro_mcore.checkpoint.conversion.model_fields import (
    DECODER_FLAGS,
    END_TOKENS,
    MODEL_FIELDS,
    Flags,
)
from retro_mcore.checkpoint.conversion.weights import Weights
from retro_mcore.errors import CheckpointError, flag_of
from retro_mcore.model.expert_options import EXPERT_OPTIONS, NEED_EXPERTS, expert_layers

# Arguments of training and its data that conversion keeps. Our trainer and our providers record
# the last three; the others have the same name in Megatron.
_OF_TRAINING = (
    *("seed", "bf16", "fp16"),
    *("document_tokens", "tokenizer_fingerprint", END_TOKENS),
)
#: Megatron's arguments for computations that our model lacks, with the values that turn them off
#: besides None, False and 0. Refused by conversion and inside Megatron-LM's trainer.
LACKED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned_absolute", "rope"),
    "rope_type": ("rope",),
    "normalization": ("LayerNorm", "RMSNorm"),
    "qk_l2_norm": (),
    "num_moe_experts": (),
    "moe_router_enable_expert_bias": (),
    "moe_expert_capacity_factor": (),
    "moe_apply_probs_on_input": (),
    "moe_latent_size": (),
    "multi_latent_attention": (),
    "mtp_num_layers": (),
    "apply_residual_connection_post_layernorm": (),
    "softmax_type": ("vanilla",),
    "no_rope_freq": (),
    "attention_output_gate": (),
    "quick_geglu": (),
    "swiglu_limit": (),
    "activation_func_clamp_value": (),
    "glu_linear_offset": (),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "linear_attention_type": (),
    "enable_hyper_connections": (),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_model": (),
    "use_mup": (),
    "mrope_section": (),
}
_ROTARY = tuple(name for name in DECODER_FLAGS if name.startswith(("rotary_", "rope_", "use_rope")))
_WINDOW = ("sliding_window", "window_attn_skip_freq")
_NORM_BIAS = re.compile(r"^decoder\..*norm\.bias$")
_LAYER = re.compile(r"^(decoder|neighbor_encoder)\.layers\.(\d+)\.")


def flags_of_arguments(args: Namespace, source: object = "the checkpoint") -> Flags:
    """Flags from the arguments that Megatron (or we) saved in a checkpoint.

    Args:
        args: The saved arguments.
        source: The checkpoint, for the error.

    Raises:
        CheckpointError: they say that the model computes something that ours does not.
    """
    values = vars(args)
    if in_our_form(values):
        flags = {name: value for name, value in values.items() if value is not None}
        heads = values.get("num_query_groups") or values.get("num_attention_heads")
        return {**flags, "num_query_groups": heads} if heads else flags
    _refuse_lacked(values, source)
    read = {name: option.read(name, values) for name, option in MODEL_FIELDS.items()}
    read |= {name: values.get(name) for name in _OF_TRAINING}
    flags = {name: value for name, value in read.items() if value is not None}
    flags = _expert_flags(flags, values, source)
    if values.get("retro_tokenizer_type"):  # the other one is the tokenizer that Megatron-LM built
        flags["tokenizer_type"] = values["retro_tokenizer_type"]
    if values.get("use_rotary_position_embeddings"):  # the flag before --position-embedding-type
        flags["position_embedding_type"] = "rope"
    if "num_attention_heads" in flags:
        groups = values.get("num_query_groups") if values.get("group_query_attention") else None
        flags["num_query_groups"] = groups or flags["num_attention_heads"]
    # Megatron's fused GELU, its default, is the tanh approximation.
    others = ("swiglu", "geglu", "squared_relu")
    if values.get("bias_gelu_fusion") and not any(values.get(name) for name in others):
        flags["openai_gelu"] = True
    return {**flags, **window_flags(values, source)}


def _expert_flags(flags: Flags, values: Mapping[str, Any], source: object) -> Flags:
    """The flags, with Megatron's arguments of experts in our form.

    Those of a dense model are left out, and losses of kinds that our trainer does not have.
    """
    if values.get("num_experts") is None:
        return {n: value for n, value in flags.items() if not (value and n in NEED_EXPERTS)}
    kind = values.get("moe_router_load_balancing_type")
    if kind in ("sinkhorn", "quantile_balancing"):
        raise CheckpointError(
            source, f"routes tokens by {kind}", "Only routing by the largest scores converts"
        )
    pattern = values.get("moe_layer_freq")
    flags["moe_layer_freq"] = [pattern] if isinstance(pattern, int) else pattern
    if kind not in (None, "aux_loss", "seq_aux_loss", "none"):
        flags |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    return flags


def window_flags(values: Mapping[str, Any], source: object) -> Flags:
    """The window: Megatron counts the tokens before a position, we count the position too.

    Raises:
        CheckpointError: the layers with it are stated in another way.
    """
    window = values.get("window_size")
    if window is None:
        return {}
    plain = isinstance(window, (tuple, list)) and len(window) == 2
    if not plain or not all(isinstance(size, int) for size in window):
        raise CheckpointError(source, f"has window_size {window!r}", "Expected (tokens, 0)")
    if window[0] < 0:
        return {"sliding_window": None}
    layers = values.get("window_attn_skip_freq")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not all(isinstance(each, int) for each in layers):
        raise CheckpointError(
            source,
            f"has window_attn_skip_freq {layers!r}",
            "Expected a number or a list of 0 and 1",
        )
    return {"sliding_window": window[0] + 1, "window_attn_skip_freq": layers and list(layers)}


def _refuse_lacked(values: Mapping[str, Any], source: object) -> None:
    found = [
        f"{name} {values[name]!r}"
        for name, neutral in LACKED.items()
        if values.get(name) not in (None, False, 0, *neutral)
    ]
    if found:
        raise CheckpointError(
            source,
            f"is from a model that computes differently: {', '.join(found)}",
            "Only dense GPT and Retro models convert",
        )


def flags_of_weights(weights: Weights) -> Flags:
    """Flags that the weights' names and shapes show.

    Raises:
        CheckpointError: it has no decoder layers.
    """
    layer = "decoder.layers.0."
    shapes = {name.removeprefix(layer): w.shape for name, w in weights.items() if layer in name}
    dense, expert = _mlp_shapes(weights, _DENSE), _mlp_shapes(weights, _FIRST_EXPERT)
    mlp = dense or expert
    if not mlp or "embedding.word_embeddings.weight" not in weights:
        raise CheckpointError(
            "the checkpoint",
            f"has no decoder layers (found {', '.join(sorted(weights)[:4])}, ...)",
            "Name a GPT or Retro checkpoint",
        )
    vocabulary, hidden = weights["embedding.word_embeddings.weight"].shape
    flags: Flags = {
        "num_layers": _count(weights, "decoder"),
        "hidden_size": hidden,
        "padded_vocab_size": vocabulary,
        **({"ffn_hidden_size": dense["linear_fc2.weight"][1]} if dense else {}),
        "swiglu": mlp["linear_fc1.weight"][0] == 2 * mlp["linear_fc2.weight"][1],
        "normalization": "LayerNorm" if any(map(_NORM_BIAS.search, weights)) else "RMSNorm",
        "disable_bias_linear": "linear_fc2.bias" not in mlp,
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
    flags |= _experts_of_weights(weights, flags["num_layers"], expert)
    return {**flags, **_retro_flags(weights, flags["num_layers"])}


_DENSE = re.compile(r"^decoder\.layers\.\d+\.mlp\.(linear_fc.*)$")
_FIRST_EXPERT = re.compile(r"^decoder\.layers\.\d+\.mlp\.experts\.local_experts\.0\.(.*)$")
_ROUTER = re.compile(r"^decoder\.layers\.(\d+)\.mlp\.router\.weight$")


def _mlp_shapes(weights: Weights, names: re.Pattern[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of an MLP's weights, by name below it; empty if the model has none."""
    found = ((names.match(name), weight) for name, weight in weights.items())
    return {match[1]: weight.shape for match, weight in found if match}


def _experts_of_weights(
    weights: Weights, num_layers: int, expert: Mapping[str, tuple[int, ...]]
) -> Flags:
    layers = {int(match[1]): name for name in weights if (match := _ROUTER.match(name))}
    if not layers or not expert:
        return {"num_experts": None}
    prefix = next(iter(layers.values())).removesuffix("router.weight")
    shared = weights.get(f"{prefix}shared_experts.linear_fc2.weight")
    pattern = [int(number in layers) for number in range(num_layers)]
    return {
        "num_experts": weights[f"{prefix}router.weight"].shape[0],
        "moe_layer_freq": None if all(pattern) else pattern,
        "moe_ffn_hidden_size": expert["linear_fc2.weight"][1],
        "moe_shared_expert_intermediate_size": shared and shared.shape[1],
        "moe_shared_expert_gate": f"{prefix}shared_experts.gate_weight" in weights,
    }


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
    """Reject a model whose decoder differs from the checkpoint's.

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
        if name in EXPERT_OPTIONS and _same_experts(name, found, wanted):
            continue
        if name == "qk_layernorm_over" and not found.get("qk_layernorm"):
            continue
        if (name in _ROTARY and not rotary) or (name == "max_position_embeddings" and rotary):
            continue
        if name == "rope_scaling_factor" and not found.get("use_rope_scaling"):
            continue
        if name in _WINDOW and wanted[name] is None:  # then it is the checkpoint's
            continue
        if name == "apply_layernorm_1p" and wanted["normalization"] == "RMSNorm":
            continue
        problems.append(f"{flag_of(name)} is {wanted[name]}, expected {found[name]}")
    if problems:
        raise CheckpointError(
            f"--load-gpt {source}",
            "the model's flags contradict the checkpoint: " + "; ".join(problems),
            "Give the flags as the checkpoint has them",
        )


def _same_experts(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether an option of experts makes no difference."""
    if found.get("num_experts") is None and wanted.get("num_experts") is None:
        return True
    layers = [
        expert_layers(flags.get("num_experts"), flags.get("moe_layer_freq"), flags["num_layers"])
        for flags in (found, wanted)
    ]
    return name == "moe_layer_freq" and layers[0] == layers[1]


def _same(one: Any, other: Any) -> bool:
    if None not in (one, other) and float in (type(one), type(other)):
        return math.isclose(float(one), float(other), rel_tol=1e-6)
    return one == other
