"""Megatron's options that are refused by name, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from retro_mcore.errors import ConfigurationError, flag_of

_ENCODER = "but activations of a neighbor encoder are not offloaded by it"
_RECOMPUTE = "Use --cpu-offloading-num-layers"
_STATE = "but checkpoints of an offloaded optimizer were never tried, since they need a GPU"
_DISTRIBUTE = "Leave it out; --use-distributed-optimizer saves memory too"
_GLOBAL = "but of non-persistent checkpoints only local ones are supported"
_LOW_WEIGHTS = "but the weights of checkpoints are not kept in fp8 or fp4"


def _refused(reason: str, hint: str = "Leave it out") -> dict[str, Any]:
    """Metadata of an option that must keep its default."""
    return {"refused": (reason, hint)}


@dataclass(kw_only=True)
class UnsupportedOptions:
    """Options that Retro does not support."""

    moe_grouped_gemm: bool = field(
        default=False, metadata=_refused("but experts are computed one after another")
    )
    """Not supported: experts are computed one after another."""
    moe_expert_capacity_factor: float | None = field(
        default=None,
        metadata=_refused(
            "but experts with a capacity drop tokens, and what is dropped depends on the batch",
            "Leave it out; --moe-aux-loss-coeff balances experts",
        ),
    )
    """Not supported: a token's result would depend on the other tokens of its batch."""
    tp_comm_overlap: bool = field(
        default=False,
        metadata=_refused("but its buffers fit only one length, and neighbors have another"),
    )
    """Not supported: Transformer Engine's buffers have one length; text and neighbors differ."""
    cpu_offloading: bool = field(default=False, metadata=_refused(_ENCODER, _RECOMPUTE))
    """Not supported: Transformer Engine's offloading knows one stack of layers, and the neighbor
    encoder is a second one."""
    fine_grained_activation_offloading: bool = field(
        default=False, metadata=_refused(_ENCODER, _RECOMPUTE)
    )
    """Not supported, for the same reason."""
    offload_modules: list[str] | None = field(default=None, metadata=_refused(_ENCODER, _RECOMPUTE))
    """Not supported, for the same reason."""
    optimizer_cpu_offload: bool = field(default=False, metadata=_refused(_STATE, _DISTRIBUTE))
    """Not supported: checkpoints of an offloaded optimizer were never tried."""
    optimizer_offload_fraction: float | None = field(
        default=None, metadata=_refused(_STATE, _DISTRIBUTE)
    )
    """Not supported, for the same reason."""
    fp8_param_gather: bool = field(default=False, metadata=_refused(_LOW_WEIGHTS))
    """Not supported: checkpoints do not hold weights in fp8."""
    fp4_format: str | None = field(
        default=None,
        metadata=_refused(
            "but Transformer Engine's fp4 was never tried with Retro", "Use --fp8-format"
        ),
    )
    """Not supported: fp4 was never tried."""
    fp4_param_gather: bool = field(default=False, metadata=_refused(_LOW_WEIGHTS))
    """Not supported: checkpoints do not hold weights in fp4."""
    non_persistent_global_ckpt_dir: str | None = field(
        default=None, metadata=_refused(_GLOBAL, "Use --non-persistent-ckpt-type local")
    )
    """Not supported: of non-persistent checkpoints only local ones are."""

    def refused_options(self) -> Iterator[ConfigurationError]:
        """A problem for each of these options that is given."""
        for each in fields(UnsupportedOptions):
            value = getattr(self, each.name)
            if value != each.default:
                reason, hint = each.metadata["refused"]
                given = "given" if value is True else value
                yield ConfigurationError(flag_of(each.name), f"{given}, {reason}", hint)
