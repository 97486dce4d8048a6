"""What a Hugging Face config.json says of a model, in the names of our flags.

Keys that are absent have the defaults of transformers' own configuration of that family. A key
that would make the model compute something else than our decoder does is refused by name; so is
one that is not known here, unless its value is neutral (null, false, empty) or a mere remark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.huggingface_files import refuse

Flags = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What is known of a family's config.json.

    Attributes:
        defaults: Keys that are read, with transformers' defaults.
        fixed: Keys that are not honoured, with the values that our decoder computes: the first is
            transformers' default.
        aliases: Other names of keys.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    aliases: Mapping[str, str]


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
_QWEN3 = {**_QWEN2, "head_dim": 128}
_STABLELM = {
    **{key: value for key, value in _LLAMA.items() if key not in ("rms_norm_eps", "head_dim")},
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
# Absent where transformers' configuration has no such key either.
_OFF = (False, None)
_FULL_ROTARY = {"partial_rotary_factor": (None, 1, 1.0)}
FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        _GPT2,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": _OFF,
            "add_cross_attention": _OFF,
        },
        {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "llama": Family(
        _LLAMA, {"attention_bias": _OFF, "mlp_bias": _OFF, "sliding_window": (None,),
                 **_FULL_ROTARY}, {},
    ),
    "mistral": Family(_MISTRAL, _FULL_ROTARY, {}),
    "qwen2": Family(_QWEN2, _FULL_ROTARY, {}),
    "qwen3": Family(_QWEN3, {"attention_bias": _OFF, **_FULL_ROTARY}, {}),
    "stablelm": Family(
        _STABLELM,
        {"qk_layernorm": _OFF, "use_parallel_residual": _OFF, "sliding_window": (None,)},
        {},
    ),
}  # fmt: skip

# Keys that no forward pass in evaluation depends on; and those of generation, of saved
# tokenizers, and of tools that only sign what they wrote.
_HARMLESS = re.compile(
    r"_.*|.*_token_ids?|.*_token_index|.*_version|unsloth.*|axolotl.*|summary_.*|"
    r"(output|return)_.*|num_labels|id2label|label2id|n_ctx|n_special|predict_special_tokens|"
    r"architectures|model_type|name_or_path|auto_map|torch_dtype|dtype|use_cache|use_bfloat16|"
    r"torchscript|tf_legacy_loss|initializer_range|initializer_factor|init_std|problem_type|"
    r"task_specific_params|prefix|finetuning_task|tokenizer_class|transformers_weights|"
    r"gradient_checkpointing|use_gradient_checkpointing|keys_to_ignore_at_inference|"
    r"attn_implementation|experts_implementation|use_flash_attn|use_flash_attention(_2)?|"
    r"pretraining_tp|chunk_size_feed_forward|reorder_and_upcast_attn|embd_pdrop|is_decoder|"
    r"tie_encoder_decoder|seq_length|max_sequence_length|model_max_length|max_seq_len|loss_type|"
    # of generation
    r"do_sample|temperature|top_[kp]|typical_p|min_p|(min|max)_(new_tokens|length)|early_stopping|"
    r"num_beams|num_beam_groups|num_return_sequences|remove_invalid_values|cache_implementation|"
    r"(diversity|repetition|length|encoder_repetition)_penalty|(epsilon|eta)_cutoff|"
    r"(encoder_)?no_repeat_ngram_size|num_assistant_.*|assistant_.*|target_lookbehind"
)
# A text may be anybody's remark; under a key of these words it says how something is computed.
_COMPUTING = re.compile(
    r"att(entio)?n|norm|act|rope|rotary|position|scal|bias|mlp|resid|layer|expert|gate|gating|"
    r"window|embed|soft|logit|multipl|router|sink|head|hidden|mode|type|arch|quant|impl|kernel"
)
# Values with which settings of other families change nothing.
_NEUTRAL = {
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "embedding_scale": 1,
    "rope_ratio": 1,
    "num_experts": 0,
    "num_local_experts": 0,
}
# Switches of what every one of our layers does: here false, and null, change the model.
_ON = re.compile(r"(is|use)_causal(_mask|_attention)?|causal|use_(rope|rotary)(_.*)?")
_QUANTIZED = ("quantization_config", "compression_config", "quantization")

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
_GELU = {
    **{name: {"openai_gelu": False} for name in ("gelu", "gelu_python")},
    **{name: {"openai_gelu": True} for name in _TANH_GELU},
    "relu2": {"openai_gelu": False, "squared_relu": True},
}
# What Megatron's --use-rope-scaling has built in.
_LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


class Config:
    """A family's settings, each of the kind that it should be.

    Args:
        directory: Of the model, for errors.
        values: The content of config.json.

    Raises:
        CheckpointError: a family that is not known, a quantized model, or a setting that our
            decoder does not have.
    """

    def __init__(self, directory: Path, values: Mapping[str, Any]) -> None:
        self._directory = directory
        self.family = values.get("model_type")
        known = FAMILIES.get(self.family) if isinstance(self.family, str) else None
        if known is None:
            raise self.refusal(f"model_type {self.family!r}", " or ".join(FAMILIES))
        for key in _QUANTIZED:
            if values.get(key):
                raise self.refusal(
                    f"{key} {_method(values[key])}: a quantized model",
                    "plain weights: dequantize it, or take the model that it was made from",
                )
        aliased = {known.aliases.get(key, key): values[key] for key in values}
        # The other name counts, as in transformers.
        aliased |= {new: values[old] for old, new in known.aliases.items() if old in values}
        self._values = {**known.defaults, **aliased}
        self.given = frozenset(aliased)
        self._check_keys(known)

    def _check_keys(self, family: Family) -> None:
        problems = []
        for key, value in self._values.items():
            found = f"{_shown(key)[1:-1]} {_shown(value)}"
            if key in family.fixed:
                computed = family.fixed[key]
                if not any(value is one or value == one for one in computed):
                    problems.append(f"{found} (it computes {_shown(computed[0])})")
            elif not (key in family.defaults or key in _WINDOWS or is_neutral(key, value)):
                problems.append(found)
        if problems:
            raise self.refusal(
                f"settings that our decoder does not have: {', '.join(problems[:8])}",
                "a model without them. A key that changes nothing in what the model computes may "
                "be removed from its config.json",
            )

    def refusal(self, found: str, expected: str) -> Exception:
        """The error about a setting."""
        return refuse(self._directory, found, expected)

    def get(self, key: str) -> Any:
        """A setting as it is written."""
        return self._values.get(key)

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number, of at least `least`."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.refusal(f"{key} {_shown(value)}", f"a whole number from {least} on")
        return value

    def number(self, key: str, low: float, high: float = math.inf) -> float:
        """A number from `low` (excluded, unless 0 is a rate) up to `high` (excluded)."""
        return self.checked_number(key, self._values.get(key), low, high)

    def checked_number(self, key: str, value: Any, low: float, high: float = math.inf) -> float:
        """The same of a value that lies deeper."""
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not (low <= value < high):
            raise self.refusal(f"{key} {_shown(value)}", f"a number from {low:g} to {high:g}")
        return value  # type: ignore[no-any-return]

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._values.get(key)
        if not isinstance(value, bool):
            raise self.refusal(f"{key} {_shown(value)}", "true or false")
        return value


_WINDOWS = ("layer_types",)  # looked at for every family


def _method(value: Any) -> str:
    name = value.get("quant_method") if isinstance(value, dict) else None
    return str(name) if name else _shown(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def is_neutral(key: str, value: Any) -> bool:
    """Whether a key that is not known here changes nothing with this value."""
    if _ON.fullmatch(key):
        return value is True
    if value is None or value is False or value in ("", [], {}):
        return True
    if key in _NEUTRAL and value == _NEUTRAL[key]:
        return True
    if isinstance(value, str) and not _COMPUTING.search(key):
        return True
    return _HARMLESS.fullmatch(key) is not None


def config_flags(config: Config) -> Flags:
    """The flags of a model.

    Raises:
        CheckpointError: a setting is not of its kind, or is none that our decoder computes.
    """
    return _gpt2_flags(config) if config.family == "gpt2" else _llama_flags(config)


def _gpt2_flags(config: Config) -> Flags:
    activation = config.get("activation_function")
    if not isinstance(activation, str) or activation not in _GELU:
        raise config.refusal(f"activation_function {activation!r}", f"one of {', '.join(_GELU)}")
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % heads:
        raise config.refusal(f"n_head {heads} for n_embd {hidden}", "a divisor")
    _window(config)
    return {
        "num_layers": config.integer("n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden
        if config.get("n_inner") is None
        else config.integer("n_inner"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "normalization": "LayerNorm",
        "norm_epsilon": config.number("layer_norm_epsilon", 0, 1),
        "apply_layernorm_1p": False,
        "squared_relu": False,
        **_GELU[activation],
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": config.integer("n_positions"),
        "hidden_dropout": config.number("resid_pdrop", 0, 1),
        "attention_dropout": config.number("attn_pdrop", 0, 1),
        "vocab_size": config.integer("vocab_size"),
        "seq_length": config.integer("n_positions"),
        "sliding_window": None,
    }


def _llama_flags(config: Config) -> Flags:
    layer_norm = config.family == "stablelm"
    activation = config.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise config.refusal(f"hidden_act {activation!r}", "silu")
    epsilon = config.number("layer_norm_eps" if layer_norm else "rms_norm_eps", 0, 1)
    return {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "ffn_hidden_size": config.integer("intermediate_size"),
        **_head_flags(config),
        "normalization": "LayerNorm" if layer_norm else "RMSNorm",
        "norm_epsilon": epsilon,
        "apply_layernorm_1p": False,
        "openai_gelu": False,
        "squared_relu": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        **_rope_flags(config),
        "hidden_dropout": config.number("hidden_dropout", 0, 1) if layer_norm else 0.0,
        "attention_dropout": config.number("attention_dropout", 0, 1),
        "vocab_size": config.integer("vocab_size"),
        "seq_length": config.integer("max_position_embeddings"),
        "sliding_window": _window(config),
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
    if config.family == "stablelm" and channels != hidden // heads:
        raise config.refusal(f"head_dim {channels}", f"{hidden // heads}, as it computes")
    return {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": channels}


def _rope_flags(config: Config) -> Flags:
    """As transformers 5: `rope_scaling` (its older name) before `rope_parameters`, and what these
    do not say from the keys beside them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(key.endswith("_attention") for key in rope):
        raise config.refusal(f"rope_parameters {_shown(rope)}", "those of one rotary embedding")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = config.checked_number(
        "rope_theta", rope.get("rope_theta", config.get("rope_theta")), 1, 2**53
    )
    if base != int(base):
        raise config.refusal(f"rope_theta {base}", "a whole number")
    flags: Flags = {
        "rotary_percent": _rotary_percent(config, rope),
        "rotary_base": int(base),
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
    }
    if kind == "linear":
        factor = config.checked_number("rope factor", rope.get("factor"), 1)
        return {**flags, "rotary_seq_len_interpolation_factor": float(factor)}
    if kind == "llama3":
        return {**flags, **_llama3_flags(config, rope)}
    if kind != "default":
        raise config.refusal(f"rotary embedding {kind!r}", "default, linear, or Llama 3.1's")
    return flags


def _llama3_flags(config: Config, rope: Mapping[str, Any]) -> Flags:
    original = config.get("original_max_position_embeddings")
    if original is None:
        fallback = config.get("max_position_embeddings")
        original = rope.get("original_max_position_embeddings", fallback)
    rope = {**rope, "original_max_position_embeddings": original}
    differing = [name for name, value in _LLAMA3_ROPE.items() if rope.get(name) != value]
    if differing:
        found = ", ".join(f"{name} {_shown(rope.get(name))}" for name in differing)
        expected = ", ".join(f"{name} {_LLAMA3_ROPE[name]}" for name in differing)
        raise config.refusal(f"rotary embedding 'llama3' of {found}", f"{expected}, as Llama 3.1")
    factor = config.checked_number("rope factor", rope.get("factor"), 1)
    return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}


def _rotary_percent(config: Config, rope: Mapping[str, Any]) -> float:
    found = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if config.family != "stablelm":
        if found not in (None, 1):
            raise config.refusal(f"partial_rotary_factor {_shown(found)}", "1")
        return 1.0
    percent = config.checked_number("partial_rotary_factor", found, 0, 1 + 1e-9)
    if percent == 0:
        raise config.refusal("partial_rotary_factor 0", "a share above 0")
    return float(percent)


def _window(config: Config) -> int | None:
    """Tokens that a position of some layer attends to, itself among them; None: all.

    Where layers differ, it is that of the layers that have one: texts that fit it are the same in
    every layer.
    """
    kinds = config.get("layer_types")
    layers = config.integer("n_layer" if config.family == "gpt2" else "num_hidden_layers")
    if kinds is not None:
        known = ("full_attention", "sliding_attention", "attention")
        plain = isinstance(kinds, list) and len(kinds) == layers
        if not plain or not all(kind in known for kind in kinds):
            raise config.refusal(f"layer_types {_shown(kinds)}", f"{layers} of {', '.join(known)}")
    slides = isinstance(kinds, list) and "sliding_attention" in kinds
    if config.family == "mistral":
        return None if config.get("sliding_window") is None else config.integer("sliding_window")
    has_window = config.family in ("qwen2", "qwen3") and config.boolean("use_sliding_window")
    if not has_window or config.get("sliding_window") is None:
        if slides:
            raise config.refusal("layer_types with sliding_attention", "a window: sliding_window")
        return None
    if kinds is None:
        slides = config.integer("max_window_layers", 0) < layers
    return config.integer("sliding_window") if slides else None
