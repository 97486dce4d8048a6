"""A training script as a user of Megatron-LM writes it, after what lets Megatron-LM run on the CPU.

It has no `__main__` guard, as few such scripts have.
"""

# ruff: noqa: E402 (the order is what this is about)

import typing
from types import SimpleNamespace

if not hasattr(typing, "override"):  # Python 3.11, which megatron-core's wheels from 0.17 on run on
    typing.override = lambda method: method

from retro_mcore.platform import use_cpu

use_cpu()

import torch

# Megatron-LM's initialization asks for a device, its logging for the device's memory.
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
torch.cuda.empty_cache = lambda: None
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(total_memory=2**30)
torch.cuda.memory_stats = lambda device=None: {"num_alloc_retries": 0}
for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
    setattr(torch.cuda, name, lambda device=None: 0)

import megatron.core.datasets.utils

megatron.core.datasets.utils.compile_helpers = lambda: None  # wheels hold no makefile

import megatron.training.initialize

# On CUDA it draws from another generator than the one that the weights are drawn from on the CPU.
megatron.training.initialize._warmup_jit_function = lambda *args, **kwargs: None

from retro_mcore.training.providers import main

main()
