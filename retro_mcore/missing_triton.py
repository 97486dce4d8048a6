"""Megatron-Core where Triton is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

#: Megatron-Core's one module of GPU kernels that it imports without asking for Triton.
MODULE = "megatron.core.transformer.moe.paged_stash"


def allow_missing_triton() -> None:
    """Let megatron-core be imported without Triton (0.18 and later); before its first import.

    Only an option of its mixture of experts calls the kernels. A call says what is missing.
    """
    if importlib.util.find_spec("triton") is not None or MODULE in sys.modules:
        return
    stub: Any = ModuleType(MODULE)
    stub.__getattr__ = _kernel
    sys.modules[MODULE] = stub


def _kernel(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _needs_triton


def _needs_triton(*args: object, **kwargs: object) -> NoReturn:
    raise ImportError("megatron-core's paged stash needs the package triton")
