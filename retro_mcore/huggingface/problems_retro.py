"""Options of layers that cannot work, alone or together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_AT_LEAST_ONE = (
    "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "rotary_local_base",
)  # fmt: skip
_NEED_EXPERTS = (
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate", "moe_router_topk_scaling_factor", "moe_z_loss_coeff",
    "moe_aux_loss_coeff",
)  # fmt: skip


def problems_of_layers(config: Any) -> list[str]:
    """Problems of a `RetroConfig`, each naming its options; empty if there is none."""
    small = [
        f"{name} is {getattr(config, name)}, expected at least 1"
        for name in _AT_LEAST_ONE
        if getattr(config, name) is not None and getattr(config, name) < 1
    ]
    problems = [*_family_problems(config), *_rotary_problems(config)]
    if config.num_experts is None:
        return [*problems, *small, *_problems_without_experts(config)]
    # Sizes below 1 have no meaning for the other checks.
    return [*problems, *(small or _expert_problems(config))]


def _family_problems(config: Any) -> Iterator[str]:
    window = config.window_attn_skip_freq
    if window and (len(window) not in (1, config.num_layers) or window == [0]):
        yield "window_attn_skip_freq has neither one number nor one for each layer"
    if config.parallel_residual and (config.sublayer_norms != "pre" or config.num_experts):
        yield "parallel_residual goes with neither other sublayer_norms nor experts"
    own_sums = config.sublayer_norms != "pre" or config.parallel_residual
    if config.retro_deepnorm and (own_sums or config.residual_multiplier != 1):
        yield "retro_deepnorm adds its own way, without a family's"
    if config.retro_mup_base_hidden_size and config.softmax_scale:
        yield "retro_mup_base_hidden_size sets softmax_scale itself"
    if config.qk_layernorm_over == "all_heads" and config.normalization != "RMSNorm":
        yield "qk_layernorm_over is 'all_heads', which needs normalization RMSNorm"
    if config.qk_layernorm_over == "all_heads" and not config.qk_layernorm:
        yield "qk_layernorm_over is 'all_heads', which needs qk_layernorm"


def _rotary_problems(config: Any) -> Iterator[str]:
    for name in ("no_rope_layers", "rotary_local_layers"):
        layers = getattr(config, name)
        if layers and not set(layers) <= set(range(1, config.num_layers + 1)):
            yield f"{name} is {layers}, expected numbers from 1 to {config.num_layers}"
    if bool(config.rotary_local_base) != bool(config.rotary_local_layers):
        yield "rotary_local_base and rotary_local_layers are given together"
    pairs = int(config.kv_channels * config.rotary_percent) // 2
    if config.rotary_frequencies and len(config.rotary_frequencies) != pairs:
        yield f"rotary_frequencies are {len(config.rotary_frequencies)}, expected {pairs}"
    if config.rotary_attention_factor != 1 and not config.rotary_frequencies:
        yield "rotary_attention_factor needs rotary_frequencies"


def _problems_without_experts(config: Any) -> Iterator[str]:
    for name in _NEED_EXPERTS:
        if getattr(config, name):
            yield f"{name} needs num_experts"


def _expert_problems(config: Any) -> Iterator[str]:
    number, taken, pattern = config.num_experts, config.moe_router_topk, config.moe_layer_freq
    if pattern is not None and not _is_pattern(pattern, config.num_layers):
        yield (
            f"moe_layer_freq is {pattern}, expected one number from 1, or a 0 or 1 for each of "
            f"{config.num_layers} layers with at least one 1"
        )
    plain = config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax
    if taken > number:
        yield f"moe_router_topk is {taken} of {number} experts"
    if taken == 1 and plain:
        yield "moe_router_topk is 1, whose softmax is always 1 without moe_router_pre_softmax"
    yield from _group_problems(config)
    factor = config.moe_router_topk_scaling_factor
    if factor is not None and factor <= 0:
        yield f"moe_router_topk_scaling_factor is {factor}, expected a positive number"
    if config.moe_shared_expert_gate and config.moe_shared_expert_intermediate_size is None:
        yield "moe_shared_expert_gate needs moe_shared_expert_intermediate_size"
    if not config.disable_bias_linear:
        yield "experts have no biases: set disable_bias_linear"
    for name in ("retro_deepnorm", "retro_mup_base_hidden_size"):
        if getattr(config, name):
            yield f"{name} does not cover experts"


def _is_pattern(pattern: list[int], num_layers: int) -> bool:
    if len(pattern) == 1 and num_layers != 1:
        return pattern[0] >= 1
    return len(pattern) == num_layers and set(pattern) <= {0, 1} and 1 in pattern


def _group_problems(config: Any) -> Iterator[str]:
    number, taken = config.num_experts, config.moe_router_topk
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if (groups is None) != (chosen is None):
        yield "moe_router_num_groups and moe_router_group_topk are given together"
    if groups is None or chosen is None:
        return
    each, remainder = divmod(taken, chosen)
    if number % groups or chosen > groups or remainder or each > number // groups:
        yield (
            f"moe_router_num_groups is {groups} for {number} experts, of which {taken} from "
            f"{chosen} groups (moe_router_group_topk): the experts must divide into groups, and "
            f"the chosen experts over the chosen groups"
        )
