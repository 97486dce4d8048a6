"""Import Megatron-Core without Triton."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

#: Megatron-Core's only module that imports Triton unconditionally.
MODULE = "megatron.core.transformer.moe.paged_stash"


def allow_missing_triton() -> None:
    """Allow importing megatron-core (0.18 and later) without Triton. Call before its first import.

    Only a mixture-of-experts option uses the kernels. Calling them reports the missing package.
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
