"""The rotary embedding of a GGUF file, as config.json describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface_files import refuse

# Llama 3.1's scaling, the only one whose factors llama.cpp stores as a tensor for this family.
_LOW_FREQUENCY, _HIGH_FREQUENCY, _ORIGINAL_LENGTH = 1, 4, 8192
_BASE = 10000.0  # llama.cpp's default


def rope_parameters(
    path: Path, keys: Mapping[str, Any], head_dim: Any, factors: Tensor | None
) -> dict[str, Any]:
    """The keys of config.json.

    Args:
        path: The file, for errors.
        keys: Metadata of the architecture, without its name.
        head_dim: Width of a head.
        factors: The tensor rope_freqs, `[head_dim / 2]`: divisors of the frequencies.

    Raises:
        CheckpointError: a scaling that our decoder does not have.
    """
    base = keys.get("rope.freq_base", _BASE)
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": "default", **_linear(path, keys)}
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise refuse(path, f"rope.dimension_count {rotated}", f"{head_dim}, the width of a head")
    if factors is not None:
        if rope["rope_type"] != "default":
            raise refuse(path, "both rope.scaling and the tensor rope_freqs", "one of them")
        rope |= _llama3(path, base, head_dim, factors)
    return {"rope_theta": base, "rope_parameters": rope}


def _linear(path: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind != "linear":
        raise refuse(path, f"rope.scaling.type {kind!r}", "none or linear")
    return {"rope_type": "linear", "factor": factor}


def _llama3(path: Path, base: Any, head_dim: Any, factors: Tensor) -> dict[str, Any]:
    found = factors.double()
    factor = float(f"{found.max():.6g}")
    whole = isinstance(base, (int, float)) and isinstance(head_dim, int) and head_dim > 0
    fits = whole and found.shape == (head_dim // 2,) and math.isfinite(factor) and factor >= 1
    # float32 in the file: its rounding, and that of the frequencies.
    if not fits or not torch.allclose(found, _llama3_factors(base, head_dim, factor), rtol=1e-5):
        raise refuse(
            path,
            "a tensor rope_freqs with other factors than Llama 3.1's",
            f"low_freq_factor {_LOW_FREQUENCY}, high_freq_factor {_HIGH_FREQUENCY}, "
            f"original_max_position_embeddings {_ORIGINAL_LENGTH}",
        )
    if factor == 1:
        return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQUENCY,
        "high_freq_factor": _HIGH_FREQUENCY,
        "original_max_position_embeddings": _ORIGINAL_LENGTH,
    }


def _llama3_factors(base: float, head_dim: int, factor: float) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * base**exponents
    share = _ORIGINAL_LENGTH / wavelengths
    smooth = (share - _LOW_FREQUENCY) / (_HIGH_FREQUENCY - _LOW_FREQUENCY)
    return 1 / ((1 - smooth.clamp(0, 1)) / factor + smooth.clamp(0, 1))
