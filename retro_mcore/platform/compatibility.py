"""What differs between the releases of megatron-core that one code base serves, 0.16.1 to 0.19."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

# GPU kernels that megatron-core >= 0.18 imports without asking whether Triton is there.
_TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def allow_missing_triton() -> None:
    """Let megatron-core be imported without Triton; before its first import.

    Only the kernels of a mixture-of-experts option need it; calling one says so.
    """
    if importlib.util.find_spec("triton") is not None or _TRITON_KERNELS in sys.modules:
        return
    stub: Any = ModuleType(_TRITON_KERNELS)
    stub.GLOBAL_BLOCK_SIZE = 1024
    stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = _needs_triton
    sys.modules[_TRITON_KERNELS] = stub


def _needs_triton(*args: object, **kwargs: object) -> NoReturn:
    raise ImportError("megatron-core's paged stash needs the package triton")
