"""Precisions that an encoder computes in, and what each of them needs of this machine."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.host import processor_features

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FLAG = "--embed-precision"

#: Instruction sets that multiply in bf16, by Linux's names; "bf16" is Arm's.
_FAST_BF16 = {"amx_bf16", "avx512_bf16"}  # measured: benchmarks/embedding.py
_MULTIPLIES_BF16 = {*_FAST_BF16, "bf16"}


def chooses_cpu(device: str) -> bool:
    """Whether "auto", "cpu" or "cuda" stands for the CPU here."""
    return device == "cpu" or not torch.cuda.is_available()


def automatic_precision(device: str) -> Precision:
    """The precision of `--embed-precision auto` in a new project.

    On an x86 CPU that has it bf16, on another CPU fp32; on a GPU bf16, or fp16 if it lacks that.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    if chooses_cpu(device):
        return "bf16" if processor_features() & _FAST_BF16 else "fp32"
    return "bf16" if _gpu_has_bf16() else "fp16"


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def obstacle(precision: Precision, device: str | None) -> str | None:
    """Why this machine cannot compute in a precision, in a few words; None if it can.

    Args:
        precision: The precision.
        device: "cpu", "cuda" …; None: CUDA if available.
    """
    on_cpu = not (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    if precision == "fp16" and on_cpu:
        return "on the CPU"
    if precision == "int8" and not on_cpu:
        return "on a GPU"
    if precision != "bf16":
        return None
    if on_cpu and not processor_features() & _MULTIPLIES_BF16:
        return "on a processor without AMX or AVX512-BF16"
    if not on_cpu and not _gpu_has_bf16():
        return "on a GPU without bf16"
    return None


def require_precision(precision: Precision, device: str | None) -> None:
    """Refuse a precision that this machine cannot compute in.

    Raises:
        ConfigurationError: names the precision and the obstacle.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(FLAG, str(precision), f"Choose {', '.join(PRECISIONS)}")
    found = obstacle(precision, device)
    if found is None:
        return
    if precision == "fp16":
        raise ConfigurationError("--embed-fp16", found, "Leave it out, or use a GPU")
    raise ConfigurationError(FLAG, f"{precision} {found}", "Use fp32, or another machine")
