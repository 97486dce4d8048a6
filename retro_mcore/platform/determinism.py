"""Deterministic kernels, on the CPU and on CUDA."""

from __future__ import annotations

import os

import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform import is_cpu_in_use

# The libraries read these when they start. Megatron 0.19 has the same list.
_DETERMINISTIC_ENVIRONMENT = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}


def use_deterministic_algorithms() -> None:
    """Restrict torch to deterministic kernels; it raises where there is none.

    Raises:
        ConfigurationError: on CUDA, an environment variable leaves a library free to vary.
    """
    if not is_cpu_in_use():
        for name, allowed in _DETERMINISTIC_ENVIRONMENT.items():
            if os.environ.get(name) not in allowed:
                raise ConfigurationError(
                    f"--deterministic-mode with {name}={os.environ.get(name, '')}",
                    "the results may vary",
                    f"Set {name} to {' or '.join(allowed)}",
                )
    torch.use_deterministic_algorithms(True)
