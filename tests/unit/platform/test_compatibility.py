"""megatron-core imports without Triton, whatever its release; what needs Triton says so."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from retro_mcore.platform import compatibility


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_the_kernels_that_need_triton_import_and_refuse_to_run(monkeypatch):
    monkeypatch.delitem(sys.modules, compatibility._TRITON_KERNELS, raising=False)
    compatibility.allow_missing_triton()
    kernels = sys.modules[compatibility._TRITON_KERNELS]
    with pytest.raises(ImportError, match="needs the package triton"):
        kernels.paged_stash_copy_kernel()
