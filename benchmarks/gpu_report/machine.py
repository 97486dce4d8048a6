"""Facts about the machine, its software and this code.

python -m benchmarks.gpu_report.machine cuda
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import retro_mcore

ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "faiss-gpu",
    "faiss-gpu-cuvs", "faiss-cpu", "transformers", "sentence-transformers", "numpy",
)  # fmt: skip


def describe(device: str) -> dict[str, Any]:
    """Device, versions, date and what identifies this code, as plain data.

    On CUDA, the process takes memory of the device: see `describe_apart`.
    """
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _processor(),
        "devices": 1,
        "python": platform.python_version(),
        "retro-mcore": retro_mcore.__version__,
        "commit": _commit(),
        "code": _digest(),
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


def describe_apart(device: str) -> dict[str, Any]:
    """The same from a process of its own, so that this one takes nothing of the device.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_report.machine", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the machine cannot be described: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _commit() -> str:
    """The checkout's commit, and whether its code has been changed since."""
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
    if commit is None or not (ROOT / ".git").exists():  # else it is one of a folder above
        return "unknown"
    changed = _output([*git, "status", "--porcelain", "retro_mcore", "benchmarks"])
    return commit.strip() + " and changes" * bool(changed)


def _digest() -> str:
    """Digest of the files of this package and of the benchmarks."""
    found = hashlib.sha256()
    for folder in (Path(retro_mcore.__file__).parent, ROOT / "benchmarks"):
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder.parent)}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


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
    output = (_output(command) or "").strip()
    return output.splitlines()[0].strip() if output else None


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
