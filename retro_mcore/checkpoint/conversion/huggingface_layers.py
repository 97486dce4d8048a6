"""Weights of a Hugging Face model's layers: the tensors that make each of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_families import Flags
from retro_mcore.checkpoint.conversion.huggingface_files import TensorFiles

#: The tensors that make one of our weights, with their shapes, and how.
Shapes = dict[str, tuple[int, ...]]
Parts = tuple[Shapes, Callable[..., Tensor] | None]


def layer_parts(config: Config, flags: Flags) -> dict[str, Parts]:
    """Our weights of a layer, by name below the layer: the tensors that make each.

    GPT-2 has a table of its own (`huggingface`).
    """
    parts = {**_attention(config, flags), **_mlp(config, flags), **_norms(config, flags)}
    return parts | _qk_norms(config, flags)


def _sizes(flags: Flags) -> tuple[int, int, int, int]:
    """Hidden size, rows of queries, rows of keys, width of the MLP."""
    width = flags["kv_channels"]
    heads, groups = flags["num_attention_heads"], flags["num_query_groups"]
    return flags["hidden_size"], heads * width, groups * width, flags["ffn_hidden_size"]


def has_biases(config: Config, part: str) -> bool:
    """Whether the linear layers "qkv", "proj" or "mlp" have biases in config.json."""
    key = config.facts.biases.get(part, False)  # type: ignore[call-overload]
    return key if isinstance(key, bool) else config.boolean(key)


def _linear(
    name: str,
    theirs: Mapping[str, tuple[int, ...]],
    build: Callable[..., Tensor] | None,
    bias: bool,
) -> dict[str, Parts]:
    """A linear layer from others, whose weights' shapes are given."""
    weights = {f"{each}.weight": shape for each, shape in theirs.items()}
    parts: dict[str, Parts] = {f"{name}.weight": (weights, build)}
    if bias:
        biases = {f"{each}.bias": shape[:1] for each, shape in theirs.items()}
        parts[f"{name}.bias"] = (biases, build)
    return parts


def _attention(config: Config, flags: Flags) -> dict[str, Parts]:
    hidden, queries, keys, _ = _sizes(flags)
    grouped = partial(merge_qkv, groups=flags["num_query_groups"])
    merge: Callable[..., Tensor] | None = grouped
    theirs: dict[str, tuple[int, ...]]
    theirs = {f"self_attn.{part}_proj": (keys, hidden) for part in "qkv"}
    theirs["self_attn.q_proj"] = (queries, hidden)
    output = "self_attn.o_proj"
    if config.family == "phi3":
        theirs = {"self_attn.qkv_proj": (queries + 2 * keys, hidden)}
        merge = partial(_part_and_merge, rows=(queries, keys, keys), merge=grouped)
    elif config.family == "gpt_neox":  # query, key and value head by head, as Megatron has them
        theirs, merge = {"attention.query_key_value": (3 * queries, hidden)}, None
        output = "attention.dense"
    return {
        **_linear("self_attention.linear_qkv", theirs, merge, has_biases(config, "qkv")),
        **_linear(
            "self_attention.linear_proj",
            {output: (hidden, queries)},
            None,
            has_biases(config, "proj"),
        ),
    }


def _mlp(config: Config, flags: Flags) -> dict[str, Parts]:
    hidden, _, _, ffn = _sizes(flags)
    build: Callable[..., Tensor] | None = None
    first, second = {f"mlp.{part}_proj": (ffn, hidden) for part in ("gate", "up")}, "mlp.down_proj"
    if config.family == "phi3":
        first = {"mlp.gate_up_proj": (2 * ffn, hidden)}
    elif config.family == "starcoder2":
        first, second = {"mlp.c_fc": (ffn, hidden)}, "mlp.c_proj"
    elif config.family == "gpt_neox":
        first, second = {"mlp.dense_h_to_4h": (ffn, hidden)}, "mlp.dense_4h_to_h"
    else:
        build = _stack
    bias = has_biases(config, "mlp")
    return {
        **_linear("mlp.linear_fc1", first, build, bias),
        **_linear("mlp.linear_fc2", {second: (hidden, ffn)}, None, bias),
    }


def expert_parts(
    config: Config, flags: Flags, tensors: TensorFiles, layer: str
) -> dict[str, Parts]:
    """Our weights of a layer's mixture of experts, by name below the layer.

    Mixtral's first releases have names of their own. transformers 5 may hold all experts in one
    tensor, which is then read row by row.

    Args:
        config, flags: As for `layer_parts`.
        tensors: Of the model.
        layer: Prefix of the layer's tensors.
    """
    hidden, ffn = flags["hidden_size"], flags["moe_ffn_hidden_size"]
    old = f"{layer}block_sparse_moe.gate.weight" in tensors
    block = "block_sparse_moe" if old else "mlp"
    gate, up, down = ("w1", "w3", "w2") if old or _has_w(tensors, layer) else _PROJECTIONS
    fused = f"{block}.experts.gate_up_proj"
    if f"{layer}{fused}" in tensors:
        for name in (fused, f"{block}.experts.down_proj"):
            tensors.unstack(f"{layer}{name}")
    parts: dict[str, Parts] = {
        "mlp.router.weight": ({f"{block}.gate.weight": (flags["num_experts"], hidden)}, None)
    }
    for number in range(flags["num_experts"]):
        ours, theirs = f"mlp.experts.local_experts.{number}", f"{block}.experts.{number}"
        first: Shapes = {f"{theirs}.{part}.weight": (ffn, hidden) for part in (gate, up)}
        second: Shapes = {f"{theirs}.{down}.weight": (hidden, ffn)}
        build: Callable[..., Tensor] | None = _stack
        if f"{layer}{fused}.{number}" in tensors:
            first, build = {f"{fused}.{number}": (2 * ffn, hidden)}, None
            second = {f"{block}.experts.down_proj.{number}": (hidden, ffn)}
        parts[f"{ours}.linear_fc1.weight"] = (first, build)
        parts[f"{ours}.linear_fc2.weight"] = (second, None)
    return parts | _shared_expert(flags)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _has_w(tensors: TensorFiles, layer: str) -> bool:
    return f"{layer}mlp.experts.0.w1.weight" in tensors


def _shared_expert(flags: Flags) -> dict[str, Parts]:
    hidden, width = flags["hidden_size"], flags.get("moe_shared_expert_intermediate_size")
    if width is None:
        return {}
    first: Shapes = {
        f"mlp.shared_expert.{part}.weight": (width, hidden) for part in _PROJECTIONS[:2]
    }
    return {
        "mlp.shared_experts.linear_fc1.weight": (first, _stack),
        "mlp.shared_experts.linear_fc2.weight": (
            {"mlp.shared_expert.down_proj.weight": (hidden, width)},
            None,
        ),
        "mlp.shared_experts.gate_weight": (
            {"mlp.shared_expert_gate.weight": (1, hidden)},
            None,
        ),
    }


def _norms(config: Config, flags: Flags) -> dict[str, Parts]:
    kinds = ("weight", "bias") if flags["normalization"] == "LayerNorm" else ("weight",)
    return {
        f"{ours}.{kind}": ({f"{theirs}.{kind}": (flags["hidden_size"],)}, None)
        for ours, theirs in config.facts.norms.items()
        for kind in kinds
    }


def _qk_norms(config: Config, flags: Flags) -> dict[str, Parts]:
    _, queries, keys, _ = _sizes(flags)
    if config.facts.qk_norm is None:
        return {}
    whole = config.facts.qk_norm == "all_heads"
    channels: int = flags["kv_channels"]
    widths = {"q": queries, "k": keys} if whole else {"q": channels, "k": channels}
    return {
        f"self_attention.{part}_layernorm.weight": (
            {f"self_attn.{part}_norm.weight": (width,)},
            None,
        )
        for part, width in widths.items()
    }


def missing_biases(config: Config, flags: Flags) -> dict[str, tuple[int, ...]]:
    """Biases that Megatron's layers have and the model lacks, with their shapes.

    Megatron has biases on queries, keys and values alone, or on all linear layers.
    """
    if not (has_biases(config, "proj") or has_biases(config, "mlp")):
        return {}
    hidden, queries, keys, ffn = _sizes(flags)
    gated = 2 if flags["swiglu"] or flags["geglu"] else 1
    rows = {
        "qkv": {"self_attention.linear_qkv.bias": (queries + 2 * keys,)},
        "proj": {"self_attention.linear_proj.bias": (hidden,)},
        "mlp": {"mlp.linear_fc1.bias": (gated * ffn,), "mlp.linear_fc2.bias": (hidden,)},
    }
    without = [part for part in rows if not has_biases(config, part)]
    return {name: shape for part in without for name, shape in rows[part].items()}


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


def _part_and_merge(
    fused: Tensor, rows: tuple[int, int, int], merge: Callable[..., Tensor]
) -> Tensor:
    """`merge_qkv` of queries, keys and values that lie one after another."""
    return merge(*fused.split(rows))


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
