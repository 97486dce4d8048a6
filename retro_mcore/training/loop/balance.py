"""Load-balancing losses of mixtures of experts, in training.

They are computed for each micro batch, over the positions that the training loss counts. What is
minimized is the training loss plus the mean of these losses over micro batches and data parallel
ranks, times their coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from retro_mcore.model.specs import decoder_expert_layers
from retro_mcore.platform.experts import loss_names, routers, take_losses
from retro_mcore.samples.batch import RetroBatch


def uncounted(batch: RetroBatch, whole: RetroBatch) -> Tensor:
    """bool [B, S], True where the training loss does not count a position.

    In a micro batch without any that counts, all of them balance the experts.

    Args:
        batch: A rank's part of a micro batch.
        whole: The micro batch; the same without context parallelism.
    """
    return (batch.loss_mask == 0) & (whole.loss_mask != 0).any()


def weigh_balance(
    stages: Sequence[torch.nn.Module], batches: Iterable[RetroBatch], positions: int
) -> Iterator[RetroBatch]:
    """Set the weight of the losses in this iteration, and return its micro batches.

    `loss.token_mean` multiplies all gradients by positions / tokens at the end, which must not
    scale these losses. So the tokens of all ranks are counted first.

    Args:
        stages: This rank's stages of the model.
        batches: This rank's whole micro batches of the iteration.
        positions: As in `loss.forward_step`.
    """
    read = list(batches)
    ranks = parallel_state.get_data_parallel_group()
    tokens = torch.stack([batch.loss_mask.sum() for batch in read]).sum().to(torch.float64)
    dist.all_reduce(tokens, group=ranks)
    copies = parallel_state.get_data_parallel_world_size()
    weight = (tokens.clamp(min=1) / (positions * copies * len(read))).float()
    for router in routers(stages):
        router.loss_weight = weight
    return iter(read)


def reduce_balance(stages: Sequence[Any], num_microbatches: int) -> dict[str, float]:
    """Means of an iteration's losses over layers, micro batches and data parallel ranks, by name.

    They are without their coefficients: 1 is perfect balance (0 for the z-loss). Empty for dense
    models. All ranks call it.

    Args:
        stages: This rank's stages of the model.
        num_microbatches: Number of micro batches in the iteration.
    """
    config = get_model_config(stages[0])
    names = loss_names(config)
    if not names:
        return {}
    sums = take_losses(stages, names)
    dist.all_reduce(sums)
    copies = parallel_state.get_data_parallel_world_size()
    sums /= len(decoder_expert_layers(config)) * num_microbatches * copies
    return dict(zip(names, sums.tolist(), strict=True))
