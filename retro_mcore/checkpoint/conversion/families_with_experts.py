"""Families of transformers with experts, for the export of a decoder alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.checkpoint.conversion.retro_names import Parts
from retro_mcore.model.expert_options import expert_layers

_ROUTED = re.compile(r"^decoder\.layers\.(\d+)\.mlp\.(router|experts|shared_experts)\.(.*)$")
_EXPERT = re.compile(r"^local_experts\.(\d+)\.(linear_fc[12])\.weight$")
_NEUTRAL = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
}


def family_of(dense: str, flags: Flags) -> tuple[tuple[str, str], dict[str, Any], list[str]]:
    """The family that computes a decoder with experts.

    Args:
        dense: The family of the same decoder without experts.
        flags: The model's options, resolved.

    Returns:
        Its type and architecture, its own keys of config.json, and options that it lacks.
    """
    problems = [
        f"{name} {flags[name]}"
        for name, value in _NEUTRAL.items()
        if flags.get(name, value) != value
    ]
    problems += [] if flags["disable_bias_linear"] else ["biases of experts"]
    shared = flags.get("moe_shared_expert_intermediate_size")
    if flags.get("qk_layernorm_over") == "all_heads":
        return _olmoe(flags, problems)
    if dense == "qwen3":
        kind = ("qwen3_moe", "Qwen3MoeForCausalLM")
        problems += [f"a shared expert with qk_layernorm (of {shared})"] if shared else []
    elif dense == "qwen2" or shared:
        kind = ("qwen2_moe", "Qwen2MoeForCausalLM")
        gated = shared and flags.get("moe_shared_expert_gate")
        problems += [] if gated else ["experts without a gated shared expert, with add_qkv_bias"]
    else:
        return _mixtral(flags, problems)
    if flags.get("sliding_window") is not None:
        problems.append(f"sliding_window {flags['sliding_window']} with these experts")
    return kind, _qwen(kind[0], flags), problems


def _olmoe(flags: Flags, problems: list[str]) -> tuple[tuple[str, str], dict[str, Any], list[str]]:
    problems = [*problems, *_dense_layers(flags)]
    for name in ("moe_shared_expert_intermediate_size", "sliding_window"):
        if flags.get(name):
            problems.append(f"{name} {flags[name]} with qk_layernorm_over all_heads")
    if not flags["qk_layernorm"]:
        problems.append("qk_layernorm_over all_heads without qk_layernorm")
    own = {
        "intermediate_size": flags["moe_ffn_hidden_size"],
        "num_experts": flags["num_experts"],
        "num_experts_per_tok": flags["moe_router_topk"],
        "norm_topk_prob": not flags.get("moe_router_pre_softmax"),
        "attention_bias": False,
        "clip_qkv": None,
    }
    return ("olmoe", "OlmoeForCausalLM"), own, problems


def _dense_layers(flags: Flags) -> list[str]:
    dense = len(_layers(flags)) < flags["num_layers"]
    return ["dense layers beside those with experts"] if dense else []


def _mixtral(
    flags: Flags, problems: list[str]
) -> tuple[tuple[str, str], dict[str, Any], list[str]]:
    problems = [*problems, *_dense_layers(flags)]
    if flags.get("moe_router_pre_softmax"):
        problems = [*problems, "moe_router_pre_softmax without qk_layernorm"]
    own = {
        "intermediate_size": flags["moe_ffn_hidden_size"],
        "num_local_experts": flags["num_experts"],
        "num_experts_per_tok": flags["moe_router_topk"],
        "sliding_window": flags.get("sliding_window"),
    }
    return ("mixtral", "MixtralForCausalLM"), own, problems


def _qwen(model_type: str, flags: Flags) -> dict[str, Any]:
    routed = _layers(flags)
    own: dict[str, Any] = {
        "num_experts": flags["num_experts"],
        "num_experts_per_tok": flags["moe_router_topk"],
        "norm_topk_prob": not flags.get("moe_router_pre_softmax"),
        "moe_intermediate_size": flags["moe_ffn_hidden_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(flags["num_layers"]) if n + 1 not in routed],
        "use_sliding_window": False,
    }
    if model_type == "qwen3_moe":
        return {**own, "attention_bias": False}
    shared = flags.get("moe_shared_expert_intermediate_size")
    return {**own, "shared_expert_intermediate_size": shared, "qkv_bias": flags["add_qkv_bias"]}


def _layers(flags: Flags) -> list[int]:
    return expert_layers(flags["num_experts"], flags.get("moe_layer_freq"), flags["num_layers"])


def parts_of(model_type: str, name: str) -> Parts | None:
    """The tensors of a weight of routers and experts; None for other weights.

    Args:
        model_type: Of the family.
        name: Our name.
    """
    match = _ROUTED.match(name)
    if match is None:
        return None
    layer, module, rest = match.groups()
    old = model_type == "mixtral"
    block = f"model.layers.{layer}.{'block_sparse_moe' if old else 'mlp'}."
    if module == "router":
        return _whole(f"{block}gate.{rest}")
    if module == "shared_experts" and rest == "gate_weight":
        return _whole(f"{block}shared_expert_gate.weight")
    if module == "shared_experts":
        return _mlp(f"{block}shared_expert.", rest.removesuffix(".weight"), old)
    found = _EXPERT.match(rest)
    assert found is not None, name
    return _mlp(f"{block}experts.{found[1]}.", found[2], old)


def _mlp(prefix: str, layer: str, old: bool) -> Parts:
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    if layer == "linear_fc2":
        return _whole(f"{prefix}{down}.weight")
    names = (f"{prefix}{gate}.weight", f"{prefix}{up}.weight")
    return Parts(names, _halves, lambda *parts: torch.cat(parts))


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _whole(name: str) -> Parts:
    return Parts((name,), lambda tensor: (tensor,), lambda tensor: tensor)
