"""The forward step for Megatron-Bridge's `pretrain()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from megatron.bridge.training.state import GlobalState
from torch import Tensor

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
    batch = get_batch(data_iterator, not state.cfg.model.arguments["no_retrieval"])
    state.timers("batch-generator").stop()
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    check = state.cfg.rerun_state_machine.check_for_nan_in_loss
    return losses_BS, partial(loss_of_batch, check, batch)
