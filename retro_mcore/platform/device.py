"""The device of this process: CUDA, or the CPU with gloo through `use_cpu`."""

from __future__ import annotations

from typing import Literal

import torch

from retro_mcore import launcher
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.cpu import disable_compilation, is_cpu_in_use, use_cpu

Device = Literal["auto", "cpu", "cuda"]


def setup_device(device: Device = "auto") -> torch.device:
    """Choose the device of this process for a model of megatron-core; on the CPU, patch it.

    Raises:
        ConfigurationError: "cuda" was requested and there is none.
    """
    chosen = choose_device(device)
    if chosen.type == "cpu":
        use_cpu()
    return chosen


def choose_device(device: Device = "auto") -> torch.device:
    """Choose the device of this process: CUDA where there is one, else the CPU.

    Megatron-core is neither imported nor patched. Under torchrun on CUDA, the process takes the
    device of its LOCAL_RANK.

    Raises:
        ConfigurationError: "cuda" was requested and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device", "cuda, but torch finds no CUDA device", "Use cpu")
    if device == "cpu" or is_cpu_in_use() or not torch.cuda.is_available():
        disable_compilation()
        return torch.device("cpu")
    local = torch.device("cuda", launcher.local_rank())
    torch.cuda.set_device(local)
    return local


def distributed_backend() -> str:
    """The torch.distributed backend that fits the device: gloo on CPU, NCCL on CUDA."""
    return "gloo" if is_cpu_in_use() else "nccl"
