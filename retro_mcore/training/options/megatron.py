"""Flags generated from the configuration dataclasses of the installed megatron-core.

Names, types, defaults and help are read without importing megatron, so `--help` stays fast. Fields
missing in the installed release have no flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.config_fields import config_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: Flags of the layers' precision, and their fields in TransformerConfig.
PRECISION_FLAGS: dict[str, str] = {
    "fp8_format": "fp8",
    "fp8_recipe": "fp8_recipe",
    "fp8_margin": "fp8_margin",
    "fp8_amax_history_len": "fp8_amax_history_len",
    "fp8_amax_compute_algo": "fp8_amax_compute_algo",
    "fp8_wgrad": "fp8_wgrad",
    "fp8_dot_product_attention": "fp8_dot_product_attention",
    "tp_only_amax_red": "tp_only_amax_red",
    "first_last_layers_bf16": "first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "num_layers_at_end_in_bf16",
    "fp32_residual_connection": "fp32_residual_connection",
}

#: Flags of the model's layers, and their fields in TransformerConfig.
LAYER_FLAGS: dict[str, str] = {
    **PRECISION_FLAGS,
    "cross_entropy_loss_fusion": "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl": "cross_entropy_fusion_impl",
    "account_for_embedding_in_pipeline_split": "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split": "account_for_loss_in_pipeline_split",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
}

#: Flags of data parallelism, and their fields in DistributedDataParallelConfig.
DATA_PARALLEL_FLAGS: dict[str, str] = {
    "overlap_grad_reduce": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_param_gather",
    "ddp_bucket_size": "bucket_size",
    "ddp_pad_buckets_for_high_nccl_busbw": "pad_buckets_for_high_nccl_busbw",
    "ddp_average_in_collective": "average_in_collective",
    "ddp_reduce_scatter_with_fp32_accumulation": "reduce_scatter_with_fp32_accumulation",
    "check_for_large_grads": "check_for_large_grads",
}

#: Flags of the optimizer, and their fields in OptimizerConfig.
OPTIMIZER_FLAGS: dict[str, str] = {
    "decoupled_lr": "decoupled_lr",
    "decoupled_min_lr": "decoupled_min_lr",
    "loss_scale": "loss_scale",
    "initial_loss_scale": "initial_loss_scale",
    "min_loss_scale": "min_loss_scale",
    "loss_scale_window": "loss_scale_window",
    "hysteresis": "hysteresis",
    "use_precision_aware_optimizer": "use_precision_aware_optimizer",
}


def values_of(options: DataclassInstance, flags: Mapping[str, str]) -> dict[str, Any]:
    """Option values, by field of megatron's dataclass."""
    return {
        field: getattr(options, flag) for flag, field in flags.items() if has_option(options, flag)
    }


def has_option(options: DataclassInstance, name: str) -> bool:
    """Whether options have an option, which some releases of megatron-core may lack."""
    return any(field.name == name for field in dataclasses.fields(options))


@contextmanager
def naming_refusals() -> Iterator[None]:
    """Report values rejected by megatron's configurations as configuration errors.

    Raises:
        ConfigurationError: with megatron's message.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or "it does not say why"
        raise ConfigurationError(
            "the flags", f"megatron-core refuses them: {reason}", "Change what it names"
        ) from error


def _options_class(name: str, doc: str, flags: Mapping[str, str], *sources: str) -> Any:
    known = {field.name: field for source in sources for field in config_fields(source)}
    made = dataclasses.make_dataclass(
        name,
        [
            (flag, Annotated[found.type, tyro.conf.arg(help=found.help)], found.default)
            for flag, field in flags.items()
            if (found := known.get(field)) is not None
        ],
        kw_only=True,
        namespace={"__doc__": doc},
    )
    made.__module__ = __name__  # so that pickle finds it
    return made


LayerFlags = _options_class(
    "LayerFlags", "How layers compute.", LAYER_FLAGS, "TransformerConfig", "ModelParallelConfig"
)
DataParallelFlags = _options_class(
    "DataParallelFlags",
    "How gradients and weights travel.",
    DATA_PARALLEL_FLAGS,
    "DistributedDataParallelConfig",
)
OptimizerFlags = _options_class(
    "OptimizerFlags", "Loss scaling and more.", OPTIMIZER_FLAGS, "OptimizerConfig"
)
