"""Process groups, model parallel groups, random seeds and the batch calculator of a run."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel

from retro_mcore import distributed
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform import distributed_backend, is_cpu_in_use, leave_model_parallel
from retro_mcore.platform.parallel import expert_parallel_sizes, parallel_sizes
from retro_mcore.time_limit import TRAINING_MINUTES
from retro_mcore.training.loop.batch_sizes import BatchSizes
from retro_mcore.training.options.parallel import ParallelOptions


def initialize_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    timeout_minutes: float = TRAINING_MINUTES,
) -> None:
    """Join the process group and create megatron's groups; existing ones are reused if they fit.

    Raises:
        ConfigurationError: the number of processes is not a multiple of the number per model.
    """
    if not is_cpu_in_use():
        # Required by Megatron to overlap tensor parallel communication with computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    distributed.initialize(distributed_backend(), timeout_minutes)
    world_size = distributed.get_world_size()
    needed = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % needed:
        flag, size = "--tensor-model-parallel-size", f"{tensor_model_parallel_size}"
        for name, value in (
            ("pipeline-model", pipeline_model_parallel_size),
            ("context", context_parallel_size),
        ):
            if value > 1:
                flag += f" x --{name}-parallel-size"
                size += f" x {value}"
        raise ConfigurationError(
            flag,
            f"{size}, but there are {world_size} processes",
            "Start a multiple of it: torchrun --nproc-per-node N tools/…",
        )
    expert_sizes = (
        expert_model_parallel_size,
        expert_tensor_parallel_size or tensor_model_parallel_size,
    )
    check_expert_sizes(*expert_sizes, world_size // pipeline_model_parallel_size)
    sizes = (
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        context_parallel_size,
    )
    if parallel_state.model_parallel_is_initialized():
        if sizes == parallel_sizes() and expert_sizes == expert_parallel_sizes():
            return
        leave_model_parallel()
    limit: dict[str, Any] = {}
    if (timeout := distributed.group_timeout()) is not None:
        limit["distributed_timeout_minutes"] = timeout.total_seconds() / 60
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_sizes[0],
        expert_tensor_parallel_size=expert_sizes[1],
        **limit,
    )


def initialize_layout(options: ParallelOptions, timeout_minutes: float = TRAINING_MINUTES) -> None:
    """`initialize_parallel` for the layout that options choose."""
    initialize_parallel(
        options.tensor_model_parallel_size,
        options.pipeline_model_parallel_size,
        options.num_virtual_stages_per_pipeline_rank,
        options.context_parallel_size,
        options.expert_model_parallel_size,
        options.expert_tensor_parallel_size,
        timeout_minutes,
    )


def check_expert_sizes(experts: int, tensor: int, processes: int) -> None:
    """Reject experts that do not divide over the processes of a pipeline stage.

    Raises:
        ConfigurationError: naming --expert-model-parallel-size.
    """
    if processes % (experts * tensor):
        raise ConfigurationError(
            "--expert-model-parallel-size",
            f"{experts}, with each expert on {tensor} processes, but a pipeline stage has "
            f"{processes}",
            "Choose a divisor, or start more processes",
        )


def set_seeds(seed: int) -> None:
    """Seed all generators; tensor parallel ranks get separate dropout streams.

    Raises:
        ConfigurationError: the seed is not positive (Megatron's own condition).
    """
    if seed <= 0:
        raise ConfigurationError("--seed", str(seed), "Choose a positive seed")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries below us draw from the global generator)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def set_batch_sizes(sizes: BatchSizes, micro_batch_size: int) -> int:
    """Set megatron's batch sizes; returns micro batches per iteration after the ramp.

    Raises:
        ConfigurationError: a batch is not divisible into micro batches on all ranks, or, in the
            interleaved schedule, into groups of the pipeline's size.
    """
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    for size in sizes.sizes:
        if size % (micro_batch_size * data_parallel_size):
            raise ConfigurationError(
                "--micro-batch-size",
                f"{micro_batch_size} on {data_parallel_size} data parallel processes, for a "
                f"global batch of {size}",
                "The global batch (with --rampup-batch-size each of its sizes) must be a multiple "
                "of their product",
            )
        _check_interleaved(size // (micro_batch_size * data_parallel_size))
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        distributed.get_rank(),
        None,  # the trainer uses BatchSizes
        sizes.global_batch_size,
        micro_batch_size,
        data_parallel_size,
    )
    return sizes.global_batch_size // (micro_batch_size * data_parallel_size)


def _check_interleaved(num_microbatches: int) -> None:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if virtual is not None and num_microbatches % stages:
        raise ConfigurationError(
            "--num-virtual-stages-per-pipeline-rank",
            f"{virtual}, with {num_microbatches} micro batches per iteration on {stages} stages",
            "Choose a smaller --micro-batch-size, so that their number is a multiple of the stages",
        )
