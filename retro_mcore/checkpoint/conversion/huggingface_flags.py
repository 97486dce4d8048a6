"""The settings of a Hugging Face config.json as our flags."""

from __future__ import annotations

from retro_mcore.checkpoint.conversion.huggingface_config import Config, shown
from retro_mcore.checkpoint.conversion.huggingface_families import Flags
from retro_mcore.checkpoint.conversion.huggingface_rope import rope_flags

_FULL, _SLIDING = "full_attention", "sliding_attention"
#: Flags that a family states only if its models need them.
_PLAIN: Flags = {
    "apply_layernorm_1p": False,
    "swiglu": False,
    "geglu": False,
    "openai_gelu": False,
    "squared_relu": False,
}


def config_flags(config: Config) -> Flags:
    """The flags of a model.

    Raises:
        CheckpointError: a setting is not of its kind, or is none that our decoder computes.
    """
    if config.family == "gpt2":
        return _gpt2_flags(config)
    flags = {**_shared_flags(config), **_head_flags(config), "position_embedding_type": "rope"}
    kinds = _layer_types(config)
    flags |= {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "rotary_interleaved": False,
        **rope_flags(config, flags["kv_channels"]),
        "hidden_dropout": _hidden_dropout(config),
        "attention_dropout": config.number("attention_dropout", 0, 1),
        "seq_length": config.integer("max_position_embeddings"),
        **_window_flags(config, kinds),
        **_scales(config),
        **_experts(config),
    }
    if "max_position_embeddings" in flags:  # longer texts would be rotated otherwise
        flags["seq_length"] = min(flags["seq_length"], flags["max_position_embeddings"])
    if config.facts.qk_norm is not None:
        flags["qk_layernorm_over"] = config.facts.qk_norm
    local = [number for number, kind in enumerate(kinds, 1) if kind == _SLIDING]
    if "rotary_local_base" in flags:
        flags["rotary_local_layers"] = local or None
        flags["rotary_local_base"] = flags["rotary_local_base"] if local else None
    return flags


def _shared_flags(config: Config) -> Flags:
    facts = config.facts
    activation = config.get(facts.activation)
    if not isinstance(activation, str) or activation not in facts.activations:
        raise config.refusal(
            f"{facts.activation} {activation!r}", f"one of {', '.join(facts.activations)}"
        )
    return {
        **_PLAIN,
        **facts.flags,
        **facts.activations[activation],
        "normalization": facts.normalization,
        "norm_epsilon": config.number(facts.epsilon, 0, 1),
        "sublayer_norms": _place_of_norms(config),
        "vocab_size": config.integer("vocab_size"),
    }


def _place_of_norms(config: Config) -> str:
    norms = config.facts.norms
    if "mlp_bda.norm" not in norms:
        return "pre"
    return "both" if "input_layernorm" in norms else "post"


def _gpt2_flags(config: Config) -> Flags:
    shared = _shared_flags(config)
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % heads:
        raise config.refusal(f"n_head {heads} for n_embd {hidden}", "a divisor")
    _layer_types(config)
    return {
        **shared,
        "num_layers": config.integer("n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden
        if config.get("n_inner") is None
        else config.integer("n_inner"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": config.integer("n_positions"),
        "hidden_dropout": config.number("resid_pdrop", 0, 1),
        "attention_dropout": config.number("attn_pdrop", 0, 1),
        "seq_length": config.integer("n_positions"),
        "sliding_window": None,
        "window_attn_skip_freq": None,
    }


def _head_flags(config: Config) -> Flags:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    given = config.get("num_key_value_heads")
    groups = heads if given is None else config.integer("num_key_value_heads")
    if heads % groups:
        absent = "" if "num_key_value_heads" in config.given else " (transformers' default)"
        raise config.refusal(
            f"num_key_value_heads {groups}{absent} for {heads} attention heads", "a divisor"
        )
    own = config.get("head_dim")
    if own is None and hidden % heads:
        raise config.refusal(f"num_attention_heads {heads} for hidden_size {hidden}", "a divisor")
    channels = hidden // heads if own is None else config.integer("head_dim")
    if "head_dim" not in config.facts.defaults and channels != hidden // heads:
        raise config.refusal(f"head_dim {channels}", f"{hidden // heads}, as it computes")
    return {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": channels}


def _hidden_dropout(config: Config) -> float:
    keys = ("hidden_dropout", "resid_pdrop", "residual_dropout")
    key = next((key for key in keys if key in config.facts.defaults), None)
    return 0.0 if key is None else config.number(key, 0, 1)


def _scales(config: Config) -> Flags:
    """Multipliers, limits and what else a few families have."""
    flags: Flags = {}
    if config.family in ("gemma", "gemma2", "gemma3_text"):
        flags["embedding_multiplier"] = config.integer("hidden_size") ** 0.5
    if "query_pre_attn_scalar" in config.facts.defaults:
        flags["softmax_scale"] = config.number("query_pre_attn_scalar", 1e-9) ** -0.5
        flags["logit_softcap"] = _limit(config, "final_logit_softcapping")
        flags["attention_softcap"] = _limit(config, "attn_logit_softcapping")
    if config.family == "granite":
        flags["softmax_scale"] = float(config.number("attention_multiplier", 1e-9))
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            flags[name] = float(config.number(name, 1e-9))
    if config.family == "gpt_neox":
        flags["parallel_residual"] = config.boolean("use_parallel_residual")
    if config.family == "smollm3":
        flags["no_rope_layers"] = _no_rope_layers(config) or None
    return flags


def _experts(config: Config) -> Flags:
    """Experts and how tokens choose them."""
    key = config.facts.experts
    if key is None or config.integer(key, 0) == 0:
        return {}
    layers = _expert_pattern(config)
    if not any(layers):
        return {}
    own_width = "moe_intermediate_size" in config.facts.defaults
    normed = "norm_topk_prob" not in config.facts.defaults or config.boolean("norm_topk_prob")
    topk, experts = config.integer("num_experts_per_tok"), config.integer(key)
    if topk > experts or (topk == 1 and normed):
        raise config.refusal(f"num_experts_per_tok {topk} of {experts} experts", "2 or more")
    flags: Flags = {
        "num_experts": experts,
        "moe_layer_freq": None if all(layers) else layers,
        "moe_ffn_hidden_size": config.integer(
            "moe_intermediate_size" if own_width else "intermediate_size"
        ),
        "moe_router_topk": topk,
        "moe_router_pre_softmax": not normed,
        "moe_router_score_function": "softmax",
    }
    if "shared_expert_intermediate_size" in config.facts.defaults:
        width = config.integer("shared_expert_intermediate_size")
        flags |= {"moe_shared_expert_intermediate_size": width, "moe_shared_expert_gate": True}
    return flags


def _expert_pattern(config: Config) -> list[int]:
    """1 for each layer with experts, 0 for each without."""
    layers = config.integer("num_hidden_layers")
    if "decoder_sparse_step" not in config.facts.defaults:
        return [1] * layers
    step, dense = config.integer("decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise config.refusal(f"mlp_only_layers {shown(dense)}", "a list of layers")
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]


def _limit(config: Config, key: str) -> float | None:
    return None if config.get(key) is None else float(config.number(key, 1e-9))


def _no_rope_layers(config: Config) -> list[int]:
    layers, given = config.integer("num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        interval = config.integer("no_rope_layer_interval")
        return [number for number in range(1, layers + 1) if number % interval == 0]
    plain = isinstance(given, list) and all(each in (0, 1) for each in given)
    if not plain or len(given) != layers:
        raise config.refusal(f"no_rope_layers {shown(given)}", f"{layers} of 0 and 1")
    return [number for number, has_rope in enumerate(given, 1) if not has_rope]


def _layer_types(config: Config) -> list[str]:
    """Kinds of attention by layer; empty if config.json does not say."""
    kinds = config.get("layer_types")
    layers = config.integer("n_layer" if config.family == "gpt2" else "num_hidden_layers")
    if kinds is None:
        every = config.facts.full_every
        if config.family == "gemma3_text":
            every = config.integer("sliding_window_pattern")
        types = range(1, layers + 1) if every else ()
        return [_SLIDING if number % every else _FULL for number in types]
    known = (_FULL, _SLIDING, "attention")
    plain = isinstance(kinds, list) and len(kinds) == layers
    if not plain or not all(kind in known for kind in kinds):
        raise config.refusal(f"layer_types {shown(kinds)}", f"{layers} of {', '.join(known)}")
    return list(kinds)


def _window_flags(config: Config, kinds: list[str]) -> Flags:
    """The number of tokens that a position attends to, itself among them, and in which layers."""
    none = {"sliding_window": None, "window_attn_skip_freq": None}
    if not _has_window(config):
        if _SLIDING in kinds and config.facts.windows != "all":
            raise config.refusal("layer_types with sliding_attention", "a window: sliding_window")
        return none
    layers = _sliding_layers(config, kinds)
    if layers is not None and not any(layers):
        return none
    return {
        "sliding_window": config.integer("sliding_window"),
        "window_attn_skip_freq": None if layers is None or all(layers) else layers,
    }


def _has_window(config: Config) -> bool:
    """Whether some layers may have a window."""
    how = config.facts.windows
    if how in ("qwen", "smollm3") and not config.boolean("use_sliding_window"):
        return False
    return how != "none" and config.get("sliding_window") is not None


def _sliding_layers(config: Config, kinds: list[str]) -> list[int] | None:
    """1 for each layer with the window, else 0; None: all layers have it."""
    how, number = config.facts.windows, config.integer("num_hidden_layers")
    if how == "all":
        return None
    if how == "qwen" and not kinds:
        first = config.integer("max_window_layers", 0)
        if first == 0 or first >= number:
            return [] if first else None
        return [0] * first + [1] * (number - first)
    if how == "smollm3" and not kinds:
        without_rope = _no_rope_layers(config)
        return [int(layer in without_rope) for layer in range(1, number + 1)]
    return [int(kind == _SLIDING) for kind in kinds]
