"""The forward step for Megatron-Bridge's `pretrain()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from megatron.bridge.training.state import GlobalState
from megatron.core.utils import get_model_config
from torch import Tensor

from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.loss import own_part, share_of_tokens
from retro_mcore.training.providers import get_batch, loss_of_batch


def forward_step(
    state: GlobalState, data_iterator: Iterator[Mapping[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Run a forward pass. Returns the losses [B, S] and the function that reduces them.

    Args:
        state: The run; Bridge passes it.
        data_iterator: Yields micro batches of `RetroDatasetProvider`.
        model: The wrapped model.
    """
    state.timers("batch-generator", log_level=2).start()
    whole = get_batch(data_iterator, not state.cfg.model.arguments["no_retrieval"])
    batch = own_part(whole, model)
    state.timers("batch-generator").stop()
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    check = state.cfg.rerun_state_machine.check_for_nan_in_loss
    summed = get_model_config(model).calculate_per_token_loss
    share = 1.0 if summed else share_of_tokens(batch, whole)
    return losses_BS, partial(_loss, check, batch, share)


def _loss(
    check: bool, batch: RetroBatch, share: Tensor | float, losses_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, num_tokens, report = loss_of_batch(check, batch, losses_BS)
    return loss * share, num_tokens, report
