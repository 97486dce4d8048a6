"""What Megatron says of its parallel groups and puts around a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

import retro_mcore.platform.groups  # noqa: F401 (ends the threads of groups at exit)
from retro_mcore.platform.context_parallel import ContextPart


def unwrap_model(model: torch.nn.Module) -> Any:
    """The model inside megatron's wrappers."""
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    return model


#: Where Megatron's modules and configurations say that a rank holds a part of each sequence.
_SEQUENCE_PARALLEL = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)


@contextmanager
def whole_sequences(model: torch.nn.Module) -> Iterator[None]:
    """A mode of the model without sequence parallelism, for steps of one token.

    It is entered around all forward passes of a generation. (Megatron's own
    `set_model_to_sequence_parallel` leaves out configurations other than the model's, and so the
    neighbor encoder's.)
    """
    owners = {
        id(owner): owner
        for module in model.modules()
        for owner in (module, vars(module).get("config"))
    }
    changed = [
        (owner, name)
        for owner in owners.values()
        for name in _SEQUENCE_PARALLEL
        if getattr(owner, name, None) is True
    ]
    for owner, name in changed:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)


def model_parallel_group(model: Any) -> dist.ProcessGroup | None:
    """The ranks that share one copy of the model: tensor and pipeline parallel.

    A collection of process groups holds only those that it was made with.
    """
    groups = model.pg_collection
    return getattr(groups, "mp", None) or groups.tp


def expert_parallel_sizes() -> tuple[int, int]:
    """Expert parallel and expert tensor parallel sizes of megatron's groups."""
    return (
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )


def parallel_sizes() -> tuple[int, int, int | None, int]:
    """Tensor, pipeline, virtual pipeline and context parallel sizes of megatron's groups."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def context_part() -> ContextPart:
    """The part of every sequence that this rank holds."""
    return ContextPart(
        parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    )
