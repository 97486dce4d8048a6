"""The loss over the loss mask: as Megatron's schedules want it, and summed over a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from retro_mcore.errors import RetroError
from retro_mcore.training.batch import RetroBatch

#: What a micro batch reports: [sum of losses, number of tokens] (float32) and its samples.
LossReport = dict[str, Any]


class NonFiniteLossError(RetroError):
    """The loss became NaN or infinite; the weights have not been updated with it."""


def forward_step(batches: Iterator[RetroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """One forward pass, in the form that megatron's forward-backward functions call.

    Returns:
        The losses [B, S] and a function that reduces them.
    """
    batch = next(batches)
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    return losses_BS, partial(masked_loss, batch)


def masked_loss(batch: RetroBatch, losses_BS: Tensor) -> tuple[Tensor, Tensor, LossReport]:
    """Sum over the loss mask and number of tokens.

    The schedule divides the first by the second, then by the number of micro batches; the average
    over data parallel ranks is DistributedDataParallel's.
    """
    mask = batch.loss_mask.view(-1)
    loss = torch.sum(losses_BS.float().view(-1) * mask)
    num_tokens = mask.sum()
    report = {
        "sums": torch.stack([loss.detach(), num_tokens]),
        "sample_ids": batch.sample_ids,
    }
    return loss, num_tokens.to(torch.int), report


def forward_backward(
    model: torch.nn.Module,
    batches: Iterator[RetroBatch],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[LossReport]:
    """Run micro batches through megatron's forward-backward function; returns their reports."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=sequence_length,
        forward_only=forward_only,
    )


def mean_loss(reports: Sequence[LossReport], iteration: int) -> float:
    """Mean loss per token over micro batches and data parallel ranks.

    Raises:
        NonFiniteLossError: on every rank, naming the samples.
    """
    sums = torch.stack([report["sums"] for report in reports])
    total = sums.sum(dim=0)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(total, group=group)
    loss = (total[0] / total[1].clamp(min=1)).item()
    if loss - loss != 0:  # NaN or infinite
        suspects = [
            sample
            for report in reports
            if not torch.isfinite(report["sums"][0])
            for sample in report["sample_ids"]
        ]
        _raise_non_finite(loss, suspects, iteration, group)
    return loss


def _raise_non_finite(
    loss: float, suspects: list[int], iteration: int, group: dist.ProcessGroup
) -> None:
    gathered: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, suspects, group=group)
    samples = sorted(sample for part in gathered for sample in part)
    raise NonFiniteLossError(
        f"iteration {iteration}",
        f"the loss is {loss} on samples {samples}",
        "Look at these samples; lower --lr, or lengthen the warmup; resume from the last "
        "checkpoint",
    )


@torch.no_grad()
def total_loss(model: torch.nn.Module, batches: Iterable[RetroBatch]) -> tuple[float, int]:
    """Summed loss and number of tokens over all batches of all data parallel ranks.

    The ranks' batches may differ in number and size. The model is put back into the mode
    (training or evaluation) that it came in.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        [report] = forward_backward(
            model, iter([batch]), 1, batch.tokens.shape[1], len(batch.sample_ids), forward_only=True
        )
        total += report["sums"].to("cpu", torch.float64)
    model.train(was_training)
    total = total.to(torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total[0].item(), int(total[1].item())
