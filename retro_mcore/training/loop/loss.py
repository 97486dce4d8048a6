"""The masked training loss, in the form that Megatron's schedules expect."""

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
from retro_mcore.platform.parallel import context_part
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.balance import uncounted, weigh_balance
from retro_mcore.training.loop.stragglers import Stopwatch

#: Report of a micro batch: [sum of losses, number of tokens] (float32) and its samples.
LossReport = dict[str, Any]


class NonFiniteLossError(RetroError):
    """The loss or gradient became NaN or infinite; the weights were not updated with it."""


def forward_step(
    positions: int, batches: Iterator[RetroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Run one forward pass; called by megatron's forward-backward functions.

    Args:
        positions: Number of positions on this rank in this iteration, masked ones included. The
            loss is divided by it.
        batches: This rank's micro batches.
        model: A pipeline stage.

    Returns:
        The losses [B, S] and a function that reduces them.
    """
    whole = next(batches)
    batch = own_part(whole, model)
    inputs = batch.model_inputs()
    if get_model_config(model).num_moe_experts is not None:
        inputs["padding_mask"] = uncounted(batch, whole)
    losses_BS = model(**inputs, labels=batch.labels)
    return losses_BS, partial(_share_of_loss, positions, batch)


def own_part(batch: RetroBatch, model: torch.nn.Module) -> RetroBatch:
    """The part of a batch that this context parallel rank computes; all of it on a single one."""
    chunk_length = getattr(get_model_config(model), "retro_chunk_length", None)
    return batch.part(context_part(), chunk_length)


def share_of_tokens(part: RetroBatch, whole: RetroBatch) -> Tensor | float:
    """A context parallel rank's tokens that count ÷ the mean of the ranks.

    Megatron's schedules divide each rank's loss by the rank's own number, at least 1, and gradients
    are the mean over ranks. Times this, they are those of the mean over the samples' tokens.

    Args:
        part: The rank's part.
        whole: The batch that it is cut from.
    """
    if part is whole:
        return 1.0
    own, all_of_them = (each.loss_mask.sum().clamp(min=1) for each in (part, whole))
    return own * whole.tokens.numel() / (all_of_them * part.tokens.numel())


def _share_of_loss(
    positions: int, batch: RetroBatch, losses_BS: Tensor
) -> tuple[Tensor, Tensor, LossReport]:
    loss, num_tokens, report = masked_loss(batch, losses_BS)
    return loss / positions, num_tokens, report


def masked_loss(batch: RetroBatch, losses_BS: Tensor) -> tuple[Tensor, Tensor, LossReport]:
    """Masked sum of the losses, number of tokens, and both for the report, as Megatron expects."""
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
    """Context in which gradients are those of the mean loss over the global batch's tokens.

    Micro batches and ranks may differ in the number of tokens that count, so their means cannot be
    averaged. Each contributes its sum divided by the same number of positions, which keeps float16
    gradients in range. After the gradients are averaged over ranks, they are multiplied by
    positions / tokens. This factor is 1 if every position counts.

    Args:
        config: Configuration of the first virtual stage; its `finalize_model_grads_func` finishes
            the gradients.
        positions: See `forward_step`.
    """
    finalize, per_token = config.finalize_model_grads_func, config.calculate_per_token_loss
    # With this, megatron's schedules do not scale the loss, and count the tokens.
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
    stages: Sequence[Any],
    num_tokens: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    finalize(stages, None, *args, **kwargs)
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    last = parallel_state.get_pipeline_model_parallel_last_rank()  # only it has counted
    total = num_tokens.to(torch.float64)
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(total, group=ranks)
    factor = positions * ranks.size() / total.clamp(min=1)
    for stage in stages:
        stage.scale_gradients(factor)


def forward_backward(
    stages: Sequence[torch.nn.Module],
    batches: Iterator[RetroBatch],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    with_retrieval: bool,
    stopwatch: Stopwatch | None = None,
) -> list[LossReport]:
    """Run micro batches through megatron's forward-backward function.

    Gradients are those of the mean loss over all unmasked tokens of all micro batches and data
    parallel ranks, however these are divided.

    Args:
        stages: This rank's stages of the model.
        batches: Micro batches, the same on every stage; `num_microbatches` are consumed.
        num_microbatches: Number of micro batches in this step.
        sequence_length: S.
        micro_batch_size: B.
        with_retrieval: Whether the batches contain retrieved tokens.
        stopwatch: Times reading and forward passes.

    Returns:
        The micro batches' reports on the last pipeline stage, an empty list on the others.
    """
    config = get_model_config(stages[0])
    positions = num_microbatches * micro_batch_size * sequence_length
    positions //= parallel_state.get_context_parallel_world_size()
    batches = itertools.islice(batches, num_microbatches)
    step: Callable = partial(forward_step, positions)
    if stopwatch is not None:
        batches, step = stopwatch.read(batches), stopwatch.forward(step)
    if config.num_moe_experts is not None:
        batches = weigh_balance(stages, batches, positions)
    # Every virtual stage reads the step's batches at its own pace.
    iterators = itertools.tee(batches, len(stages))
    with token_mean(config, positions):
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=list(iterators),
            model=list(stages),
            num_microbatches=num_microbatches,
            micro_batch_size=micro_batch_size,
            forward_only=False,
            **schedule_lengths(config, sequence_length, with_retrieval),
        )
    return reports


def schedule_lengths(
    config: ModelParallelConfig, sequence_length: int, with_retrieval: bool
) -> dict[str, Any]:
    """Arguments of megatron's forward-backward functions: lengths of the tensors between stages."""
    if isinstance(config, RetroConfig):
        return schedule_kwargs(config, sequence_length, with_retrieval)
    return {"seq_length": sequence_length}


@dataclass(frozen=True)
class StepLoss:
    """An iteration's loss over all ranks.

    Attributes:
        loss: Mean per token over all micro batches, data and context parallel ranks.
        num_tokens: Number of tokens that the loss counts.
        stop: Number of ranks that want to stop.
    """

    loss: float
    num_tokens: int
    stop: int


def reduce_losses(reports: Sequence[LossReport], stop: bool = False) -> StepLoss:
    """Reduce losses and stop requests of all ranks, in one reduction.

    Args:
        reports: Reports of this rank's micro batches (empty except on a last stage).
        stop: Whether this rank wants to stop.
    """
    device = torch.cuda.current_device()
    zeros = torch.zeros(2, dtype=torch.float64, device=device)
    sums = sum((report["sums"] for report in reports), zeros)
    loss_sum, num_tokens, stops = sum_over_ranks(sums, float(stop))
    return StepLoss(loss_sum / max(num_tokens, 1.0), int(num_tokens), int(stops))


def sum_over_ranks(sums: Tensor, every: float = 0.0) -> list[float]:
    """Sum over ranks: [sum of losses, number of tokens] of last stages, and a number per rank."""
    total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the other ranks have the same values
        total[:2] = sums
    total[2] = every
    dist.all_reduce(total)
    return total.tolist()


def check_finite(reports: Sequence[LossReport], loss: float, iteration: int) -> None:
    """Reject a loss that is NaN or infinite.

    Raises:
        NonFiniteLossError: the loss is not finite. Raised on every rank; names the samples.
    """
    if math.isfinite(loss):
        return
    suspects = [report for report in reports if not torch.isfinite(report["sums"][0])]
    raise non_finite("loss", loss, samples_of(suspects), iteration)


def non_finite(what: str, value: float, samples: Sequence[int], iteration: int) -> RetroError:
    """The error for a non-finite value. All ranks must call this together.

    Args:
        what: "loss" or "gradient norm".
        value: NaN or infinity.
        samples: This rank's samples that may have caused it.
        iteration: The iteration.
    """
    return NonFiniteLossError(
        f"iteration {iteration}",
        f"the {what} is {value} on samples {samples_of_all_ranks(samples)}",
        "Look at these samples; lower --lr, or lengthen the warmup; resume from the last "
        "checkpoint",
    )


def samples_of_all_ranks(samples: Sequence[int]) -> list[int]:
    """The union of all ranks' samples, sorted."""
    gathered: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(samples))
    return sorted({sample for part in gathered for sample in part})


def samples_of(reports: Sequence[LossReport]) -> list[int]:
    """The samples of this rank's micro batches."""
    return [sample for report in reports for sample in report["sample_ids"]]
