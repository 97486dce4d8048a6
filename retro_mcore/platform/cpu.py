"""Run real megatron-core on CPU and gloo.

Megatron-Core asks torch.cuda for its current device, random states and streams by name. On a
machine without CUDA `use_cpu` answers for torch.cuda: the device is the CPU, the random state is
the CPU generator's, streams do nothing, and a factory told `device="cuda"` allocates on the CPU.
Nothing of megatron-core's arithmetic or communication is replaced.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._device

from retro_mcore.errors import ConfigurationError

_CPU = torch.device("cpu")

# Patched one by one: a TorchFunctionMode would be popped during backward, where activation
# recomputation allocates.
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]
_TENSOR_FACTORIES = ["new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"]

_in_use = False


class _NoStream:
    """Stands for a CUDA stream or event: work on the CPU is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    synchronize = wait_event = wait_stream = record = wait = _nothing

    def record_event(self, event: _NoStream | None = None) -> _NoStream:
        return event or _NoStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _NoStream) -> float:
        return 0.0


def is_cpu_in_use() -> bool:
    """Whether `use_cpu` is in force in this process."""
    return _in_use


def use_cpu() -> None:
    """Make megatron-core run on CPU and gloo in this process. Idempotent.

    Megatron and the modules that use it may be imported before or after it; nothing may be
    allocated on CUDA before it.

    Configurations must also say `use_cpu_initialization=True, gradient_accumulation_fusion=False`
    (RetroConfig does, when this is in force).

    Raises:
        ConfigurationError: CUDA has already been initialised here; the two do not mix.
    """
    global _in_use
    if _in_use:
        return
    if torch.cuda.is_initialized():
        raise ConfigurationError(
            "use_cpu()",
            "this process has already initialised CUDA",
            "Call it before any CUDA work, or use the GPU",
        )
    disable_compilation()
    _silence_gpu_advice()
    # In this function: the data pipeline uses this package without megatron.
    from megatron.core.tensor_parallel import random as megatron_random

    _patch_cuda_queries()
    _patch_random_state(megatron_random)
    _patch_allocation()
    _in_use = True


def disable_compilation() -> None:
    """Let torch.compile return functions as they are, unless TORCHDYNAMO_DISABLE is 0.

    Megatron decorates small functions with it, and it needs a C++ compiler on CPU.
    """
    disabled = os.environ.setdefault("TORCHDYNAMO_DISABLE", "1") == "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True  # type: ignore[attr-defined]
    elif disabled:
        # torch.compile returns the function as it is then, but loads the compiler first (seconds).
        torch.compile = _uncompiled  # type: ignore[assignment]


def _uncompiled(model: Callable | None = None, **options: Any) -> Callable:
    return model if model is not None else lambda function: function


def _silence_gpu_advice() -> None:
    # Advice on GPU packages and settings, and a check that the CPU's random state is not the GPU's.
    advice = "Apex|Transformer Engine|full scope is depr|CUDA_DEVICE_MAX_CONNECTIONS"
    warnings.filterwarnings("ignore", message=f".*({advice}).*")
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_cuda_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    # A function of its own under each name: torch.compile sorts torch.cuda's names by object.
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda device=None: _NoStream())
    cuda.stream = lambda stream: nullcontext()
    cuda.Stream = cuda.Event = _NoStream
    for name in ("range_push", "range_pop"):  # marks for a profiler of GPUs
        setattr(cuda.nvtx, name, lambda *args: None)


def _patch_random_state(megatron_random: Any) -> None:
    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        # Not torch.manual_seed: it calls torch.cuda's, which is this function.
        torch.default_generator.manual_seed(value)

    modules: list[Any] = [torch.cuda, torch.cuda.random]
    for module in modules:
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = module.manual_seed_all = seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _patch_allocation() -> None:
    # Contexts such as torch.device("meta"), under which transformers loads models, know factories
    # by identity from a cached table: fill it while the names still mean the originals.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))

    def stay(self: Any, *args: object, **kwargs: object) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[assignment]
    torch.nn.Module.cuda = stay  # type: ignore[assignment]

    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # Megatron's optimizer and gradient clipping compare this string.
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[assignment]


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):  # for copies to a GPU
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return allocate
