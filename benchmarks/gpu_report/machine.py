"""Facts about the machine and its software."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "faiss-gpu",
    "faiss-gpu-cuvs", "faiss-cpu", "transformers", "sentence-transformers", "numpy",
)  # fmt: skip


def describe(device: str) -> dict[str, Any]:
    """Device, versions and date, as plain data."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _processor(),
        "devices": 1,
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        facts |= {
            "device": torch.cuda.get_device_name(),
            "devices": torch.cuda.device_count(),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[attr-defined]
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return f"CPU {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.splitlines()[0].strip() if output.strip() else None
