"""Settings in the config.json of published models, and what our decoder needs for them.

Keys that say nothing about the computation (dtype, release of transformers) are mostly left out.
"""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, groups: int | None, vocabulary: int,
    positions: int,
) -> dict[str, Any]:  # fmt: skip
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
    }
    return sizes if groups is None else {**sizes, "num_key_value_heads": groups}


def _llama3(*sizes: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **_sizes(*sizes, 8, 128256, 131072),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**LLAMA3_ROPE, "factor": factor},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen25(
    *sizes: int, positions: int, vocabulary: int = 151936, eps: float = 1e-6, tied: bool
) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "qwen2",
        **_sizes(hidden, ffn, layers, heads, groups, vocabulary, positions),
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "max_window_layers": layers,
        "rms_norm_eps": eps,
        "rope_theta": 1000000.0,
        "sliding_window": positions,
        "tie_word_embeddings": tied,
        "use_mrope": False,
        "use_sliding_window": False,
    }


def _qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "qwen3",
        **_sizes(hidden, ffn, layers, heads, groups, 151936, 40960),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def _mistral(hidden: int, layers: int, vocabulary: int, positions: int, **more: Any) -> dict:
    return {
        "model_type": "mistral",
        **_sizes(hidden, 14336, layers, 32, 8, vocabulary, positions),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }


def _gemma2(*sizes: int, head_dim: int, scalar: int) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "gemma2",
        **_sizes(hidden, ffn, layers, heads, groups, 256000, 8192),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    }


def _gemma3(hidden: int, ffn: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        **_sizes(hidden, ffn, layers, 4, 1, 262144, 32768),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        **more,
    }


def _olmo2(*sizes: int) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "olmo2",
        **_sizes(hidden, ffn, layers, heads, groups, 100352, 4096),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    }


def _phi3(*sizes: int, positions: int, vocabulary: int = 32064, **more: Any) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "phi3",
        **_sizes(hidden, ffn, layers, heads, groups, vocabulary, positions),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


#: (The published factors differ from channel to channel.)
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}


def _smollm2(*sizes: int, base: int) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "llama",
        **_sizes(hidden, ffn, layers, heads, groups, 49152, 8192),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "is_llama_config": True,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": base,
        "tie_word_embeddings": True,
    }


def _pythia(hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        **_sizes(hidden, 4 * hidden, layers, heads, None, vocabulary, 2048),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    }


def _granite3(hidden: int, ffn: int, attention: float, logits: float) -> dict[str, Any]:
    return {
        "model_type": "granite",
        **_sizes(hidden, ffn, 40, 32, 8, 49155, 131072),
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": attention,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "logits_scaling": logits,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
    }


def _starcoder2(*sizes: int, base: float) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "starcoder2",
        **_sizes(hidden, ffn, layers, heads, groups, 49152, 16384),
        "attention_dropout": 0.1,
        "attention_softmax_in_fp32": True,
        "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "mlp_type": "default",
        "norm_epsilon": 1e-5,
        "norm_type": "layer_norm",
        "residual_dropout": 0.1,
        "rope_theta": base,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 4096,
        "use_bias": True,
    }


def _stablelm2(*sizes: int, **more: Any) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "model_type": "stablelm",
        **_sizes(hidden, ffn, layers, heads, groups, 100352, 4096),
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        **more,
    }


_STRETCHED = {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500000}
_QWEN = {"rotary_base": 1000000, "norm_epsilon": 1e-6}

#: By name: config.json, and flags that it needs.
ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1 8B": (_llama3(4096, 14336, 32, 32), {"kv_channels": 128, **_STRETCHED}),
    "Llama 3.1 70B": (_llama3(8192, 28672, 80, 64), {"kv_channels": 128, **_STRETCHED}),
    "Llama 3.2 1B": (
        _llama3(2048, 8192, 16, 32, factor=32.0, head_dim=64, tie_word_embeddings=True),
        {"kv_channels": 64, **_STRETCHED, "rope_scaling_factor": 32.0},
    ),
    "Llama 3.2 3B": (
        _llama3(3072, 8192, 28, 24, factor=32.0, head_dim=128, tie_word_embeddings=True),
        {"kv_channels": 128, **_STRETCHED, "rope_scaling_factor": 32.0},
    ),
    "Llama 3.3 70B Instruct": (
        _llama3(8192, 28672, 80, 64, eos_token_id=[128001, 128008, 128009]),
        {"num_query_groups": 8, **_STRETCHED},
    ),
    "Qwen2.5 0.5B": (_qwen25(896, 4864, 24, 14, 2, positions=32768, tied=True), _QWEN),
    "Qwen2.5 1.5B": (_qwen25(1536, 8960, 28, 12, 2, positions=131072, tied=True), _QWEN),
    "Qwen2.5 3B": (_qwen25(2048, 11008, 36, 16, 2, positions=32768, tied=True), _QWEN),
    "Qwen2.5 7B": (
        _qwen25(3584, 18944, 28, 28, 4, positions=131072, vocabulary=152064, tied=False),
        {**_QWEN, "vocab_size": 152064},
    ),
    "Qwen2.5 14B": (
        _qwen25(5120, 13824, 48, 40, 8, positions=131072, vocabulary=152064, eps=1e-5, tied=False),
        {"norm_epsilon": 1e-5, "kv_channels": 128},
    ),
    "Qwen2.5 32B": (
        _qwen25(5120, 27648, 64, 40, 8, positions=131072, vocabulary=152064, eps=1e-5, tied=False),
        {"num_layers": 64, "ffn_hidden_size": 27648},
    ),
    "Qwen2.5 72B": (
        _qwen25(8192, 29568, 80, 64, 8, positions=131072, vocabulary=152064, eps=1e-5, tied=False),
        {"num_layers": 80, "ffn_hidden_size": 29568},
    ),
    "Qwen3 0.6B": (_qwen3(1024, 3072, 28, 16, 8, tied=True), {"kv_channels": 128, **_QWEN}),
    "Qwen3 8B": (_qwen3(4096, 12288, 36, 32, 8, tied=False), {"kv_channels": 128, **_QWEN}),
    "Mistral 7B v0.1": (
        _mistral(4096, 32, 32000, 32768, rope_theta=10000.0, sliding_window=4096),
        {"sliding_window": 4096, "rotary_base": 10000},
    ),
    "Mistral 7B v0.3": (
        _mistral(4096, 32, 32768, 32768, rope_theta=1000000.0, sliding_window=None),
        {"sliding_window": None, "rotary_base": 1000000},
    ),
    "Mistral Nemo": (
        _mistral(5120, 40, 131072, 1024000, head_dim=128, rope_theta=1e6, sliding_window=None),
        {"kv_channels": 128, "sliding_window": None},
    ),
    "Gemma 2 2B": (
        _gemma2(2304, 9216, 26, 8, 4, head_dim=256, scalar=256),
        {"softmax_scale": 1 / 16, "attention_softcap": 50.0, "embedding_multiplier": 48.0},
    ),
    "Gemma 2 9B": (
        _gemma2(3584, 14336, 42, 16, 8, head_dim=256, scalar=256),
        {"sublayer_norms": "both", "logit_softcap": 30.0},
    ),
    "Gemma 2 27B": (
        _gemma2(4608, 36864, 46, 32, 16, head_dim=128, scalar=144),
        {"softmax_scale": 1 / 12, "kv_channels": 128},
    ),
    "Gemma 3 1B": (
        _gemma3(1152, 6912, 26, sliding_window_pattern=6),
        {
            "rotary_local_base": 10000,
            "rotary_base": 1000000,
            "rotary_local_layers": [layer for layer in range(1, 27) if layer % 6],
        },
    ),
    "Gemma 3 270M": (
        _gemma3(
            *(640, 2048, 18),
            _sliding_window_pattern=6,
            layer_types=[*["sliding_attention"] * 5, "full_attention"] * 3,
            use_bidirectional_attention=False,
        ),
        {"rotary_local_layers": [layer for layer in range(1, 19) if layer % 6]},
    ),
    "OLMo 2 1B": (_olmo2(2048, 8192, 16, 16, 16), {"qk_layernorm_over": "all_heads"}),
    "OLMo 2 7B": (_olmo2(4096, 11008, 32, 32, 32), {"sublayer_norms": "post"}),
    "OLMo 2 13B": (_olmo2(5120, 13824, 40, 40, 40), {"rotary_base": 500000}),
    "OLMo 2 32B": (_olmo2(5120, 27648, 64, 40, 8), {"num_query_groups": 8}),
    "Phi-3 mini 4k": (
        _phi3(3072, 8192, 32, 32, 32, positions=4096, sliding_window=2047),
        {"sliding_window": 2047, "kv_channels": 96},
    ),
    "Phi-3 mini 128k": (
        _phi3(
            *(3072, 8192, 32, 32, 32),
            positions=131072,
            rope_scaling=LONG_ROPE,
            sliding_window=262144,
        ),
        {"max_position_embeddings": 4096, "seq_length": 4096, "kv_channels": 96},
    ),
    "Phi-4": (
        _phi3(
            *(5120, 17920, 40, 40, 10),
            positions=16384,
            vocabulary=100352,
            original_max_position_embeddings=16384,
            rope_theta=250000,
            sliding_window=None,
        ),
        {"rotary_base": 250000, "num_query_groups": 10, "rotary_frequencies": None},
    ),
    "Phi-4 mini": (
        _phi3(
            *(3072, 8192, 32, 24, 8),
            positions=131072,
            vocabulary=200064,
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
            mlp_bias=False,
            partial_rotary_factor=0.75,
            rope_scaling=LONG_ROPE,
            sliding_window=262144,
            tie_word_embeddings=True,
        ),
        {"rotary_percent": 0.75, "seq_length": 4096, "kv_channels": 128},
    ),
    "SmolLM2 135M": (_smollm2(576, 1536, 30, 9, 3, base=100000), {"kv_channels": 64}),
    "SmolLM2 360M": (_smollm2(960, 2560, 32, 15, 5, base=100000), {"rotary_base": 100000}),
    "SmolLM2 1.7B": (_smollm2(2048, 8192, 24, 32, 32, base=130000), {"rotary_base": 130000}),
    "SmolLM3 3B": (
        {
            "model_type": "smollm3",
            **_sizes(2048, 11008, 36, 16, 4, 128256, 65536),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"no_rope_layers": list(range(4, 37, 4)), "rotary_base": 5000000},
    ),
    "Pythia 160M": (
        _pythia(768, 12, 12, 50304),
        {"parallel_residual": True, "rotary_percent": 0.25, "normalization": "LayerNorm"},
    ),
    "Pythia 6.9B": (_pythia(4096, 32, 32, 50432), {"vocab_size": 50432, "kv_channels": 128}),
    "Granite 3 2B": (
        _granite3(2048, 8192, 0.015625, 8.0),
        {"softmax_scale": 0.015625, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    ),
    "Granite 3 8B": (
        _granite3(4096, 12800, 0.0078125, 16.0),
        {"softmax_scale": 0.0078125, "embedding_multiplier": 12.0, "rotary_base": 10000000},
    ),
    "StarCoder2 3B": (
        _starcoder2(3072, 12288, 30, 24, 2, base=999999.4420358813),
        {"rotary_base": 999999, "openai_gelu": True, "num_query_groups": 2},
    ),
    "StarCoder2 7B": (
        _starcoder2(4608, 18432, 32, 36, 4, base=1000000),
        {"rotary_base": 1000000, "rotary_frequencies": None},
    ),
    "StarCoder2 15B": (
        _starcoder2(6144, 24576, 40, 48, 4, base=100000),
        {"rotary_base": 100000, "hidden_dropout": 0.1},
    ),
    "StableLM 2 1.6B": (
        _stablelm2(2048, 5632, 24, 32, 32, use_qkv_bias=True),
        {"rotary_percent": 0.25, "normalization": "LayerNorm", "swiglu": True},
    ),
}

#: By name: config.json, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "StableLM 2 12B": (
        _stablelm2(5120, 13824, 40, 32, 8, qk_layernorm=True, use_parallel_residual=True),
        "qk_layernorm true .*use_parallel_residual true",
    ),
    "Gemma 3 4B": (
        {"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "vision_config": {}},
        "model of text and images",
    ),
    "Llama 3.1 8B in FP8": (
        _llama3(4096, 14336, 32, 32, quantization_config={"quant_method": "compressed-tensors"}),
        "compressed-tensors: a quantized model",
    ),
    "Phi-2": ({"model_type": "phi", "hidden_size": 2560}, "model_type 'phi'"),
    "Falcon 7B": ({"model_type": "falcon", "hidden_size": 4544}, "model_type 'falcon'"),
}
