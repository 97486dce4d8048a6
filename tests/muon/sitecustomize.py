"""Lets Emerging-Optimizers be imported on the CPU. `make test-muon` puts this folder first.

The package is written for Python 3.12, and its older releases import Triton for kernels that only
GPUs use.
"""

import importlib.util
import sys
import types
import typing

if not hasattr(typing, "override"):
    typing.override = lambda method: method  # type: ignore[attr-defined]
if importlib.util.find_spec("triton") is None:
    kernels = types.ModuleType("emerging_optimizers.triton_kernels")
    kernels.HAS_TRITON_340 = False  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
