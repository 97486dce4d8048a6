"""A device that is not the CPU, for fake tensors: what a GPU's program mixes up shows without one.

Operations on fake tensors of two devices fail as those on real ones do. PyTorch's fake tensors of
CUDA need its CUDA build. A backend that is written in Python does not, so CUDA stands for one here,
in Megatron's code and ours: `use_cpu` answers for torch.cuda with this device.

Use it in a process of its own, for there is no way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # for it registers the groups' backend
import torch.utils.backend_registration
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from retro_mcore.platform import cpu
from retro_mcore.platform.simulation import SimulatedTracker

NAME = "fakegpu"


def is_possible() -> bool:
    """Whether this PyTorch has the API, which it calls experimental, and no CUDA to confuse."""
    has_api = hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")
    return has_api and not torch.cuda.is_available()


def use_fake_device() -> torch.device:
    """Make the fake device the one that Megatron and we take for CUDA, in this process."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    dist.Backend.backend_capability["fake"].append(NAME)  # of its groups
    device = torch.device(NAME, 0)
    cpu._CPU = device
    type_of = Tensor.type
    cpu.use_cpu()
    cpu._in_use = False

    def cuda_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        name = type_of(self)
        return f"torch.cuda.{name.split('.')[-1]}" if self.device.type == NAME else name

    def moved(self: Any, *args: object, **kwargs: object) -> Any:
        return self.to(device)

    stand_ins: list[tuple[Any, str, Callable]] = [
        (Tensor, "type", cuda_type),
        (Tensor, "cuda", moved),
        (torch.nn.Module, "cuda", moved),
        (torch.nn.Module, "_apply", _apply),
        (torch, "tensor", _moving_there(torch.tensor)),
        (torch, "as_tensor", _moving_there(torch.as_tensor)),
        (SimulatedTracker, "run", _without_constants(SimulatedTracker.run)),
    ]
    for owner, name, value in stand_ins:
        setattr(owner, name, value)
    return device


def _moving_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory that makes values on the CPU first: the device has no memory."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type not in (NAME, "cuda"):
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(torch.device(NAME, 0))

    return made


def _without_constants(run: Callable) -> Callable:
    """Fake tensors of few values keep them, and PyTorch would copy these to the device."""

    def run_without(self: SimulatedTracker, func: Any, args: tuple, kwargs: Any) -> Any:
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != NAME:
            return run(self, func, args, kwargs)
        fakes = [each for each in tree_leaves(args) if isinstance(each, FakeTensor)]
        constants = [each.constant for each in fakes]
        for each in fakes:
            each.constant = None
        try:
            return run(self, func, args, kwargs)
        finally:
            for each, constant in zip(fakes, constants, strict=True):
                each.constant = constant

    return run_without


def _apply(self: torch.nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """As Module._apply, with new parameters: PyTorch does not give this device's ones new data."""
    made: dict[int, torch.nn.Parameter] = {}

    def changed(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(parameter) not in made:
            new = torch.nn.Parameter(change(parameter.detach()), parameter.requires_grad)
            vars(new).update({**vars(parameter), **vars(new)})  # Megatron's marks
            made[id(parameter)] = new
        return made[id(parameter)]

    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = changed(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return self
