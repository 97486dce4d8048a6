"""What tests of Megatron-Bridge are marked with."""

from __future__ import annotations

import importlib.util

import pytest


def has_bridge() -> bool:
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


MARKS = [
    pytest.mark.bridge,
    pytest.mark.slow,
    pytest.mark.skipif(not has_bridge(), reason="needs Megatron-Bridge (make test-bridge)"),
]
