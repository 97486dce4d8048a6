"""The decoder alone as an ordinary transformers model of the family that computes its options.

Plain decoders are GPT-2, Llama, Mistral, Qwen 2 and 3, StableLM or GPT-NeoX, and with experts
Mixtral, Qwen 2 MoE, Qwen 3 MoE or OLMoE (`families_with_experts`); `families_by_options` has the
others.

Biases that a family has and the model has not are written as zeros, and zero-centered norms
(LayerNorm-1p) with one added: neither changes a number. Everything else that no family computes is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion import families_by_options as by_options
from retro_mcore.checkpoint.conversion import families_with_experts
from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.checkpoint.conversion.retro_names import Parts, cut_qkv, cut_weight, parts_of
from retro_mcore.checkpoint.conversion.weights import Weight, Weights
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.family_options import plain_options

_RETRIEVAL = re.compile(r"^neighbor_encoder\.|\.(cross_attention|pre_cross_attn_layernorm)\.")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)\.(weight|bias)$")
_ACTIVATIONS = {"squared_relu": "relu2", "openai_gelu": "gelu_new"}


@dataclass(frozen=True)
class Family:
    """A family that computes a model.

    Attributes:
        model_type, architecture: As config.json names them.
        config: The rest of its config.json.
        notes: Remarks for the user.
    """

    model_type: str
    architecture: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def decoder_files(
    flags: Flags, weights: Weights
) -> tuple[dict[str, Any], dict[str, Weight], tuple[str, ...]]:
    """What a directory of the decoder alone holds.

    Args:
        flags: The model's options, resolved.
        weights: By our names; those of retrieval are left out.

    Returns:
        The content of config.json, the weights under the family's names, and notes for the user.

    Raises:
        ConfigurationError: no family computes it; naming every option.
    """
    family = family_of(flags)
    dtype = next(iter(weights.values())).dtype
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config,
        "vocab_size": flags["padded_vocab_size"],
        "tie_word_embeddings": not flags["untie_embeddings_and_output_weights"],
        "initializer_range": flags.get("init_method_std", 0.02),
        "dtype": str(dtype).removeprefix("torch."),
    }
    named: dict[str, Weight] = {}
    for name, weight in weights.items():
        if not _RETRIEVAL.search(name):
            if not by_options.keeps_centered_norms(family.model_type):
                weight = _centered(name, weight, flags)
            named.update(cut_weight(weight, _parts(family.model_type, name, flags)))
    if family.model_type in ("gpt2", "gpt_neox"):
        named |= _zero_biases(family.model_type, named)
    return values, named, family.notes


def family_of(flags: Flags) -> Family:
    """The family that computes a model's decoder.

    Raises:
        ConfigurationError: there is none.
    """
    if (model_type := by_options.model_type_of(flags)) is not None:
        return _by_options(model_type, flags)
    _refuse(_never(flags))
    rotary = flags["position_embedding_type"] == "rope"
    gated, rms = flags["swiglu"], flags["normalization"] == "RMSNorm"
    if rotary and gated and rms:
        return _llama(flags)
    if rotary and gated and flags["disable_bias_linear"]:
        return _stablelm(flags)
    if not rms and not gated:
        return _gpt_neox(flags) if rotary else _gpt2(flags)
    named = ["position_embedding_type", "normalization", "swiglu", "disable_bias_linear"]
    together = ", ".join(f"{name} {flags[name]}" for name in named)
    _refuse([f"{together} in one model"])
    raise AssertionError


def _by_options(model_type: str, flags: Flags) -> Family:
    _refuse([*_not_at_all(flags), *by_options.problems_of(model_type, flags)])
    sizes = _heads(flags)
    config = {
        **_sizes(flags),
        "num_key_value_heads": sizes["groups"],
        "head_dim": sizes["channels"],
        **({} if model_type == "starcoder2" else {"rms_norm_eps": flags["norm_epsilon"]}),
        "attention_dropout": flags.get("attention_dropout", 0.0),
        **by_options.rope_of(model_type, flags, _rope(flags)),
        **by_options.config_of(model_type, flags),
    }
    architecture = by_options.architecture_of(model_type)
    return Family(model_type, architecture, config, _no_hidden_dropout(flags))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigurationError(
            "--decoder-only",
            f"no transformers family computes {', '.join(problems)}",
            "Leave it out: --target huggingface keeps every model, with or without neighbors",
        )


def _not_at_all(flags: Flags) -> list[str]:
    """Options that no family computes."""
    problems = [
        f"{name} {flags[name]}"
        for name in ("retro_deepnorm", "retro_mup_base_hidden_size", "rotary_interleaved")
        if flags.get(name)
    ]
    llama = flags["position_embedding_type"] == "rope" and flags["normalization"] == "RMSNorm"
    llama = llama and flags["swiglu"] and by_options.model_type_of(flags) is None
    if flags.get("num_experts") is not None and not llama:
        problems.append(f"num_experts {flags['num_experts']}")
    if flags.get("retro_origin") == "mcore-0.15" and not flags["no_retrieval"]:
        problems.append("retro_origin mcore-0.15, whose decoder ends without a norm")
    if flags.get("use_rope_scaling") and flags.get("rotary_seq_len_interpolation_factor"):
        problems.append("use_rope_scaling with rotary_seq_len_interpolation_factor")
    if flags.get("rotary_frequencies") and flags.get("rotary_seq_len_interpolation_factor"):
        problems.append("rotary_frequencies with rotary_seq_len_interpolation_factor")
    return problems


def _never(flags: Flags) -> list[str]:
    """Options that no family without options of its own computes."""
    plain = {**plain_options(), "geglu": False}
    if flags["position_embedding_type"] == "rope":
        for name in ("rotary_frequencies", "rotary_attention_factor"):
            del plain[name]
        if flags.get("num_experts") is not None:
            del plain["qk_layernorm_over"]  # OLMoE's
        if flags["normalization"] == "LayerNorm" and not flags["swiglu"]:
            del plain["parallel_residual"]  # GPT-NeoX's
    return _not_at_all(flags) + [
        f"{name} {flags[name]}" for name, value in plain.items() if flags.get(name, value) != value
    ]


def _unless(flags: Flags, **values: Any) -> list[str]:
    """The options that have other values than these."""
    return [f"{n} {flags.get(n)}" for n, value in values.items() if (flags.get(n) or None) != value]


def _heads(flags: Flags) -> dict[str, int]:
    heads = flags["num_attention_heads"]
    return {
        "heads": heads,
        "groups": flags.get("num_query_groups") or heads,
        "channels": flags.get("kv_channels") or flags["hidden_size"] // heads,
    }


def _usual_heads(flags: Flags) -> list[str]:
    """What a family without grouped queries and without a head width of its own refuses."""
    sizes = _heads(flags)
    problems = []
    if sizes["groups"] != sizes["heads"]:
        problems.append(f"num_query_groups {sizes['groups']}")
    return problems + _usual_width(flags)


def _usual_width(flags: Flags) -> list[str]:
    sizes = _heads(flags)
    if sizes["channels"] * sizes["heads"] == flags["hidden_size"]:
        return []
    return [f"kv_channels {sizes['channels']}"]


def _activation(flags: Flags) -> str:
    return next((name for flag, name in _ACTIVATIONS.items() if flags.get(flag)), "gelu")


def _rope(flags: Flags) -> dict[str, Any]:
    """Rotary embedding under the names that every release of transformers reads."""
    scaling = None
    if flags.get("rotary_frequencies"):
        scaling = by_options.long_rope(flags)
    elif flags.get("use_rope_scaling"):
        scaling = {
            "rope_type": "llama3",
            "factor": flags["rope_scaling_factor"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif flags.get("rotary_seq_len_interpolation_factor"):
        factor = flags["rotary_seq_len_interpolation_factor"]
        scaling = {"rope_type": "linear", "factor": factor}
    return {"rope_theta": float(flags.get("rotary_base") or 10000), "rope_scaling": scaling}


def _sizes(flags: Flags) -> dict[str, Any]:
    return {
        "hidden_size": flags["hidden_size"],
        "intermediate_size": _mlp_width(flags),
        "num_hidden_layers": flags["num_layers"],
        "num_attention_heads": flags["num_attention_heads"],
        "max_position_embeddings": flags.get("max_position_embeddings") or flags["seq_length"],
    }


def _mlp_width(flags: Flags) -> int:
    if flags.get("ffn_hidden_size"):
        return int(flags["ffn_hidden_size"])
    hidden: int = flags["hidden_size"]
    return int(4 * hidden * 2 / 3 / 64) * 64 if flags["swiglu"] else 4 * hidden


def _no_hidden_dropout(flags: Flags) -> tuple[str, ...]:
    rate = flags.get("hidden_dropout")
    return (f"hidden_dropout {rate} is not kept: its family trains without",) if rate else ()


def _llama(flags: Flags) -> Family:
    biases = not flags["disable_bias_linear"]
    window, sizes = flags.get("sliding_window"), _heads(flags)
    layers = flags.get("window_attn_skip_freq")
    kind = ("llama", "LlamaForCausalLM")
    own: dict[str, Any] = {"attention_bias": biases, "mlp_bias": biases}
    problems = _unless(flags, rotary_percent=1)
    if flags["qk_layernorm"]:
        kind, own = ("qwen3", "Qwen3ForCausalLM"), {"attention_bias": False}
        problems += _unless(flags, disable_bias_linear=True, add_qkv_bias=None)
    elif flags["add_qkv_bias"]:
        kind, own = ("qwen2", "Qwen2ForCausalLM"), {}
        problems += _usual_width(flags)
        problems += _unless(flags, disable_bias_linear=True)
    elif window is not None and not biases and layers is None:
        kind, own = ("mistral", "MistralForCausalLM"), {"sliding_window": window}
    elif window is not None:
        problems += _unless(flags, sliding_window=None, window_attn_skip_freq=None)
    if kind[0].startswith("qwen"):
        own |= _qwen_windows(flags)
    if flags.get("num_experts") is not None:
        kind, own, more = families_with_experts.family_of(kind[0], flags)
        problems += more
        if kind[0] in ("qwen2_moe", "olmoe"):  # they have no head_dim
            problems += _usual_width(flags)
    _refuse(problems)
    config = {
        **_sizes(flags),
        "num_key_value_heads": sizes["groups"],
        "hidden_act": "silu",
        "rms_norm_eps": flags["norm_epsilon"],
        "attention_dropout": flags.get("attention_dropout", 0.0),
        **({} if kind[0].startswith(("qwen2", "olmoe")) else {"head_dim": sizes["channels"]}),
        **_rope(flags),
        **own,
    }
    notes = _no_hidden_dropout(flags)
    first = own.get("max_window_layers", 0)
    if "full_attention" in own.get("layer_types", ())[first:]:
        notes = (*notes, "its layers with a window need transformers 4.53 or later")
    return Family(*kind, config, notes)


def _qwen_windows(flags: Flags) -> dict[str, Any]:
    """The window, and the layers with it."""
    window, number = flags.get("sliding_window"), flags["num_layers"]
    layers = flags.get("window_attn_skip_freq") or [1] * number
    if len(layers) == 1 < number:
        layers = [layer % layers[0] for layer in range(1, number + 1)]
    windowed = [window is not None and each > 0 for each in layers]
    kinds = ["sliding_attention" if each else "full_attention" for each in windowed]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # In releases before layer_types: the layers from this one on.
        "max_window_layers": windowed.index(True) if any(windowed) else number,
        "layer_types": kinds,
    }


def _stablelm(flags: Flags) -> Family:
    _refuse(_usual_width(flags) + _unless(flags, qk_layernorm=None, sliding_window=None))
    config = {
        **_sizes(flags),
        "num_key_value_heads": _heads(flags)["groups"],
        "hidden_act": "silu",
        "layer_norm_eps": flags["norm_epsilon"],
        "use_qkv_bias": flags["add_qkv_bias"],
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": flags["rotary_percent"],
        "attention_dropout": flags.get("attention_dropout", 0.0),
        "hidden_dropout": flags.get("hidden_dropout", 0.0),
        **_rope(flags),
    }
    return Family("stablelm", "StableLmForCausalLM", config)


def _gpt_neox(flags: Flags) -> Family:
    _refuse(_usual_heads(flags) + _unless(flags, qk_layernorm=None, sliding_window=None))
    config = {
        **_sizes(flags),
        "hidden_act": _activation(flags),
        "layer_norm_eps": flags["norm_epsilon"],
        "use_parallel_residual": flags.get("parallel_residual", False),
        "attention_bias": True,
        "rotary_pct": flags["rotary_percent"],
        "partial_rotary_factor": flags["rotary_percent"],
        "attention_dropout": flags.get("attention_dropout", 0.0),
        "hidden_dropout": flags.get("hidden_dropout", 0.0),
        **_rope(flags),
        "rotary_emb_base": float(flags.get("rotary_base") or 10000),
    }
    return Family("gpt_neox", "GPTNeoXForCausalLM", config)


def _gpt2(flags: Flags) -> Family:
    _refuse(_usual_heads(flags) + _unless(flags, qk_layernorm=None, sliding_window=None))
    config = {
        "n_embd": flags["hidden_size"],
        "n_inner": _mlp_width(flags),
        "n_layer": flags["num_layers"],
        "n_head": flags["num_attention_heads"],
        "n_positions": flags.get("max_position_embeddings") or flags["seq_length"],
        "activation_function": _activation(flags),
        "layer_norm_epsilon": flags["norm_epsilon"],
        "attn_pdrop": flags.get("attention_dropout", 0.0),
        "resid_pdrop": flags.get("hidden_dropout", 0.0),
        "embd_pdrop": flags.get("hidden_dropout", 0.0),
    }
    return Family("gpt2", "GPT2LMHeadModel", config)


def _centered(name: str, weight: Weight, flags: Flags) -> Weight:
    """A zero-centered norm's weight as an ordinary one, in the precision it is computed in."""
    if not flags.get("apply_layernorm_1p") or not re.search(r"norm\.weight$", name):
        return weight
    return Weight(weight.shape, weight.dtype, lambda: weight.load() + 1.0)


def _parts(model_type: str, name: str, flags: Flags) -> Parts:
    if model_type == "gpt2":
        return _gpt2_parts(name, flags)
    if model_type == "gpt_neox":
        return _whole(_neox_name(name))
    routed = families_with_experts.parts_of(model_type, name)
    if routed is not None:
        return routed
    if by_options.model_type_of(flags) is not None and _LAYER.match(name):
        return by_options.parts(model_type, name, flags)
    parts = parts_of(name, flags)
    names = tuple(_llama_name(part) for part in parts.names)
    return Parts(names, parts.cut, parts.join)


def _llama_name(name: str) -> str:
    name = name.replace(".self_attn_norm.", ".input_layernorm.")
    return name.replace(".mlp_norm.", ".post_attention_layernorm.")


_NEOX_OUTSIDE = {
    "embedding.word_embeddings.": "gpt_neox.embed_in.",
    "decoder.final_layernorm.": "gpt_neox.final_layer_norm.",
    "output_layer.": "embed_out.",
}
_NEOX_LAYER = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    # Per head a query, a key and a value, as ours.
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
_GPT2_OUTSIDE = {
    "embedding.word_embeddings.": "transformer.wte.",
    "embedding.position_embeddings.": "transformer.wpe.",
    "decoder.final_layernorm.": "transformer.ln_f.",
    "output_layer.": "lm_head.",
}
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}


def _outside(name: str, table: Mapping[str, str]) -> str | None:
    return next(
        (new + name[len(old) :] for old, new in table.items() if name.startswith(old)), None
    )


def _neox_name(name: str) -> str:
    if (outside := _outside(name, _NEOX_OUTSIDE)) is not None:
        return outside
    match = _LAYER.match(name)
    assert match is not None, name
    return f"gpt_neox.layers.{match[1]}.{_NEOX_LAYER[match[2]]}.{match[3]}"


def _gpt2_parts(name: str, flags: Flags) -> Parts:
    if (outside := _outside(name, _GPT2_OUTSIDE)) is not None:
        return _whole(outside)
    match = _LAYER.match(name)
    assert match is not None, name
    number, module, kind = match.groups()
    build: Callable[[Tensor], Tensor] = _transposed if kind == "weight" else _same
    if "layernorm" in module:
        build = _same
    elif module.endswith("linear_qkv"):
        build = partial(_gpt2_qkv, heads=flags["num_attention_heads"], last=build)
    return _whole(f"transformer.h.{number}.{_GPT2_LAYER[module]}.{kind}", build)


def _gpt2_qkv(merged: Tensor, heads: int, last: Callable[[Tensor], Tensor]) -> Tensor:
    return last(torch.cat(cut_qkv(merged, groups=heads, heads=1)))


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _whole(name: str, build: Callable[[Tensor], Tensor] = _same) -> Parts:
    return Parts((name,), lambda tensor: (build(tensor),), _same)


def _zero_biases(model_type: str, named: Mapping[str, Weight]) -> dict[str, Weight]:
    """The biases that a family has and the model has not."""
    zeros = {}
    for name in _linear_weights(model_type, named):
        bias = name.removesuffix("weight") + "bias"
        if bias not in named:
            weight = named[name]
            size = weight.shape[1 if model_type == "gpt2" else 0]
            zeros[bias] = Weight.of(torch.zeros(size, dtype=weight.dtype))
    return zeros


def _linear_weights(model_type: str, named: Mapping[str, Weight]) -> Iterator[str]:
    table = _GPT2_LAYER if model_type == "gpt2" else _NEOX_LAYER
    linear = tuple(f".{new}.weight" for old, new in table.items() if "linear" in old)
    return (name for name in named if name.endswith(linear))
