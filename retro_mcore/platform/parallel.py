"""What Megatron says of its parallel groups and puts around a model."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module


def unwrap_model(model: torch.nn.Module) -> GPTModel:
    """The model inside megatron's wrappers."""
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    return model


def parallel_sizes() -> tuple[int, int, int | None]:
    """Tensor, pipeline and virtual pipeline parallel sizes of megatron's groups."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
