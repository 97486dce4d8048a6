"""The random states of a run, as a checkpoint holds them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def sharded_random_state() -> ShardedObject:
    """The states of each tensor and pipeline parallel rank.

    Data and context parallel ranks share theirs, but for the stream that experts' initial weights
    are drawn from, of which the first expert parallel rank's is stored. Training draws nothing
    from it: an expert's layers have no dropout.
    """
    return ShardedObject(
        "rng_state",
        [_random_state()],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on from a state that `sharded_random_state` held."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _random_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 (the global generator is saved)
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
