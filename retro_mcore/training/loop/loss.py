"""The training loss over the loss mask, in the form that Megatron's schedules need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from retro_mcore.errors import RetroError
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.pipeline import schedule_kwargs
from retro_mcore.samples.batch import RetroBatch

#: What a micro batch reports: [sum of losses, number of tokens] (float32) and its samples.
LossReport = dict[str, Any]


class NonFiniteLossError(RetroError):
    """Loss or gradient became NaN or infinite; the weights have not been updated with it."""


def forward_step(
    positions: int, batches: Iterator[RetroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """One forward pass, in the form that megatron's forward-backward functions call.

    Args:
        positions: Of this rank in this iteration, masked ones included; the loss is divided by it.
        batches: Its micro batches.
        model: A stage.

    Returns:
        The losses [B, S] and a function that reduces them.
    """
    batch = next(batches)
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    return losses_BS, partial(_share_of_loss, positions, batch)


def _share_of_loss(
    positions: int, batch: RetroBatch, losses_BS: Tensor
) -> tuple[Tensor, Tensor, LossReport]:
    loss, num_tokens, report = masked_loss(batch, losses_BS)
    return loss / positions, num_tokens, report


def masked_loss(batch: RetroBatch, losses_BS: Tensor) -> tuple[Tensor, Tensor, LossReport]:
    """Sum over the loss mask, number of tokens, and both for the report, as Megatron wants them."""
    mask = batch.loss_mask.view(-1)
    loss = torch.sum(losses_BS.float().view(-1) * mask)
    num_tokens = mask.sum()
    report = {
        "sums": torch.stack([loss.detach(), num_tokens]),
        "sample_ids": batch.sample_ids,
    }
    return loss, num_tokens.to(torch.int), report


@contextmanager
def token_mean(config: ModelParallelConfig, positions: int) -> Iterator[None]:
    """While the body runs, gradients are those of the mean over the global batch's tokens.

    Micro batches and ranks may hold different numbers of tokens that count in the loss, so no
    average of their averages will do. Each contributes its sum, over a number of positions that
    is the same for all (which keeps float16's gradients in their range); when the ranks' gradients
    have been averaged, they are multiplied by positions over tokens: by 1 where every position
    counts.

    Args:
        config: Of the first chunk; its `finalize_model_grads_func` finishes the gradients.
        positions: See `forward_step`.
    """
    finalize, per_token = config.finalize_model_grads_func, config.calculate_per_token_loss
    # Then megatron's schedules leave the loss alone and count the tokens.
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize and partial(
        _finalize_token_mean, finalize, positions
    )
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        config.calculate_per_token_loss = per_token


def _finalize_token_mean(
    finalize: Callable,
    positions: int,
    chunks: Sequence[Any],
    num_tokens: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    finalize(chunks, None, *args, **kwargs)
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    last = parallel_state.get_pipeline_model_parallel_last_rank()  # it alone has counted
    total = num_tokens.to(torch.float64)
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(total, group=ranks)
    factor = positions * ranks.size() / total.clamp(min=1)
    for chunk in chunks:
        chunk.scale_gradients(factor)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[RetroBatch],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    with_retrieval: bool,
) -> list[LossReport]:
    """Run micro batches through megatron's forward-backward function.

    Gradients are those of the mean over the tokens of all micro batches and data parallel ranks
    that the loss masks let count, however these are divided.

    Args:
        chunks: This rank's stages of the model.
        batches: The same on every stage; `num_microbatches` are taken.
        num_microbatches: Of this step.
        sequence_length: S.
        micro_batch_size: B.
        with_retrieval: Whether the batches hold retrieved tokens.

    Returns:
        The micro batches' reports on the last pipeline stage, nothing on the others.
    """
    config = get_model_config(chunks[0])
    positions = num_microbatches * micro_batch_size * sequence_length
    # Every chunk reads the step's batches, each at its own pace.
    iterators = itertools.tee(itertools.islice(batches, num_microbatches), len(chunks))
    with token_mean(config, positions):
        reports = get_forward_backward_func()(
            forward_step_func=partial(forward_step, positions),
            data_iterator=list(iterators),
            model=list(chunks),
            num_microbatches=num_microbatches,
            micro_batch_size=micro_batch_size,
            forward_only=False,
            **schedule_lengths(config, sequence_length, with_retrieval),
        )
    return reports


def schedule_lengths(
    config: ModelParallelConfig, sequence_length: int, with_retrieval: bool
) -> dict[str, Any]:
    """Lengths of what crosses pipeline stages, for megatron's forward-backward functions."""
    if isinstance(config, RetroConfig):
        return schedule_kwargs(config, sequence_length, with_retrieval)
    return {"seq_length": sequence_length}


@dataclass(frozen=True)
class StepLoss:
    """What all ranks know of an iteration's losses.

    Attributes:
        loss: Mean per token over all micro batches and data parallel ranks.
        stop: How many ranks want to stop.
    """

    loss: float
    stop: int


def reduce_losses(reports: Sequence[LossReport], stop: bool = False) -> StepLoss:
    """Losses and wishes to stop of all ranks, in one reduction.

    Args:
        reports: This rank's micro batches' (none but on a last stage).
        stop: Whether this rank wants to stop.
    """
    device = torch.cuda.current_device()
    zeros = torch.zeros(2, dtype=torch.float64, device=device)
    sums = sum((report["sums"] for report in reports), zeros)
    loss_sum, num_tokens, stops = sum_over_ranks(sums, float(stop))
    return StepLoss(loss_sum / max(num_tokens, 1.0), int(stops))


def sum_over_ranks(sums: Tensor, every: float = 0.0) -> list[float]:
    """[sum of losses, number of tokens], which last stages have, and a number of every rank."""
    total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others have the same
        total[:2] = sums
    total[2] = every
    dist.all_reduce(total)
    return total.tolist()


def check_finite(reports: Sequence[LossReport], loss: float, iteration: int) -> None:
    """Stop at a loss that is NaN or infinite.

    Raises:
        NonFiniteLossError: on every rank, naming the samples.
    """
    if math.isfinite(loss):
        return
    suspects = [report for report in reports if not torch.isfinite(report["sums"][0])]
    raise non_finite("loss", loss, samples_of(suspects), iteration)


def non_finite(what: str, value: float, samples: Sequence[int], iteration: int) -> RetroError:
    """The error for it, which every rank makes together.

    Args:
        what: "loss" or "gradient norm".
        value: NaN or infinity.
        samples: Of this rank, that it may come from.
        iteration: The iteration.
    """
    return NonFiniteLossError(
        f"iteration {iteration}",
        f"the {what} is {value} on samples {samples_of_all_ranks(samples)}",
        "Look at these samples; lower --lr, or lengthen the warmup; resume from the last "
        "checkpoint",
    )


def samples_of_all_ranks(samples: Sequence[int]) -> list[int]:
    """The samples that any rank names, in order."""
    gathered: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(samples))
    return sorted({sample for part in gathered for sample in part})


def samples_of(reports: Sequence[LossReport]) -> list[int]:
    """The samples of this rank's micro batches."""
    return [sample for report in reports for sample in report["sample_ids"]]
