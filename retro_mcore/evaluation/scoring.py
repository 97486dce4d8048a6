"""Losses of single tokens under any layout, and sums that no number of ranks changes.

Batches are the same on any number of data parallel ranks, which take them in turn. Each sample's
(or chunk's) sum lands in its own place of one array, and the array is summed over the ranks, so
nothing depends on who computed what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from retro_mcore.distributed import get_world_size
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.pipeline import schedule_kwargs
from retro_mcore.model.vocabulary import losses_of_logits
from retro_mcore.training.loop.batch import RetroBatch


@torch.no_grad()
def token_losses(
    model: torch.nn.Module, batches: Iterable[RetroBatch], vocab_size: int | None = None
) -> Iterator[tuple[RetroBatch, np.ndarray | None]]:
    """The losses of each batch's tokens.

    Args:
        model: This rank's stage of the model, on its device; it is put into evaluation mode.
        batches: The same on every rank of a model; data parallel ranks have their own.
        vocab_size: The tokenizer's, over which the losses are; None: every row of the model's.

    Yields:
        Each batch and its losses f64 [B, S] in nats, unmasked; None but on the last stage.
    """
    config = get_model_config(model)
    model.eval()
    for batch in batches:
        lengths: dict[str, Any] = {"seq_length": batch.tokens.shape[1]}
        if isinstance(config, RetroConfig):
            retrieval = batch.retrieved_tokens is not None
            lengths = schedule_kwargs(config, batch.tokens.shape[1], retrieval)
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, vocab_size),
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            micro_batch_size=len(batch.tokens),
            forward_only=True,
            **lengths,
        )
        yield batch, reports[0]["losses"].double().cpu().numpy() if reports else None


def _forward_step(
    vocab_size: int | None, batches: Iterator[RetroBatch], model: GPTModel
) -> tuple[Tensor, Any]:
    """Logits on the last stage, and what makes losses of them."""
    batch = next(batches)
    return model(**batch.model_inputs()), partial(_report, batch, vocab_size, model)


def _report(
    batch: RetroBatch, vocab_size: int | None, model: GPTModel, logits_BSV: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """In the form that megatron's schedules want; the losses alone matter here."""
    losses_BS = losses_of_logits(logits_BSV, batch.labels, vocab_size, model)
    return losses_BS.sum(), losses_BS.new_tensor(losses_BS.numel()).int(), {"losses": losses_BS}


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
