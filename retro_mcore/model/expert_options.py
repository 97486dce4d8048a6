"""Options of mixtures of experts in the decoder, under Megatron's names.

Megatron-Core's MoE layers compute them (`platform/experts.py`). The neighbor encoder is dense. This
module imports neither torch nor megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.option_traits import at_least, between, decoder, shared

#: Megatron-Core's Retro has dense layers only.
_GPT = {"computed_by": frozenset({"megatron-gpt"})}


def _experts(name: str | None, **traits: Any) -> dict[str, Any]:
    return decoder(sets=f"config.{name}" if name else None, **_GPT, **traits)


@dataclass(kw_only=True)
class ExpertOptions:
    """Mixtures of experts in place of the decoder's MLPs."""

    num_experts: int | None = field(default=None, metadata=at_least(1) | _experts(None))
    """Number of experts in each MoE layer. Default: dense layers."""
    moe_layer_freq: list[int] | None = field(default=None, metadata=_experts(None, form="other"))
    """Layers with experts: a number N for the first of every N layers, or one 0 (dense) or 1
    (experts) for each layer. Default: all."""
    moe_ffn_hidden_size: int | None = field(default=None, metadata=at_least(1) | _experts(None))
    """Width of an expert's MLP. Default: --ffn-hidden-size."""
    moe_shared_expert_intermediate_size: int | None = field(
        default=None, metadata=at_least(1) | _experts("moe_shared_expert_intermediate_size")
    )
    """Width of an MLP beside the experts that every token passes. Default: none."""
    moe_shared_expert_gate: bool = field(
        default=False, metadata=_experts("moe_shared_expert_gate", absent=False)
    )
    """Multiply the shared expert's output by a sigmoid gate (Qwen2-MoE)."""
    moe_router_topk: int = field(
        default=2, metadata=at_least(1) | _experts("moe_router_topk", absent=2)
    )
    """Number of experts for each token."""
    moe_router_pre_softmax: bool = field(
        default=False, metadata=_experts("moe_router_pre_softmax", absent=False)
    )
    """Take the softmax over all experts' scores, before the choice, instead of over the chosen."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = field(
        default="softmax", metadata=_experts("moe_router_score_function", absent="softmax")
    )
    """Function that turns the router's logits into scores."""
    moe_router_topk_scaling_factor: float | None = field(
        default=None,
        metadata=between(1e-9, math.inf) | _experts("moe_router_topk_scaling_factor"),
    )
    """Factor on the weights of the chosen experts."""
    moe_router_num_groups: int | None = field(
        default=None, metadata=at_least(1) | _experts("moe_router_num_groups")
    )
    """Number of groups of experts; with --moe-router-group-topk."""
    moe_router_group_topk: int | None = field(
        default=None, metadata=at_least(1) | _experts("moe_router_group_topk")
    )
    """Number of groups that a token's experts are chosen from."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = field(
        default=None, metadata=shared(sets="config", reuse="free")
    )
    """Precision of the router. Default: the model's."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = field(
        default="aux_loss", metadata=shared(sets="config", reuse="free", absent="aux_loss")
    )
    """Load-balancing loss: over a micro batch (aux_loss), over each sample (seq_aux_loss), or
    none."""
    moe_aux_loss_coeff: float = field(
        default=0.0,
        metadata=between(0, math.inf) | shared(sets="config", reuse="free", absent=0.0),
    )
    """Weight of the load-balancing loss. 0.01 is usual; 0 leaves it out."""
    moe_z_loss_coeff: float | None = field(
        default=None,
        metadata=between(0, math.inf) | shared(sets="config", reuse="free"),
    )
    """Weight of the z-loss, which keeps the router's logits small."""


#: Names of the options.
EXPERT_OPTIONS = tuple(each.name for each in fields(ExpertOptions))

#: Options that say something of experts, unless they are None or 0.
NEED_EXPERTS = (
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk_scaling_factor",
    "moe_z_loss_coeff",
    "moe_aux_loss_coeff",
)


def expert_layers(num_experts: int | None, frequency: Any, num_layers: int) -> list[int]:
    """Numbers of the decoder layers with experts, from 1.

    Args:
        num_experts: None: no layer has experts.
        frequency: As Megatron's configuration and arguments state it, or the flag: a number, a
            list of one number, or one 0 or 1 for each layer.
        num_layers: Number of decoder layers.
    """
    if num_experts is None:
        return []
    pattern = frequency if isinstance(frequency, (list, tuple)) else [frequency or 1]
    if len(pattern) == 1 and pattern[0] >= 1:
        return list(range(1, num_layers + 1, pattern[0]))
    return [number for number, has_experts in enumerate(pattern, 1) if has_experts]


def problems_of_experts(options: Any, num_layers: int) -> Iterator[ConfigurationError]:
    """An error for every option of experts that cannot work, naming the flag.

    Args:
        options: `ExpertOptions`, with `disable_bias_linear`.
        num_layers: Number of decoder layers.
    """
    if options.num_experts is None:
        yield from _without_experts(options)
        return
    pattern = options.moe_layer_freq
    if pattern is not None and not _is_pattern(pattern, num_layers):
        yield ConfigurationError(
            "--moe-layer-freq",
            f"{pattern} in a model of {num_layers} layers",
            "Give one number from 1, or a 0 or 1 for each layer with at least one 1",
        )
    topk, experts = options.moe_router_topk, options.num_experts
    if topk > experts:
        yield ConfigurationError(
            "--moe-router-topk", f"{topk} of {experts} experts", "Choose at most num_experts"
        )
    plain = options.moe_router_score_function == "softmax" and not options.moe_router_pre_softmax
    if topk == 1 and plain:
        yield ConfigurationError(
            "--moe-router-topk",
            "1 with a softmax over the chosen expert alone, which is always 1",
            "Add --moe-router-pre-softmax",
        )
    yield from _group_problems(options)
    if options.moe_shared_expert_intermediate_size is None and options.moe_shared_expert_gate:
        yield ConfigurationError(
            "--moe-shared-expert-gate",
            "given without a shared expert",
            "Add --moe-shared-expert-intermediate-size",
        )
    if not options.disable_bias_linear:
        yield ConfigurationError(
            "--num-experts",
            f"{experts} with biases, which Megatron's experts do not train with",
            "Add --disable-bias-linear",
        )


def _without_experts(options: Any) -> Iterator[ConfigurationError]:
    for name in NEED_EXPERTS:
        if getattr(options, name):
            yield ConfigurationError(
                flag_of(name), f"{getattr(options, name)} without experts", "Add --num-experts"
            )


def _is_pattern(pattern: list[int], num_layers: int) -> bool:
    if len(pattern) == 1 and num_layers != 1:
        return pattern[0] >= 1
    return len(pattern) == num_layers and set(pattern) <= {0, 1} and 1 in pattern


def _group_problems(options: Any) -> Iterator[ConfigurationError]:
    groups, chosen = options.moe_router_num_groups, options.moe_router_group_topk
    if (groups is None) != (chosen is None):
        yield ConfigurationError(
            "--moe-router-num-groups",
            f"{groups}, with --moe-router-group-topk {chosen}",
            "Give both or neither",
        )
        return
    if groups is None or chosen is None:
        return
    fits = options.num_experts % groups == 0 and chosen <= groups
    each, remainder = divmod(options.moe_router_topk, chosen)
    if not fits or remainder or each > options.num_experts // groups:
        yield ConfigurationError(
            "--moe-router-num-groups",
            f"{groups} for {options.num_experts} experts, of which {options.moe_router_topk} from "
            f"{chosen} groups",
            "The experts must divide into groups, and the chosen experts over the chosen groups",
        )
