"""Hugging Face directories of GPT-2 and of the Llama family, as weights under our names.

Nothing of transformers is used: config.json and safetensors files are all that is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_mcore.conversion.weights import Weight
from retro_mcore.errors import CheckpointError

Flags = dict[str, Any]

_LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "stablelm")
_INDEX = "model.safetensors.index.json"
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
# What Megatron's --use-rope-scaling has built in.
_LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def is_huggingface(directory: Path) -> bool:
    """Whether a directory holds a Hugging Face model."""
    path = directory / "config.json"
    return path.is_file() and '"model_type"' in path.read_text(encoding="utf-8")


def read_huggingface(directory: Path) -> tuple[Flags, dict[str, Weight]]:
    """A model's flags and weights.

    Raises:
        CheckpointError: a family or an option that Megatron's decoder does not have, a file that
            is missing, or a weight that is missing or unknown.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type")
    tensors = _Tensors(directory)
    if family == "gpt2":
        flags, weights = _gpt2_flags(config, directory), _gpt2_weights(config, tensors)
    elif family in _LLAMA_FAMILY:
        flags = _llama_flags(config, directory)
        weights = _llama_weights(config, flags, tensors)
    else:
        raise _refuse(directory, f"model_type {family!r}", f"gpt2 or {', '.join(_LLAMA_FAMILY)}")
    if flags["untie_embeddings_and_output_weights"]:
        weights["output_layer.weight"] = tensors.take("lm_head.weight")
    tensors.check_all_taken(ignore=("lm_head.weight",))
    return flags, weights


class _Tensors:
    """The tensors of a directory's safetensors files, by name without the base model's prefix."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, tuple[Path, str]] = {}
        index = directory / _INDEX
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [directory / name for name in sorted(names)]
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise _refuse(
                directory,
                "no *.safetensors file",
                'save_pretrained(directory, safe_serialization=True) in place of "*.bin" files',
            )
        for file in files:
            self._add(file)
        self._taken: set[str] = set()

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise _refuse(self._directory, f"no {file.name}", "every file that its index names")
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                self._files[_base_name(name)] = (file, name)

    def take(self, name: str, *more: str, build: Callable[..., Tensor] | None = None) -> Weight:
        """The weight that `build` (default: itself) makes of the named tensors."""
        names = (name, *more)
        missing = [each for each in names if each not in self._files]
        if missing:
            raise _refuse(self._directory, f"no tensor {', '.join(missing)}", "the whole model")
        self._taken.update(names)
        parts = [self._shape(each) for each in names]
        meta = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in parts]
        made = build(*meta) if build else meta[0]
        return Weight(tuple(made.shape), made.dtype, partial(self._build, names, build))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _build(self, names: tuple[str, ...], build: Callable[..., Tensor] | None) -> Tensor:
        read = []
        for name in names:
            file, stored = self._files[name]
            with _open(file) as tensors:
                read.append(tensors.get_tensor(stored))
        return build(*read) if build else read[0]

    def _shape(self, name: str) -> tuple[list[int], torch.dtype]:
        file, stored = self._files[name]
        with _open(file) as tensors:
            part = tensors.get_slice(stored)
            return part.get_shape(), _DTYPES[part.get_dtype()]

    def check_all_taken(self, ignore: tuple[str, ...]) -> None:
        """Refuse tensors that nothing took, but for buffers and a tied output weight."""
        left = self._files.keys() - self._taken - set(ignore)
        left = {name for name in left if not name.endswith(_BUFFERS)}
        if left:
            raise _refuse(self._directory, f"unknown tensors {', '.join(sorted(left)[:8])}", "none")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")


def _open(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(file, "pt")
    except Exception as error:  # its own kinds, for a damaged file
        raise CheckpointError(file, f"cannot be read ({error})", "Download it again") from error


def _base_name(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def _gpt2_flags(config: Mapping[str, Any], directory: Path) -> Flags:
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(option):
            raise _refuse(directory, f"{option} true", "false")
    if not config.get("scale_attn_weights", True):
        raise _refuse(directory, "scale_attn_weights false", "true")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu", *_TANH_GELU):
        raise _refuse(directory, f"activation_function {activation!r}", "a GELU")
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_query_groups": config["n_head"],
        "kv_channels": config["n_embd"] // config["n_head"],
        "normalization": "LayerNorm",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "apply_layernorm_1p": False,
        "openai_gelu": activation != "gelu",
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": config["n_positions"],
        "seq_length": config["n_positions"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "vocab_size": config["vocab_size"],
    }


def _gpt2_weights(config: Mapping[str, Any], tensors: _Tensors) -> dict[str, Weight]:
    heads = config["n_head"]
    weights = {
        "embedding.word_embeddings.weight": tensors.take("wte.weight"),
        "embedding.position_embeddings.weight": tensors.take("wpe.weight"),
        "decoder.final_layernorm.weight": tensors.take("ln_f.weight"),
        "decoder.final_layernorm.bias": tensors.take("ln_f.bias"),
    }
    for layer in range(config["n_layer"]):
        theirs, ours = f"h.{layer}.", f"decoder.layers.{layer}."
        for old, new in _GPT2_LAYER.items():
            for kind in ("weight", "bias"):
                build = _gpt2_build(old, kind, heads)
                weights[f"{ours}{new}.{kind}"] = tensors.take(f"{theirs}{old}.{kind}", build=build)
    return weights


_GPT2_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "ln_2": "pre_mlp_layernorm",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}


def _gpt2_build(name: str, kind: str, heads: int) -> Callable[[Tensor], Tensor] | None:
    """GPT-2 stores linear layers transposed, and queries, keys and values one after another."""

    def build(tensor: Tensor) -> Tensor:
        if kind == "weight":
            tensor = tensor.t().contiguous()
        if name != "attn.c_attn":
            return tensor
        query, key, value = tensor.chunk(3)
        return merge_qkv(query, key, value, heads)

    return None if name.startswith("ln_") else build


def _llama_flags(config: Mapping[str, Any], directory: Path) -> Flags:
    family, heads = config["model_type"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    channels = config.get("head_dim") or config["hidden_size"] // heads
    layer_norm = family == "stablelm"
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise _refuse(directory, f"hidden_act {activation!r}", "silu")
    for option in ("use_parallel_residual", "mlp_bias", "attention_bias", "qk_layernorm"):
        if config.get(option):
            raise _refuse(directory, f"{option} true", "false")
    epsilon = config.get("layer_norm_eps" if layer_norm else "rms_norm_eps", 1e-6)
    percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": channels,
        "normalization": "LayerNorm" if layer_norm else "RMSNorm",
        "norm_epsilon": epsilon,
        "apply_layernorm_1p": False,
        "openai_gelu": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0 if percent is None else percent,
        **_rope_flags(rope, config, directory),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
        "seq_length": config.get("max_position_embeddings", 2048),
        **_window(config),
    }


def _rope_flags(rope: Mapping[str, Any], config: Mapping[str, Any], directory: Path) -> Flags:
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rotary_base": base, "use_rope_scaling": False}
    differing = [name for name, value in _LLAMA3_ROPE.items() if rope.get(name, value) != value]
    if kind != "llama3" or differing:
        found = ", ".join(f"{name} {rope[name]}" for name in differing)
        raise _refuse(directory, f"rotary embedding {kind!r} {found}", "default, or Llama 3.1's")
    return {
        "rotary_base": base,
        "use_rope_scaling": True,
        "rope_scaling_factor": rope["factor"],
    }


def _window(config: Mapping[str, Any]) -> Flags:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    return {"sliding_window": window} if window and used else {}


_LLAMA_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
}


def _llama_weights(config: Mapping[str, Any], flags: Flags, tensors: _Tensors) -> dict[str, Weight]:
    qkv = partial(merge_qkv, groups=flags["num_query_groups"])
    weights = {"embedding.word_embeddings.weight": tensors.take("embed_tokens.weight")}
    for kind in ("weight", "bias"):
        if f"norm.{kind}" in tensors:
            weights[f"decoder.final_layernorm.{kind}"] = tensors.take(f"norm.{kind}")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"layers.{layer}.", f"decoder.layers.{layer}."
        gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        weights[f"{ours}mlp.linear_fc1.weight"] = tensors.take(*gate_up, build=_stack)
        for kind in ("weight", "bias"):
            projections = [f"{theirs}self_attn.{which}_proj.{kind}" for which in "qkv"]
            if kind == "weight" or projections[0] in tensors:
                name = f"{ours}self_attention.linear_qkv.{kind}"
                weights[name] = tensors.take(*projections, build=qkv)
            for old, new in _LLAMA_LAYER.items():
                if f"{theirs}{old}.{kind}" in tensors:
                    weights[f"{ours}{new}.{kind}"] = tensors.take(f"{theirs}{old}.{kind}")
    return weights


def merge_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Rows of queries, keys and values as Megatron orders them: group by group, in each its
    queries, its key, its value.

    Args:
        query: `[attention heads * C, ...]`, C the width of a head.
        key: `[groups * C, ...]`.
        value: As `key`.
        groups: Query groups.
    """
    rest = query.shape[1:]
    parts = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _refuse(directory: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(directory, f"Hugging Face model with {found}", f"Expected {expected}")
