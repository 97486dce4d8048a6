"""One rank of any world, simulated in this process: tensors have shapes but no values.

PyTorch's fake tensors stand for real ones, and its fake process group for the other ranks: nothing
is computed or sent. Where a program asks for a value, it gets one: whole numbers that follow from
shapes and constants (`known_values`); otherwise True, or 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from retro_mcore.distributed import leave
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.known_values import forget_value, pass_on, set_value, sum_of, value_of
from retro_mcore.platform.tracking import Tracker
from retro_mcore.platform.windows import forget_masks

_ATEN = torch.ops.aten


class SimulatedTracker(Tracker):
    """A tracker of fake tensors. It answers what they cannot.

    Raises:
        ConfigurationError: an operation has a result whose shape depends on values that are not
            known, or a program asks for such a whole number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[int, float] = {}

    def answer(self, tensor: Tensor, value: float) -> None:
        """Give a number for a tensor's value from now on, in place of 1."""
        self._values[tensor.untyped_storage()._cdata] = value

    def write(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        """Know a tensor's value from now on."""
        set_value(tensor, compute)

    def run(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on fake tensors, or answer it."""
        if func.namespace == "c10d":
            return self._sent(func, args)
        if func is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func is _ATEN.equal.default:
            return True
        if func is _ATEN.masked_select.default:
            chosen = sum_of(args[1])
            if chosen is not None:
                return args[0].new_empty(chosen)
        try:
            result = func(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            raise _unknown(f"{func} has a result that depends") from error
        pass_on(func, args, kwargs, result)
        return result

    def _sent(self, func: Any, args: tuple) -> Any:
        """What a collective returns. The other ranks have the values that this one has."""
        gathered = value_of(args[1]) if func._opname == "_allgather_base_" else None
        for written in tree_leaves(args[0]) if func._opname != "broadcast_" else ():
            forget_value(written)
        if gathered is not None:
            copies = args[0].numel() // args[1].numel()
            self.write(args[0], lambda: torch.cat([gathered()] * copies))
        work = FakeWork().boxed()  # done already
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _value(self, tensor: FakeTensor) -> float | bool:
        known = sum_of(tensor)
        if known is not None:
            return bool(known) if tensor.dtype == torch.bool else known
        if tensor.constant is not None:
            return tensor.constant.item()
        if tensor.dtype == torch.bool:
            return True
        if not tensor.dtype.is_floating_point:
            raise _unknown("a whole number is asked for that depends")
        return self._values.get(tensor.untyped_storage()._cdata, 1.0)


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        "--simulate",
        f"{what} on values, and a simulation has none",
        "Leave out the option that needs it, or --simulate",
    )


@contextmanager
def simulated_rank(rank: int, world_size: int) -> Iterator[SimulatedTracker]:
    """Be a rank of a world of any size; inside, all new tensors are fake.

    Megatron's groups are created inside, before `fake_tensors`. They are left at the end.

    Args:
        rank: The rank.
        world_size: Number of ranks.

    Raises:
        ConfigurationError: this process already belongs to a group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigurationError(
            "--simulate",
            f"this process is one of {dist.get_world_size()} already",
            "Start it alone, without torchrun",
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    state = torch.get_rng_state()
    forget_masks()  # fake ones must not stay, nor real ones go uncounted
    try:
        with _stand_ins():
            yield SimulatedTracker()
    finally:
        torch.set_rng_state(state)
        forget_masks()
        leave()


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Context in which some of torch's functions do what a lone process with fake tensors can."""
    new_group, make, copy_storage = dist.new_group, torch.tensor, torch.UntypedStorage.copy_
    all_reduce = dist.all_reduce

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})  # Megatron's gloo groups, too

    def gather_own(values: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
        values[:] = [value] * len(values)

    def reduce_equal(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        value, work = value_of(tensor), all_reduce(tensor, op, *args, **kwargs)
        if value is not None and op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            group = args[0] if args else kwargs.get("group")
            times = dist.get_world_size(group) if op == dist.ReduceOp.SUM else 1
            set_value(tensor, lambda: value() * times)
        return work

    def tensor_of(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Megatron's gradient norm makes a tensor of a list of tensors, whose values torch reads.
        return make(_with_values(data), *args, **kwargs)

    def set_data(parameter: Tensor, converted: Tensor) -> None:
        parameter.data = converted  # as Module.to does with real parameters

    def copy(storage: Any, source: Any, *args: Any) -> Any:
        # Megatron's recomputation of norms copies storages, of which PyTorch makes tensors that
        # a FakeTensorMode never frees.
        return storage if storage.device.type == "meta" else copy_storage(storage, source, *args)

    stand_ins: list[tuple[Any, str, Any]] = [
        (dist, "new_group", fake_group),
        (dist, "all_gather_object", gather_own),
        (dist, "all_reduce", reduce_equal),
        (torch, "tensor", tensor_of),
        (torch.utils, "swap_tensors", set_data),
        (torch.UntypedStorage, "copy_", copy),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    for owner, name, value in stand_ins:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def _with_values(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return type(data)(map(_with_values, data))
    return data.item() if isinstance(data, FakeTensor) and data.dim() == 0 else data


@contextmanager
def fake_tensors(tracker: SimulatedTracker) -> Iterator[None]:
    """Context in which every new tensor is fake, and seen by the tracker."""
    # Random states are real, and compared by Megatron.
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        yield
