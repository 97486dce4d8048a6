"""Environment variables that are known to matter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from retro_mcore.host import usable_cores
from retro_mcore.stages.doctor.findings import Finding, Level, error, warning

AREA = "settings"
#: Variables that should be the same on all ranks, by the beginning of their names.
SHARED = ("NCCL_", "NVTE_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_", "PYTORCH_",
          "OMP_NUM_THREADS")  # fmt: skip

_SLOWER = "Unset it, unless you look for a fault"
#: Variable, values that matter, level, what they do, fix.
_RULES: tuple[tuple[str, tuple[str, ...], Level, str, str], ...] = (
    ("CUDA_LAUNCH_BLOCKING", ("1",), "warning", "every kernel is waited for", _SLOWER),
    ("TORCH_DISTRIBUTED_DEBUG", ("DETAIL",), "warning", "every collective is checked", _SLOWER),
    ("NCCL_P2P_DISABLE", ("1",), "warning", "GPUs of a node do not use NVLink or PCIe", _SLOWER),
    ("NCCL_SHM_DISABLE", ("1",), "warning", "processes of a node use the network", _SLOWER),
    ("NCCL_IB_DISABLE", ("1",), "warning", "InfiniBand is not used", _SLOWER),
    (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        ("0",),
        "warning",
        "a collective without all ranks hangs for ever",
        "Unset it",
    ),
    (
        "NCCL_ASYNC_ERROR_HANDLING",
        ("0",),
        "warning",
        "a collective without all ranks hangs for ever",
        "Unset it",
    ),
    (
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        ("1",),
        "warning",
        "memory is allocated anew each time",
        _SLOWER,
    ),
)


def check_settings(
    cuda: bool,
    tensor_parallel: int,
    local_world_size: int,
    capability: tuple[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    interfaces: Path = Path("/sys/class/net"),
) -> list[Finding]:
    """Check the environment of this process.

    Args:
        cuda: Whether the run uses GPUs.
        tensor_parallel: Tensor model parallel size.
        local_world_size: Ranks of this node.
        capability: Compute capability of the GPU.
        environment: Variables (default: this process's).
        interfaces: Folder with an entry per network interface.
    """
    variables = os.environ if environment is None else environment
    findings = [*_by_rule(variables), *_interfaces(variables, interfaces)]
    findings += _threads(variables, local_world_size)
    if cuda:
        findings += [*_connections(variables, tensor_parallel, capability), *_attention(variables)]
    return findings


def shared_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that should be the same on all ranks."""
    variables = os.environ if environment is None else environment
    return {name: value for name, value in variables.items() if name.startswith(SHARED)}


def compare_settings(by_rank: Mapping[int, Mapping[str, str]]) -> list[Finding]:
    """Findings about variables that differ between ranks."""
    names = sorted({name for settings in by_rank.values() for name in settings})
    found = []
    for name in names:
        values = {rank: settings.get(name, "unset") for rank, settings in by_rank.items()}
        kinds = dict.fromkeys(values.values())
        if len(kinds) > 1:
            told = "; ".join(f"{kind} on rank {_first(values, kind)}" for kind in kinds)
            found.append(warning(AREA, name, f"differs: {told}", "Set the same on all nodes"))
    return found


def _first(values: Mapping[int, str], kind: str) -> int:
    return min(rank for rank, value in values.items() if value == kind)


def _by_rule(variables: Mapping[str, str]) -> Iterator[Finding]:
    for name, values, level, effect, fix in _RULES:
        if variables.get(name) in values:
            yield Finding(AREA, level, f"{name}={variables[name]}", effect, fix)


def _interfaces(variables: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """NCCL and gloo take names or beginnings of names; `^` excludes, `=` wants the whole name."""
    if not folder.is_dir():
        return
    known = sorted(path.name for path in folder.iterdir())
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = variables.get(name, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or name.startswith("GLOO")
        wanted = [part for part in value.lstrip("=").split(",") if part]
        if not any(
            one == part or (not exact and one.startswith(part)) for one in known for part in wanted
        ):
            found = f"no such network interface; there are {', '.join(known)}"
            yield error(AREA, f"{name}={value}", found, "Name one of them, or unset it")


def _threads(variables: Mapping[str, str], processes: int) -> Iterator[Finding]:
    value, cores = variables.get("OMP_NUM_THREADS"), usable_cores()
    if value is None and processes > 1:
        found = f"unset: {processes} processes of {cores} threads each on {cores} cores"
        yield warning(AREA, "OMP_NUM_THREADS", found, f"Set it to {max(cores // processes, 1)}")
    elif value is not None and not (value.isdigit() and int(value) > 0):
        yield error(AREA, f"OMP_NUM_THREADS={value}", "is not a number of threads", "Unset it")
    elif value is not None and processes > 1 and int(value) * processes > cores:
        found = f"{processes} processes share {cores} cores"
        fix = f"Set it to {max(cores // processes, 1)}"
        yield warning(AREA, f"OMP_NUM_THREADS={value}", found, fix)


def _connections(
    variables: Mapping[str, str], tensor_parallel: int, capability: tuple[int, int] | None
) -> Iterator[Finding]:
    """Up to Hopper, tensor parallel communication overlaps only if kernels start in order."""
    value = variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # training sets 1 where it is unset
    needed = tensor_parallel > 1 and (capability is None or capability < (10, 0))
    if needed and value != "1":
        found = "communication of tensor parallelism does not overlap with computation"
        yield warning(AREA, f"CUDA_DEVICE_MAX_CONNECTIONS={value}", found, "Set it to 1")


def _attention(variables: Mapping[str, str]) -> Iterator[Finding]:
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    off = [name for name in names if variables.get(name) == "0"]
    if len(off) == len(names):
        found = "leave Transformer Engine no attention kernel"
        yield error(AREA, "=0, ".join(off) + "=0", found, "Unset them")
    elif {"NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"} <= set(off):
        found = "leave only attention that holds all scores"
        yield warning(AREA, "NVTE_FLASH_ATTN=0, NVTE_FUSED_ATTN=0", found, "Unset them")
