"""Sums over ranks that do not depend on the number of ranks.

Batches are the same on any number of data parallel ranks, which take them in turn. Each sample's
(or chunk's) sum has its own place in one array, and the array is summed over the ranks, so nothing
depends on which rank computed it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from retro_mcore.distributed import get_world_size


def sum_over_model_ranks(array: np.ndarray) -> np.ndarray:
    """The sum of an f64 array over data parallel ranks; only last pipeline stages hold values."""
    total = torch.from_numpy(array).to(torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total.cpu().numpy()


def sum_over_world(array: np.ndarray) -> np.ndarray:
    """The sum of an array of numbers over all ranks."""
    if get_world_size() == 1:
        return array
    total = torch.from_numpy(array).to(torch.cuda.current_device())
    dist.all_reduce(total)
    return total.cpu().numpy()
