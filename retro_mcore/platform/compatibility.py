"""What differs between the releases of megatron-core that one code base serves, 0.16.1 to 0.19.2,
and what has to be mended in all of them. Nothing else in this package asks for a version.

| function                  | releases         | what happens without it                          |
|---------------------------|------------------|--------------------------------------------------|
| `allow_missing_triton`    | 0.18 and later   | importing megatron fails where Triton is missing |
| `async_save_arguments`    | 0.17 and later   | async saving needs nvidia-resiliency-ext         |
| `results_through_a_file`  | 0.16.1 to 0.19.2 | a save runs the user's script again, or hangs    |
| `allocate_adam_state`     | 0.16.1 to 0.19.2 | no checkpoint before the first step              |
| `supply_adam_step`        | 0.16.1 to 0.19.2 | such a checkpoint does not load                  |
| `keeping_adam_steps`      | 0.16.1 to 0.19.2 | the distributed optimizer's state does not load  |
| `unshare_adam_steps`      | 0.16.1 to 0.19.2 | Adam steps wrongly after loading, silently       |
| `unpadded_bucket_offsets` | 0.16.1 to 0.19.2 | small models' moments are mixed up, silently     |
| `mend_output_recomputation` | 0.16.1 to 0.19.2 | recomputing norms needs Transformer Engine     |

The four for Adam concern PyTorch's own, which counts steps per parameter. Megatron is written for
the fused Adams of Transformer Engine and Apex, which count them per group; those are left alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import pickle
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    # At run time only inside the functions: `allow_missing_triton` comes before megatron, and
    # the data pipeline uses this package without it.
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

_TRITON_MODULE = "megatron.core.transformer.moe.paged_stash"


def allow_missing_triton() -> None:
    """Let megatron-core be imported without Triton; before its first import (0.18 and later).

    It imports one module of GPU kernels without asking whether Triton is there. Only an option of
    its mixture of experts calls them; doing so says what is missing.
    """
    if importlib.util.find_spec("triton") is not None or _TRITON_MODULE in sys.modules:
        return
    stub: Any = ModuleType(_TRITON_MODULE)
    stub.__getattr__ = _kernel
    sys.modules[_TRITON_MODULE] = stub


def _kernel(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _needs_triton


def _needs_triton(*args: object, **kwargs: object) -> NoReturn:
    raise ImportError("megatron-core's paged stash needs the package triton")


def async_save_arguments() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` for asynchronous saving by megatron itself.

    From 0.17 on it hands over to nvidia-resiliency-ext unless it is told not to.
    """
    from megatron.core import dist_checkpointing

    arguments: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        arguments["async_strategy"] = "mcore"
    return arguments


@contextmanager
def results_through_a_file() -> Iterator[None]:
    """While a save is prepared, have its writers report through an unnamed file (0.16.1 to 0.19.2).

    Megatron starts a manager process for their queue, by spawning: that runs the user's script
    again unless it has a `__main__` guard, and outlives a killed run. An open file is inherited by
    the forked writer, holds results of any size, and disappears with the processes.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    previous = filesystem_async._results_queue
    filesystem_async._results_queue = _FileQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


class _FileQueue:
    """A queue for one value, from a forked process (or this one) to this one."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is read)

    def put(self, value: object) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        with self._file as results:
            results.seek(0)
            try:
                return pickle.load(results)  # written by this program, into a file without a name
            except EOFError:
                raise queue.Empty from None  # the writer died


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


def _has_padded_offsets() -> bool:
    # Mended upstream after 0.19.2; the faulty code names this issue in a comment.
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

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


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in _parts(optimizer)]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def mend_output_recomputation() -> None:
    """Let megatron discard and recompute a norm's output (`recompute_modules` "layernorm") without
    Transformer Engine; idempotent.

    Its CheckpointWithoutOutput takes its own default, False, for an fp8 recipe, and then asks
    Transformer Engine; from 0.18 on it also compiles a C++ extension to hand a storage over.
    """
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE or getattr(random.CheckpointWithoutOutput, "is_mended", False):
        return
    original: Any = random.CheckpointWithoutOutput.__init__

    def __init__(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    mended: Any = random.CheckpointWithoutOutput
    mended.__init__, mended.is_mended = __init__, True
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage


def _copy_storage(output: Any, recomputed: Any) -> None:
    storage = recomputed.untyped_storage()
    output.untyped_storage().resize_(storage.size())
    output.untyped_storage().copy_(storage)
