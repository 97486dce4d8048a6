"""Workarounds for how Megatron saves and loads an optimizer's state.

| function                  | releases         | what happens without it                           |
|---------------------------|------------------|---------------------------------------------------|
| `allocate_adam_state`     | 0.16.1 to 0.19.2 | no checkpoint before the first step               |
| `supply_adam_step`        | 0.16.1 to 0.19.2 | such a checkpoint does not load                   |
| `keeping_adam_steps`      | 0.16.1 to 0.19.2 | the distributed optimizer's state does not load   |
| `unshare_adam_steps`      | 0.16.1 to 0.19.2 | Adam steps wrongly after loading, silently        |
| `unpadded_bucket_offsets` | 0.16.1 to 0.19.2 | small models' moments are mixed up, silently      |
| `refuse_infinite_norms`   | 0.16.1 to 0.19.2 | infinite gradients reach the weights              |

The four for Adam concern PyTorch's own, which counts steps per parameter. Megatron is written for
the fused Adams of Transformer Engine and Apex, which count them per group; those are left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from retro_mcore.errors import ConfigurationError


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give Adam zero moments and step 0 where it has not made a step (0.16.1 to 0.19.2).

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


def supply_adam_step(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put step 0 into a loaded state that has none (0.16.1 to 0.19.2).

    Megatron does not save it before the first step, and asks for it all the same.
    """
    parameters = state.get("optimizer", state).get("state")
    if parameters is not None and _torch_adams(optimizer):
        parameters.setdefault("common_step", torch.tensor(0.0))


@contextmanager
def keeping_adam_steps(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While loading, let the distributed optimizer leave the steps alone (0.16.1 to 0.19.2).

    It copies every entry of a parameter's state from the checkpoint, where there is no step:
    steps come from the groups.
    """
    parts = _distributed_parts(optimizer)
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states


def _set_state_but_step(
    part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]
) -> None:
    group, order = part.model_param_group_index_map[parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    own = {"step": state["step"]} if "step" in state else {}
    type(part)._set_main_param_and_optimizer_states(part, parameter, {**own, **tensors})


def unshare_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step counter of its own after loading (0.16.1 to 0.19.2).

    Megatron loads one tensor into all of them, which Adam would advance once per parameter.
    """
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@contextmanager
def unpadded_bucket_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While making sharded state dicts, give parameters their places in the unpadded buffer.

    (0.16.1 to 0.19.2.) The distributed optimizer gathers its state bucket by bucket without the
    buckets' padding, and then cuts parameters out of it at offsets that count the padding. With
    several buckets every parameter behind the first one gets another's state, without an error.
    """
    if not _has_padded_offsets():
        yield
        return
    buffers = [buffer for part in _distributed_parts(optimizer) for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _unpadded_index_map(buffer)
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


@cache
def _has_padded_offsets() -> bool:
    """Whether the installed release has the fault: it is tried on two buckets of one parameter.

    Raises:
        ConfigurationError: the release works otherwise than any that is known.
    """
    parameters = [torch.nn.Parameter(torch.zeros(1, device="cpu")) for _ in range(2)]
    places = {parameters[0]: (0, 1, 0), parameters[1]: (2, 3, 1)}  # one element of padding
    moments = {"exp_avg": torch.tensor([1.0, 2.0, 0.0], device="cpu")}  # as gathered: without it
    optimizer: Any = SimpleNamespace(
        gbuf_ranges=[{torch.float32: []}],
        buffers=[SimpleNamespace(param_index_map=places, numel_unpadded=3)],
        get_parameter_state_dp_zero=lambda **kwargs: {0: {torch.float32: moments}},
    )
    model = {
        name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, 0, 0))
        for name, parameter in zip("ab", parameters, strict=True)
    }
    make = DistributedOptimizer.sharded_param_state_fully_reshardable
    try:
        saved = make(optimizer, model, metadata={})
        return [float(state["exp_avg"].data) for state in saved.values()] != [1.0, 2.0]
    except Exception as error:
        raise ConfigurationError(
            "megatron-core",
            f"its distributed optimizer saves in an unknown way ({error!r})",
            "Install a release from 0.16.1 to 0.19.2",
        ) from error


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


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in _parts(optimizer)]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


class InfiniteNormError(Exception):
    """A gradient norm that is NaN or infinite, before it clips gradients.

    Attributes:
        norm: The norm.
    """

    def __init__(self, norm: float) -> None:
        super().__init__(f"the gradient norm is {norm}")
        self.norm = norm


def refuse_infinite_norms(optimizer: MegatronOptimizer) -> None:
    """Have `optimizer.step` raise before it changes weights by an infinite gradient.

    (0.16.1 to 0.19.2.) Megatron reports the norm only after the step. The method is replaced on
    this optimizer, once; in fp16 a step that overflows does not ask for the norm.

    Raises:
        InfiniteNormError: in `optimizer.step`, with the norm.
    """
    measure = optimizer.get_grad_norm

    def finite_norm() -> Any:
        norm = measure()
        if not math.isfinite(norm):
            raise InfiniteNormError(float(norm))
        return norm

    optimizer.get_grad_norm = finite_norm
