"""Saving and loading Adam's state through megatron where its Adam is PyTorch's own.

Megatron is written for the fused Adams of Transformer Engine and Apex, which count steps per group.
PyTorch's counts them per parameter, and several things then go wrong in loading (megatron-core 0.15
to 0.19); each of the first functions mends one, and does nothing to a fused Adam. The last mends
offsets in the distributed optimizer's saved state.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give Adam zero moments and step 0 where it has not made a step.

    Megatron reads them before it loads the real ones, and a checkpoint may be saved before the
    first step (in fp16, while the loss scale is found).
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


@contextmanager
def keeping_adam_steps(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While loading, let the distributed optimizer leave the steps, which come from the groups.

    It copies every entry of a parameter's state from the checkpoint, where there is no step.
    """
    parts = [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states


def supply_adam_step(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put step 0 into a loaded state that has none: megatron does not save it before a step."""
    parameters = state.get("optimizer", state).get("state")
    if parameters is not None and _torch_adams(optimizer):
        parameters.setdefault("common_step", torch.tensor(0.0))


def unshare_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step counter of its own after loading.

    Megatron loads one tensor into all of them, which Adam would advance once per parameter.
    """
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@contextmanager
def unpadded_bucket_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While making sharded state dicts, give parameters their places in the unpadded buffer.

    The distributed optimizer gathers its state bucket by bucket without the buckets' padding, and
    then cuts parameters out of it at offsets that count the padding. With several buckets every
    parameter behind the first one gets another's state, without an error.
    """
    if not _has_padded_offsets():
        yield
        return
    buffers = [
        buffer
        for part in _parts(optimizer)
        if isinstance(part, DistributedOptimizer)
        for buffer in part.buffers
    ]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _unpadded_index_map(buffer)
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _has_padded_offsets() -> bool:
    # Mended upstream after 0.19.2; the faulty code names this issue in a comment.
    source = inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)
    return "issue #504" in source


def _unpadded_index_map(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    ends = list(itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets))
    shifts = [
        end - bucket.numel_unpadded - bucket.offset
        for end, bucket in zip(ends, buffer.buckets, strict=True)
    ]
    return {
        parameter: (start + shifts[bucket], end + shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _set_state_but_step(
    part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]
) -> None:
    group, order = part.model_param_group_index_map[parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    own = {"step": state["step"]} if "step" in state else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, parameter, {**own, **tensors})


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in _parts(optimizer)]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]
