"""Families of Hugging Face models: keys of their config.json, and names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Flags = dict[str, Any]


PRE_NORMS: Mapping[str, str] = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts about a family.

    Attributes:
        defaults: Keys that are read, with transformers' defaults.
        fixed: Keys that are not honored, with the values that our decoder computes. The first is
            transformers' default.
        aliases: Other names of keys.
        activation: Key of the activation function.
        activations: Functions that are computed, and their flags.
        epsilon: Key of the norms' epsilon.
        normalization: Kind of norm.
        norms: Our norms of a layer, and the family's names for them.
        qk_norm: What norms of queries and keys cover, if the family has them.
        biases: Linear layers with biases; a text names the key that decides.
        partial_rotary: Whether only a share of a head's width may be rotated.
        windows: How the family decides which layers have a sliding window.
        full_every: Interval of the layers without a window, by default. 0: no such rule.
        flags: Other flags that every model of the family has.
        experts: Key of the number of experts, if the family has them.
        embedding, final_norm: Names of weights.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    activations: Mapping[str, Flags] = field(default_factory=lambda: SILU)
    epsilon: str = "rms_norm_eps"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    qk_norm: Literal["head", "all_heads"] | None = None
    biases: Mapping[Literal["qkv", "proj", "mlp"], str | bool] = field(default_factory=dict)
    partial_rotary: bool = False
    windows: Literal["none", "all", "qwen", "types", "smollm3"] = "none"
    full_every: int = 0
    flags: Mapping[str, Any] = field(default_factory=dict)
    experts: str | None = None
    embedding: str = "embed_tokens.weight"
    final_norm: str = "norm"


SILU: Mapping[str, Flags] = {name: {"swiglu": True} for name in ("silu", "swish")}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
_GELU: Mapping[str, Flags] = {
    **{name: {} for name in ("gelu", "gelu_python")},
    **{name: {"openai_gelu": True} for name in _TANH_GELU},
    "relu2": {"squared_relu": True},
}
_GATED_GELU: Mapping[str, Flags] = {name: {"geglu": True} for name in _TANH_GELU}

_POST_NORMS = {
    "self_attn_bda.norm": "post_attention_layernorm",
    "mlp_bda.norm": "post_feedforward_layernorm",
}
_BOTH_NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    **_POST_NORMS,
}

_ROPE = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0,
         "original_max_position_embeddings": None}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    **_ROPE,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN2 = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def _without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


_STABLELM = {
    **_without(_LLAMA, "rms_norm_eps", "head_dim"),
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "use_qkv_bias": False,
    "partial_rotary_factor": 0.25,
    "hidden_dropout": 0.0,
}
_GPT2 = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_GEMMA = {
    **_LLAMA,
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA2 = {
    **_without(_GEMMA, "hidden_act"),
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = {
    **_without(_GEMMA2, "attn_logit_softcapping"),
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
_OLMO2 = {**_LLAMA, "vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
_OLMO3 = {
    **_OLMO2,
    "rope_theta": 500000.0,
    "sliding_window": 4096,
    "layer_types": None,
}
_PHI3 = {
    **_LLAMA,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "resid_pdrop": 0.0,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
_SMOLLM3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": None,  # transformers does not read it
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}
_GRANITE = {
    **_LLAMA,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_STARCODER2 = {
    **_without(_LLAMA, "rms_norm_eps"),
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "residual_dropout": 0.0,
    "use_bias": True,
}
_NEOX = {
    **_without(_LLAMA, "rms_norm_eps", "head_dim", "num_key_value_heads"),
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "hidden_dropout": 0.0,
    "attention_bias": True,
    "use_parallel_residual": True,
    "partial_rotary_factor": 0.25,
}
_MIXTRAL = {
    **_MISTRAL,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_OLMOE = {
    **_LLAMA,
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}
_QWEN3_MOE = {
    **_LLAMA,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,  # not read without use_sliding_window
    "max_window_layers": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}
_QWEN2_MOE = {
    **_QWEN3_MOE,
    "max_window_layers": 28,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "qkv_bias": True,
}
# Absent where transformers' configuration has no such key either.
_OFF = (False, None)
_FULL_ROTARY = {"partial_rotary_factor": (None, 1, 1.0)}
_CAUSAL = {"use_bidirectional_attention": (None, False), **_FULL_ROTARY}
_ATTENTION_BIAS: dict[Any, str | bool] = {"qkv": "attention_bias", "proj": "attention_bias"}
_BIASES = {**_ATTENTION_BIAS, "mlp": "mlp_bias"}
_GEMMAS: dict[str, Any] = {
    "activations": _GATED_GELU,
    "biases": _ATTENTION_BIAS,
    "flags": {"apply_layernorm_1p": True},
}

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        defaults=_GPT2,
        fixed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": _OFF,
            "add_cross_attention": _OFF,
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        activation="activation_function",
        activations=_GELU,
        epsilon="layer_norm_epsilon",
        normalization="LayerNorm",
        embedding="wte.weight",
        final_norm="ln_f",
    ),
    "llama": Family(
        defaults={**_LLAMA, "attention_bias": False, "mlp_bias": False},
        fixed={"sliding_window": (None,), **_FULL_ROTARY},
        biases=_BIASES,
    ),
    "mistral": Family(defaults=_MISTRAL, fixed=_FULL_ROTARY, windows="all"),
    "qwen2": Family(
        defaults=_QWEN2, fixed=_FULL_ROTARY, biases={"qkv": True}, windows="qwen"
    ),
    "qwen3": Family(
        defaults={**_QWEN2, "head_dim": 128, "attention_bias": False},
        fixed=_FULL_ROTARY,
        biases=_ATTENTION_BIAS,
        qk_norm="head",
        windows="qwen",
    ),
    "mixtral": Family(
        defaults=_MIXTRAL,
        fixed={**_FULL_ROTARY, "router_jitter_noise": (0.0, None)},
        aliases={"num_experts": "num_local_experts"},
        windows="all",
        experts="num_local_experts",
    ),
    "qwen2_moe": Family(
        defaults=_QWEN2_MOE,
        fixed={**_FULL_ROTARY, "use_sliding_window": _OFF},
        biases={"qkv": "qkv_bias"},
        experts="num_experts",
    ),
    "qwen3_moe": Family(
        defaults=_QWEN3_MOE,
        fixed={**_FULL_ROTARY, "use_sliding_window": _OFF, "attention_bias": _OFF},
        aliases={"num_local_experts": "num_experts"},
        qk_norm="head",
        experts="num_experts",
    ),
    "olmoe": Family(
        defaults=_OLMOE,
        fixed={**_FULL_ROTARY, "attention_bias": _OFF, "clip_qkv": (None,)},
        aliases={"num_local_experts": "num_experts"},
        qk_norm="all_heads",
        experts="num_experts",
    ),
    "stablelm": Family(
        defaults=_STABLELM,
        fixed={"qk_layernorm": _OFF, "use_parallel_residual": _OFF, "sliding_window": (None,)},
        epsilon="layer_norm_eps",
        normalization="LayerNorm",
        biases={"qkv": "use_qkv_bias"},
        partial_rotary=True,
    ),
    "gemma": Family(
        defaults=_GEMMA,
        fixed={**_CAUSAL, "hidden_activation": (None, *_TANH_GELU)},
        # Its first releases call the tanh approximation gelu; transformers computes that.
        **{**_GEMMAS, "activations": {**_GATED_GELU, "gelu": {"geglu": True}}},
    ),
    "gemma2": Family(
        defaults=_GEMMA2,
        # transformers reads hidden_activation alone.
        fixed={**_CAUSAL, "hidden_act": (None, "gelu", "gelu_pytorch_tanh")},
        activation="hidden_activation",
        norms=_BOTH_NORMS,
        windows="types",
        full_every=2,
        **_GEMMAS,
    ),
    "gemma3_text": Family(
        defaults=_GEMMA3,
        # transformers' layers do not read the limit of the scores.
        fixed={
            **_CAUSAL,
            "use_bidirectional_attention": (False, None),
            "attn_logit_softcapping": (None,),
        },
        activation="hidden_activation",
        norms=_BOTH_NORMS,
        qk_norm="head",
        windows="types",
        full_every=6,
        **_GEMMAS,
    ),
    "olmo2": Family(
        defaults=_OLMO2,
        fixed=_FULL_ROTARY,
        norms=_POST_NORMS,
        qk_norm="all_heads",
        biases=_ATTENTION_BIAS,
    ),
    "olmo3": Family(
        defaults=_OLMO3,
        fixed=_FULL_ROTARY,
        norms=_POST_NORMS,
        qk_norm="all_heads",
        biases=_ATTENTION_BIAS,
        windows="types",
        full_every=4,
    ),
    "phi3": Family(
        defaults=_PHI3,
        fixed={"full_attn_mod": (None, 1), "interpolate_factor": (None, 1)},
        partial_rotary=True,
        windows="all",
    ),
    "smollm3": Family(
        defaults=_SMOLLM3, fixed=_FULL_ROTARY, biases=_BIASES, windows="smollm3"
    ),
    "granite": Family(defaults=_GRANITE, fixed=_FULL_ROTARY, biases=_BIASES),
    "starcoder2": Family(
        defaults=_STARCODER2,
        fixed={
            **_FULL_ROTARY,
            "scale_attn_weights": (None, True),
            "mlp_type": (None, "default"),
            "norm_type": (None, "layer_norm"),
            "layer_norm_epsilon": (None, 1e-5),
        },
        activations=_GELU,
        epsilon="norm_epsilon",
        normalization="LayerNorm",
        biases={"qkv": "use_bias", "proj": "use_bias", "mlp": "use_bias"},
        windows="all",
    ),
    "gpt_neox": Family(
        defaults=_NEOX,
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        activations=_GELU,
        epsilon="layer_norm_eps",
        normalization="LayerNorm",
        biases={**_ATTENTION_BIAS, "mlp": True},
        partial_rotary=True,
        embedding="embed_in.weight",
        final_norm="final_layer_norm",
    ),
}  # fmt: skip

#: Keys by which a model of another family has experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
