"""Megatron-Core on this machine: devices, backends, patches, differences between releases.

Only names are defined here, so that modules for `--help` load without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retro_mcore.platform.cpu import is_cpu_in_use, use_cpu
    from retro_mcore.platform.device import choose_device, distributed_backend, setup_device
    from retro_mcore.platform.groups import leave_model_parallel

__all__ = [
    "choose_device",
    "distributed_backend",
    "is_cpu_in_use",
    "leave_model_parallel",
    "setup_device",
    "use_cpu",
]

_HOMES = {
    "choose_device": "device",
    "distributed_backend": "device",
    "is_cpu_in_use": "cpu",
    "leave_model_parallel": "groups",
    "setup_device": "device",
    "use_cpu": "cpu",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
