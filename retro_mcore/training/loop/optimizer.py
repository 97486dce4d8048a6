"""Megatron's data parallel wrapper, optimizer and learning rate schedule for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import Float16Module

from retro_mcore.model.config import RetroConfig
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.initialization import SCALED_LEARNING_RATE, learning_rate_scale
from retro_mcore.model.pipeline import (
    EmbeddingGroups,
    create_embedding_groups,
    finalize_model_grads_with,
    synchronize_embedding_copies,
)
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.platform.optimizer_state import mark_decoupled_rates, refuse_infinite_norms
from retro_mcore.platform.other_optimizers import build_matrix_optimizer, initialize_sgd_state
from retro_mcore.platform.torch_optimizers import use_torch_optimizers
from retro_mcore.training.options.megatron import (
    DATA_PARALLEL_FLAGS,
    OPTIMIZER_FLAGS,
    naming_refusals,
    values_of,
)
from retro_mcore.training.options.optimizer import OptimizerOptions
from retro_mcore.training.options.other_optimizers import (
    MATRIX_OPTIMIZERS,
    OtherOptimizerOptions,
)
from retro_mcore.training.setup.plan import TrainingPlan


def share_embeddings(models: Sequence[DecoderModel]) -> EmbeddingGroups:
    """Synchronize the copies of the embedding in a pipeline.

    Returns:
        The groups of ranks that hold the copies, for `build_optimizer`.
    """
    config = models[0].config
    if not isinstance(config, RetroConfig):
        return EmbeddingGroups()
    groups = create_embedding_groups(
        config,
        parallel_state.get_pipeline_model_parallel_group(),
        models[0].share_embeddings_and_output_weights,
    )
    synchronize_embedding_copies(models, groups)
    return groups


def wrap_model(
    model: DecoderModel, plan: TrainingPlan, disable_bucketing: bool = False
) -> DistributedDataParallel:
    """Convert the model to its precision and wrap it in data parallelism."""
    config = model.config
    options = plan.options
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=options.use_distributed_optimizer,
        # As in Megatron, a bf16 model accumulates gradients in fp32.
        grad_reduce_in_fp32=options.bf16 or options.accumulate_allreduce_grads_in_fp32,
        **values_of(options, DATA_PARALLEL_FLAGS),
    )
    module = Float16Module(config, model) if options.bf16 or options.fp16 else model
    return DistributedDataParallel(config, ddp_config, module, disable_bucketing=disable_bucketing)


def build_optimizer(
    stages: Sequence[DistributedDataParallel], groups: EmbeddingGroups, plan: TrainingPlan
) -> MegatronOptimizer:
    """Build the optimizer with megatron's wrappers for precision and the distributed optimizer.

    Also sets the stages' functions that scale and finalize gradients.
    """
    with naming_refusals():
        config = _optimizer_config(plan, stages[0].config.params_dtype)
    if is_cpu_in_use():
        use_torch_optimizers(config)
    if config.optimizer in MATRIX_OPTIMIZERS:
        optimizer = build_matrix_optimizer(config, stages)
    else:
        overrides = _learning_rate_overrides(config, learning_rate_scale(stages[0].config))
        optimizer = get_megatron_optimizer(config, list(stages), config_overrides=overrides)
    mark_decoupled_rates(optimizer.param_groups)
    if config.optimizer == "sgd":
        initialize_sgd_state(optimizer)
    if plan.options.check_for_nan_in_loss_and_grad:
        refuse_infinite_norms(optimizer)
    for stage in stages:
        stage.config.grad_scale_func = optimizer.scale_loss
        stage.config.finalize_model_grads_func = finalize_model_grads_with(groups)
    _overlap(stages, plan)
    return optimizer


def release_functions(stages: Sequence[DistributedDataParallel]) -> None:
    """Unset the functions that `build_optimizer` set, after training.

    They hold the model, the optimizer and their process groups, in cycles that Python does not
    free: the next training in this process would find them in memory still.
    """
    for stage in stages:
        stage.config.grad_scale_func = stage.config.finalize_model_grads_func = None
        stage.config.no_sync_func = stage.config.grad_sync_func = None


def _optimizer_config(plan: TrainingPlan, params_dtype: torch.dtype) -> OptimizerConfig:
    options = plan.options
    return OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=options.bf16,
        fp16=options.fp16,
        fp8_recipe=None if options.fp8_format is None else options.fp8_recipe,
        params_dtype=params_dtype,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
        log_num_zeros_in_grad=options.log_num_zeros_in_grad,
        **values_of(options, OPTIMIZER_FLAGS),
        **_other_optimizers(options),
    )


def _other_optimizers(options: OptimizerOptions) -> dict[str, Any]:
    """Values of the optimizers other than Adam, by the installed megatron's names."""
    values = {each.name: getattr(options, each.name) for each in fields(OtherOptimizerOptions)}
    values["muon_split_qkv"] = not values["muon_no_split_qkv"]
    values["muon_use_nesterov"] = values["muon_nesterov"]  # its name up to 0.17
    values["soap_use_kl_shampoo"] = not values["soap_no_kl_shampoo"]
    known = {each.name for each in fields(OptimizerConfig)}
    return {name: value for name, value in values.items() if name in known}


def _overlap(stages: Sequence[DistributedDataParallel], plan: TrainingPlan) -> None:
    """Set when gradients are reduced: in a pipeline, on all stages at the same time."""
    overlap_in_pipeline = (
        plan.options.overlap_grad_reduce and plan.options.pipeline_model_parallel_size > 1
    )
    no_sync = [stage.no_sync for stage in stages]
    grad_sync = [stage.start_grad_sync for stage in stages]
    for stage in stages:
        stage.config.no_sync_func = no_sync if len(stages) > 1 else no_sync[0]
        if overlap_in_pipeline:
            stage.config.grad_sync_func = grad_sync if len(stages) > 1 else grad_sync[0]


@contextmanager
def gathered_weights(stages: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Context in which every rank holds the weights after the last step.

    With --overlap-param-gather they otherwise arrive only during the next forward pass.
    """
    overlapping = [stage for stage in stages if stage.ddp_config.overlap_param_gather]
    for stage in overlapping:
        stage.disable_forward_pre_hook()
    try:
        yield
    finally:
        for stage in overlapping:
            stage.enable_forward_pre_hook()


def _learning_rate_overrides(config: OptimizerConfig, scale: float) -> dict[Any, Any] | None:
    """muP learning rate for the hidden weights; None for megatron's standard groups."""
    if scale == 1.0:
        return None
    rates: Any = {
        "max_lr": config.lr * scale,
        "min_lr": config.min_lr * scale,
        "lr_mult": scale,  # checkpoints identify the groups by it
    }
    return {
        **get_standard_config_overrides(config),
        ParamKey(attr=SCALED_LEARNING_RATE): ParamGroupOverride(**rates),
    }


def build_scheduler(optimizer: MegatronOptimizer, plan: TrainingPlan) -> OptimizerParamScheduler:
    """Megatron's schedule of learning rate and weight decay, with samples as steps."""
    options, lengths = plan.options, plan.schedule
    decays = options.weight_decay_incr_style != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=lengths.lr_warmup_samples,
        lr_decay_steps=lengths.lr_decay_samples,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.start_weight_decay if decays else options.weight_decay,
        end_wd=options.end_weight_decay if decays else options.weight_decay,
        wd_incr_steps=lengths.wd_incr_samples,
        wd_incr_style=options.weight_decay_incr_style,
        wsd_decay_steps=lengths.lr_wsd_decay_samples,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
        # The checkpoint's, if wanted, is in the options already.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=options.override_opt_param_scheduler,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Learning rate of the next step (except that of embeddings with --decoupled-lr)."""
    groups = [group for group in optimizer.param_groups if group.get("default_config", True)]
    return float(groups[0]["lr"]) if groups else 0.0


def loss_scale(optimizer: MegatronOptimizer) -> float:
    """Factor by which the loss is multiplied; 1 except in fp16."""
    return float(optimizer.get_loss_scale())


def take_step(optimizer: MegatronOptimizer) -> tuple[bool, float, int | None]:
    """Run an optimizer step with this iteration's gradients.

    Returns:
        Whether the weights were updated (not after an fp16 overflow), the gradient norm, and the
        number of zeros in the gradient, if counted.

    Raises:
        InfiniteNormError: the gradient norm is NaN or infinite, with
            --check-for-nan-in-loss-and-grad. The weights are unchanged.
    """
    updated, norm, zeros = optimizer.step()
    return updated, float(norm or 0.0), None if zeros is None else int(zeros)
