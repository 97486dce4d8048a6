"""Families that compute options of `FamilyOptions`, as directories of transformers.

Which family computes a decoder follows from its options: at most one does. The names of weights are
those of the tables that such directories are read with (`huggingface_families`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from retro_mcore.checkpoint.conversion.huggingface_families import FAMILIES
from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.checkpoint.conversion.retro_names import Parts, parts_of
from retro_mcore.model.family_options import plain_options

_ROPE = ("rotary_frequencies", "rotary_attention_factor")
_LIMITS = ("softmax_scale", "attention_softcap", "logit_softcap")
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_LOCAL = ("rotary_local_base", "rotary_local_layers")
_POST = ("sublayer_norms", "qk_layernorm_over")


@dataclass(frozen=True)
class Rules:
    """What a family computes.

    Attributes:
        architecture: Its class in transformers.
        allows: Options that may have other values than a plain decoder's.
        requires: Options that must have these values.
        config: Its own settings in config.json.
    """

    architecture: str
    allows: tuple[str, ...]
    requires: Mapping[str, Any]
    config: Callable[[Flags], dict[str, Any]]


def model_type_of(flags: Flags) -> str | None:
    """The family that computes a decoder's options; None for a plain decoder.

    Args:
        flags: The model's options, resolved.
    """
    if flags["position_embedding_type"] != "rope":
        return None
    if flags["normalization"] == "LayerNorm":
        return _with_layer_norm(flags)
    if flags["geglu"]:
        both = flags["sublayer_norms"] == "both"
        return ("gemma3_text" if flags["qk_layernorm"] else "gemma2") if both else "gemma"
    if not flags["swiglu"]:
        return None
    if flags["sublayer_norms"] != "pre":
        return "olmo3" if flags["rotary_local_layers"] or _has_window(flags) else "olmo2"
    if flags["no_rope_layers"]:
        return "smollm3"
    if flags.get("num_experts") is not None and flags["qk_layernorm_over"] == "all_heads":
        return None  # OLMoE
    if list(_others(flags, (*_ROPE, *_LOCAL))):
        return "granite"
    return "phi3" if flags["rotary_percent"] != 1 else None


def _with_layer_norm(flags: Flags) -> str | None:
    if flags["swiglu"] or flags["geglu"]:
        return None
    grouped = flags.get("num_query_groups") not in (None, flags["num_attention_heads"])
    if grouped or _has_window(flags):
        return "starcoder2"
    return None


def _has_window(flags: Flags) -> bool:
    return flags.get("sliding_window") is not None


def _others(flags: Flags, allowed: tuple[str, ...]) -> Iterator[str]:
    """Options with other values than a plain decoder's."""
    for name, plain in {**plain_options(), "geglu": False}.items():
        if name not in allowed and flags.get(name, plain) != plain:
            yield f"{name} {flags[name]}"


_SCALED = ("rotary_frequencies", "use_rope_scaling", "rotary_seq_len_interpolation_factor")


def problems_of(model_type: str, flags: Flags) -> list[str]:
    """Options that the family does not compute."""
    rules = _RULES[model_type]
    problems = list(_others(flags, (*rules.allows, *rules.requires)))
    for name, value in rules.requires.items():
        if (flags.get(name) or None) != (value or None):
            problems.append(f"{name} {flags.get(name)}")
    if model_type.startswith("gemma"):
        problems += _problems_of_gemma(flags)
    if "num_experts" in flags and flags["num_experts"] is not None:
        problems.append(f"num_experts {flags['num_experts']}")
    if _has_window(flags) and FAMILIES[model_type].windows == "none":
        problems.append(f"sliding_window {flags['sliding_window']}")
    local = flags.get("rotary_local_layers")
    if local and set(local) != set(_sliding_layers(flags)):
        problems.append(f"rotary_local_layers {local}")
    if model_type in ("olmo3", "gemma3_text") and not local and _sliding_layers(flags):
        # transformers scales the rotary embedding of the other layers alone.
        problems += [f"{name} in layers with a window" for name in _SCALED if flags.get(name)]
    return problems


def _problems_of_gemma(flags: Flags) -> list[str]:
    wanted = flags["hidden_size"] ** 0.5
    if flags["embedding_multiplier"] == wanted:
        return []
    return [f"embedding_multiplier {flags['embedding_multiplier']} (it computes {wanted:g})"]


def config_of(model_type: str, flags: Flags) -> dict[str, Any]:
    """The family's own part of config.json."""
    return _RULES[model_type].config(flags)


def architecture_of(model_type: str) -> str:
    """The family's class in transformers."""
    return _RULES[model_type].architecture


def parts(model_type: str, name: str, flags: Flags) -> Parts:
    """The tensors of a weight of ours in a family other than GPT-NeoX.

    Args:
        model_type: The family.
        name: Our name.
        flags: The model's options.
    """
    found = parts_of_layer(model_type, name)
    if found is not None:
        return Parts((found,), lambda tensor: (tensor,), lambda tensor: tensor)
    gated = {**flags, "swiglu": flags["swiglu"] or flags["geglu"]}
    cut = parts_of(name, gated)
    if model_type == "phi3" and "linear_qkv" in name:
        fused = cut.names[0].replace("q_proj", "qkv_proj")
        return Parts((fused,), lambda tensor: (torch.cat(tuple(cut.cut(tensor))),), cut.join)
    if model_type == "phi3" and "linear_fc1" in name:
        fused = cut.names[0].replace("gate_proj", "gate_up_proj")
        return Parts((fused,), lambda tensor: (tensor,), cut.join)
    if model_type == "starcoder2":
        names = tuple(
            each.replace("mlp.up_proj", "mlp.c_fc").replace("mlp.down_proj", "mlp.c_proj")
            for each in cut.names
        )
        return Parts(names, cut.cut, cut.join)
    return cut


def parts_of_layer(model_type: str, name: str) -> str | None:
    """The name of a norm of a layer; None of another weight."""
    for ours, theirs in FAMILIES[model_type].norms.items():
        for kind in ("weight", "bias"):
            if name.startswith("decoder.layers.") and name.endswith(f".{ours}.{kind}"):
                return f"model.layers.{name.split('.')[2]}.{theirs}.{kind}"
    return None


def keeps_centered_norms(model_type: str) -> bool:
    """Whether the family stores its norms' weights minus one, as LayerNorm-1p does."""
    return bool(FAMILIES[model_type].flags.get("apply_layernorm_1p"))


def rope_of(model_type: str, flags: Flags, rope: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, given those of other families.

    OLMo 3 has another base in layers with a window under names of newer releases alone.
    """
    if model_type != "olmo3":
        return rope
    local = float(flags.get("rotary_local_base") or rope["rope_theta"])
    # transformers gives layers with a window its own default unless they are named.
    if local == rope["rope_theta"] == FAMILIES["olmo3"].defaults["rope_theta"]:
        return rope
    full = {
        "rope_type": "default",
        **(rope["rope_scaling"] or {}),
        "rope_theta": rope["rope_theta"],
    }
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def long_rope(flags: Flags) -> dict[str, Any]:
    """Frequencies of a model's own as LongRoPE, whose factors divide the usual ones.

    Both lists of factors are the same, so the length of a text does not matter.
    """
    frequencies, base = flags["rotary_frequencies"], float(flags["rotary_base"])
    size = 2 * len(frequencies)
    # As transformers computes it, in float32.
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    periods = (base**steps).double().tolist()
    factors = [1 / (each * period) for each, period in zip(frequencies, periods, strict=True)]
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": flags["rotary_attention_factor"],
        "original_max_position_embeddings": _positions(flags),
    }


def _positions(flags: Flags) -> int:
    return int(flags.get("max_position_embeddings") or flags["seq_length"])


def _channels(flags: Flags) -> int:
    heads: int = flags["num_attention_heads"]
    return int(flags.get("kv_channels") or flags["hidden_size"] // heads)


def _biases(flags: Flags) -> dict[str, Any]:
    biases = not flags["disable_bias_linear"]
    return {"attention_bias": biases, "mlp_bias": biases}


def _sliding_layers(flags: Flags) -> list[int]:
    """Numbers of the layers with a window, or with the rotary embedding of such layers."""
    number = flags["num_layers"]
    if not _has_window(flags):
        return list(flags.get("rotary_local_layers") or ())
    skipped = flags.get("window_attn_skip_freq")
    if not skipped:
        return list(flags.get("rotary_local_layers") or range(1, number + 1))
    if len(skipped) == 1 < number:
        skipped = [layer % skipped[0] for layer in range(1, number + 1)]
    return [layer for layer, slides in enumerate(skipped, 1) if slides]


def _layer_types(flags: Flags) -> dict[str, Any]:
    sliding = _sliding_layers(flags)
    kinds = [
        "sliding_attention" if layer in sliding else "full_attention"
        for layer in range(1, flags["num_layers"] + 1)
    ]
    # Layers with a rotary embedding of their own, but without a window: one that holds every text.
    window = flags.get("sliding_window") or _positions(flags)
    return {"layer_types": kinds, "sliding_window": window}


def _query_scalar(flags: Flags) -> float:
    """The number whose inverse square root is the scale of the scores."""
    if flags.get("softmax_scale") is None:
        return _channels(flags)
    scale = flags["softmax_scale"]
    exact = scale**-2
    near = [round(exact), exact, math.nextafter(exact, 0), math.nextafter(exact, math.inf)]
    return next((each for each in near if each > 0 and each**-0.5 == scale), exact)


def _gemma(flags: Flags) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False}  # fmt: skip


def _gemma2(flags: Flags) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": _query_scalar(flags),
        "final_logit_softcapping": flags.get("logit_softcap"),
        "attn_logit_softcapping": flags.get("attention_softcap"),
        **_layer_types(flags),
    }


def _gemma3(flags: Flags) -> dict[str, Any]:
    base = flags.get("rotary_local_base") or flags["rotary_base"]
    return {**_gemma2(flags), "rope_local_base_freq": float(base)}


def _olmo3(flags: Flags) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": False, **_layer_types(flags)}


def _smollm3(flags: Flags) -> dict[str, Any]:
    layers, without = range(1, flags["num_layers"] + 1), flags["no_rope_layers"]
    windows: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None,
                               "layer_types": ["full_attention"] * len(layers)}  # fmt: skip
    if _has_window(flags):
        windows = {"use_sliding_window": True, **_layer_types(flags)}
    return {
        "hidden_act": "silu",
        "no_rope_layers": [int(layer not in without) for layer in layers],
        "pad_token_id": None,
        **windows,
        **_biases(flags),
    }


def _granite(flags: Flags) -> dict[str, Any]:
    scale = flags.get("softmax_scale")
    multipliers = {name: flags[name] for name in _MULTIPLIERS}
    own = {"attention_multiplier": _channels(flags) ** -0.5 if scale is None else scale}
    return {"hidden_act": "silu", **multipliers, **own, **_biases(flags)}


def _phi3(flags: Flags) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "partial_rotary_factor": flags["rotary_percent"],
        "original_max_position_embeddings": _positions(flags),
        "sliding_window": flags.get("sliding_window"),
        "pad_token_id": None,
    }


def _starcoder2(flags: Flags) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh" if flags.get("openai_gelu") else "gelu"
    return {
        "hidden_act": "relu2" if flags.get("squared_relu") else activation,
        "norm_epsilon": flags["norm_epsilon"],
        "use_bias": not flags["disable_bias_linear"],
        "sliding_window": flags.get("sliding_window"),
    }


_NO_BIASES = {"disable_bias_linear": True, "add_qkv_bias": False}
_WHOLE = {"rotary_percent": 1}
_GEMMA: dict[str, Any] = {"geglu": True, "apply_layernorm_1p": True, **_NO_BIASES, **_WHOLE}
_OLMO = {"sublayer_norms": "post", "qk_layernorm_over": "all_heads", "qk_layernorm": True,
         **_NO_BIASES, **_WHOLE}  # fmt: skip

_RULES = {
    "gemma": Rules(
        "GemmaForCausalLM",
        ("embedding_multiplier", *_ROPE),
        {"qk_layernorm": False, "sublayer_norms": "pre", **_GEMMA},
        _gemma,
    ),
    "gemma2": Rules(
        "Gemma2ForCausalLM",
        ("embedding_multiplier", *_LIMITS, *_ROPE),
        {"sublayer_norms": "both", **_GEMMA},
        _gemma2,
    ),
    "gemma3_text": Rules(
        "Gemma3ForCausalLM",
        ("embedding_multiplier", "softmax_scale", "logit_softcap", *_ROPE, *_LOCAL),
        {"sublayer_norms": "both", "qk_layernorm_over": "head", **_GEMMA},
        _gemma3,
    ),
    "olmo2": Rules(
        "Olmo2ForCausalLM", _ROPE, _OLMO, lambda _: {"hidden_act": "silu", "attention_bias": False}
    ),
    "olmo3": Rules("Olmo3ForCausalLM", (*_ROPE, *_LOCAL), _OLMO, _olmo3),
    "smollm3": Rules(
        "SmolLM3ForCausalLM",
        ("no_rope_layers", *_ROPE),
        {"qk_layernorm": False, "add_qkv_bias": False, **_WHOLE},
        _smollm3,
    ),
    "granite": Rules(
        "GraniteForCausalLM",
        (*_MULTIPLIERS, "softmax_scale", *_ROPE),
        {"qk_layernorm": False, "add_qkv_bias": False, **_WHOLE},
        _granite,
    ),
    "phi3": Rules("Phi3ForCausalLM", _ROPE, {"qk_layernorm": False, **_NO_BIASES}, _phi3),
    "starcoder2": Rules(
        "Starcoder2ForCausalLM",
        _ROPE,
        {"qk_layernorm": False, "add_qkv_bias": False, **_WHOLE},
        _starcoder2,
    ),
}
