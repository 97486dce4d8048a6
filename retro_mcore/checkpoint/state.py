"""The state of a run in megatron's sharded form, for saving it and for loading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from retro_mcore.checkpoint.random_state import sharded_random_state
from retro_mcore.platform.optimizer_state import (
    allocate_adam_state,
    sharded_squares,
    unpadded_bucket_offsets,
    without_squares,
)
from retro_mcore.platform.other_optimizers import allocate_sgd_state
from retro_mcore.platform.parallel import unwrap_model

# How megatron lays out the state: in the shapes of the parameters, so that a checkpoint loads into
# any layout. Layers with cross-attention have parameters that others lack: non-homogeneous.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}


#: What is square in SOAP's state, beside the optimizer's.
SQUARES = "optimizer_squares"


@dataclass
class TrainingProgress:
    """How far a run has come.

    Attributes:
        iteration: Optimizer steps taken (or skipped for an overflow in fp16).
        consumed_samples: Training samples seen; the position in the data.
    """

    iteration: int = 0
    consumed_samples: int = 0


@dataclass
class TrainingParts:
    """What a checkpoint holds the state of."""

    stages: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def state_dict(
    parts: TrainingParts, is_loading: bool, optimizer: bool = True, random_state: bool = True
) -> dict[str, Any]:
    state: dict[str, Any] = {
        model_key(index, parts.stages): unwrap_model(stage).sharded_state_dict(metadata=METADATA)
        for index, stage in enumerate(parts.stages)
    }
    if optimizer:
        allocate_adam_state(parts.optimizer)
        allocate_sgd_state(parts.optimizer)
        model_state = dict(state)
        with unpadded_bucket_offsets(parts.optimizer), without_squares(parts.optimizer) as squares:
            state["optimizer"] = parts.optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=METADATA
            )
        if squares:
            state[SQUARES] = sharded_squares(parts.optimizer, parts.stages, model_state, squares)
    if random_state:
        state["rng_state"] = sharded_random_state()
    return state


def model_key(index: int, stages: Sequence[object]) -> str:
    """As Megatron names them: `model`, or `model0`, `model1`, … in the interleaved schedule."""
    return "model" if len(stages) == 1 else f"model{index}"


#: What megatron and torch raise for a checkpoint; the latter's is no Exception.
FAILURES = (Exception, CheckpointException)


def reason_of(error: BaseException) -> str:
    """An error in one line: its kind and what it says first."""
    if isinstance(error, CheckpointException):
        for inner, _ in error.failures.values():
            return reason_of(inner)
        return "see the errors of the other ranks"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
