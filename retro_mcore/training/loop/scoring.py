"""Compute losses without gradients under any parallel layout, for validation and evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.vocabulary import losses_of_logits
from retro_mcore.platform.context_parallel import gather_parts
from retro_mcore.platform.parallel import unwrap_model
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.loss import masked_loss, own_part, schedule_lengths, sum_over_ranks


@torch.no_grad()
def token_losses(
    stages: Sequence[torch.nn.Module],
    batches: Iterable[RetroBatch],
    vocab_size: int | None = None,
    microbatches_per_step: int = 1,
) -> Iterator[tuple[RetroBatch, Tensor | None]]:
    """Yield the token losses of each batch, with the model in evaluation mode.

    The losses depend neither on padding rows of the embedding nor on the parallel layout.

    Args:
        stages: This rank's stages of the model, on its device.
        batches: The same on every rank of a model; each data parallel rank has its own.
        vocab_size: Size of the tokenizer's vocabulary, over which losses are normalized; None:
            all rows of the model's embedding.
        microbatches_per_step: Number of equally sized batches to run together. More than one
            fills a pipeline; the interleaved schedule needs a multiple of the pipeline's size.

    Yields:
        Each batch and its losses f32 [B, S] in nats, unmasked; None except on the last stage. Every
        context parallel rank gets the losses of whole samples.
    """
    for stage in stages:
        stage.eval()
    config, remaining = get_model_config(stages[0]), iter(batches)
    while step := list(itertools.islice(remaining, microbatches_per_step)):
        length, retrieval = step[0].tokens.shape[1], step[0].retrieved_tokens is not None
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, vocab_size),
            # Every stage reads the step's batches at its own pace.
            data_iterator=[iter(step) for _ in stages],
            model=list(stages),
            num_microbatches=len(step),
            micro_batch_size=len(step[0].tokens),
            forward_only=True,
            **schedule_lengths(config, length, retrieval),
        )
        for number, batch in enumerate(step):
            yield batch, _whole(reports[number]["losses"]) if reports else None


def _whole(losses: Tensor) -> Tensor:
    return gather_parts(losses, 1, parallel_state.get_context_parallel_group())


def _forward_step(
    vocab_size: int | None, batches: Iterator[RetroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Logits on the last stage, and the function that computes losses from them."""
    batch = own_part(next(batches), model)
    reduce = partial(_report, batch, vocab_size, unwrap_model(model))
    return model(**batch.model_inputs()), reduce


def _report(
    batch: RetroBatch, vocab_size: int | None, model: DecoderModel, logits_BSV: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The return value that megatron's schedules expect; only the losses are used here."""
    losses_BS = losses_of_logits(logits_BSV, batch.labels, vocab_size, model)
    return losses_BS.sum(), losses_BS.new_tensor(losses_BS.numel()).int(), {"losses": losses_BS}


def total_loss(
    stages: Sequence[torch.nn.Module],
    batches: Iterable[RetroBatch],
    microbatches_per_step: int = 1,
    vocab_size: int | None = None,
) -> tuple[float, int]:
    """Sum of losses and number of tokens over all batches of all data parallel ranks.

    Ranks may have batches of different number and size. The model's mode (training or evaluation)
    is restored. See `token_losses` for the arguments.
    """
    was_training = stages[0].training
    total = torch.zeros(2, dtype=torch.float64)
    for batch, losses_BS in token_losses(stages, batches, vocab_size, microbatches_per_step):
        if losses_BS is not None:
            total += masked_loss(batch, losses_BS)[2]["sums"].to("cpu", torch.float64)
    if parallel_state.get_context_parallel_rank() > 0:  # the other ranks have the same losses
        total.zero_()
    for stage in stages:
        stage.train(was_training)
    loss_sum, num_tokens, _ = sum_over_ranks(total)
    return loss_sum, int(num_tokens)
