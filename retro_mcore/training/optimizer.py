"""Megatron's data parallel wrapper, optimizer and learning rate schedule for a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from retro_mcore.model.config import RetroConfig
from retro_mcore.model.pipeline import (
    EmbeddingGroups,
    create_embedding_groups,
    finalize_model_grads_with,
    synchronize_embedding_copies,
)
from retro_mcore.training.plan import TrainingPlan


def share_embeddings(models: Sequence[GPTModel]) -> EmbeddingGroups:
    """Give the copies of the embedding that a pipeline holds the same values.

    Returns:
        Who holds them, for `build_optimizer`.
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
    model: GPTModel, plan: TrainingPlan, disable_bucketing: bool = False
) -> DistributedDataParallel:
    """The model in its precision, with gradients averaged over data parallel ranks."""
    config = model.config
    options = plan.options
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=options.use_distributed_optimizer,
        # As Megatron: gradients are summed in fp32 when the model computes in bf16.
        grad_reduce_in_fp32=options.bf16,
    )
    module = Float16Module(config, model) if options.bf16 or options.fp16 else model
    return DistributedDataParallel(config, ddp_config, module, disable_bucketing=disable_bucketing)


def unwrap_model(model: torch.nn.Module) -> GPTModel:
    """The model inside megatron's wrappers."""
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    return model


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], groups: EmbeddingGroups, plan: TrainingPlan
) -> MegatronOptimizer:
    """AdamW in megatron's wrapper for the precision and for the distributed optimizer.

    Also tells the chunks' configurations how to scale and to finish gradients.
    """
    options = plan.options
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=options.bf16,
        fp16=options.fp16,
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    no_sync = [chunk.no_sync for chunk in chunks]
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        chunk.config.finalize_model_grads_func = finalize_model_grads_with(groups)
    return optimizer


def build_scheduler(optimizer: MegatronOptimizer, plan: TrainingPlan) -> OptimizerParamScheduler:
    """Megatron's schedule of learning rate and weight decay; its steps are samples."""
    options, batch = plan.options, plan.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=plan.lr_warmup_samples,
        lr_decay_steps=plan.lr_decay_iters * batch,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=plan.train_iters * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the next step."""
    return float(optimizer.param_groups[0]["lr"])
