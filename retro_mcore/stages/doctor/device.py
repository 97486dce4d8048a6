"""GPUs: driver, count, memory in use, speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from statistics import median

import torch

from retro_mcore import launcher
from retro_mcore.stages.doctor.findings import Finding, error, note, ok, warning

AREA = "device"
#: Share of a GPU's memory that other processes may hold.
_TAKEN = 0.05
#: A GPU slower than this share of the median slows down the whole job.
_SLOW = 0.8
_GIB = 2**30


def check_device(cuda: bool, local_world_size: int) -> list[Finding]:
    """Check this rank's GPU.

    Args:
        cuda: Whether the run is to use GPUs.
        local_world_size: Ranks of this node.
    """
    if cuda:
        findings: list[Finding] = []
        try:
            findings.extend(_check_gpu(local_world_size))
        except RuntimeError as refused:  # torch's errors of CUDA are such, too
            findings.append(_unusable(refused))
        return findings
    built = torch.version.cuda
    if built and not torch.cuda.is_available():
        fix = "Check nvidia-smi and the driver's version, or give --device cpu"
        return [warning(AREA, "CUDA", f"torch is built for CUDA {built}, but finds no GPU", fix)]
    return [note(AREA, "CPU", "the run would use the CPU and gloo")]


def _check_gpu(local_world_size: int) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = (
            f"torch {torch.__version__} is built {'for CUDA ' + built if built else 'without CUDA'}"
        )
        yield error(AREA, "CUDA", f"no GPU; {found}", "Check nvidia-smi, the driver and torch")
        return
    count = torch.cuda.device_count()
    if local_world_size > count:
        fix = "Lower --nproc-per-node, or check CUDA_VISIBLE_DEVICES"
        yield error(AREA, "GPUs", f"{count} for {local_world_size} processes of this node", fix)
        return
    where = launcher.local_rank()
    torch.cuda.set_device(where)
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    yield ok(AREA, "GPU", f"{name}, CUDA {torch.version.cuda}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    yield ok(AREA, "NCCL", nccl)
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield warning(AREA, "GPU", "has no bf16", "Train with --fp16, or in fp32")
    free, total = torch.cuda.mem_get_info()
    if free < (1 - _TAKEN) * total:
        found = f"{(total - free) / _GIB:.1f} of {total / _GIB:.0f} GiB are in use"
        yield warning(AREA, f"GPU {where}", found, "End other processes (nvidia-smi)")


def _unusable(refused: RuntimeError) -> Finding:
    found = " ".join(str(refused).split())[:200]
    fix = "Look at nvidia-smi and dmesg (Xid): end other processes, reset the GPU, or leave it out"
    return error(AREA, f"GPU {launcher.local_rank()}", found, fix)


def measure_speed() -> tuple[float | None, list[Finding]]:
    """`matmul_tflops`, or the finding that this rank's GPU does not compute."""
    try:
        return matmul_tflops(), []
    except RuntimeError as refused:
        return None, [_unusable(refused)]


def matmul_tflops(size: int = 8192, rounds: int = 10) -> float:
    """TFLOP/s of bf16 matrix products on this rank's GPU."""
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        left @ left
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        left @ left
    torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.perf_counter() - start) / 1e12


def compare_speeds(tflops: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
    """Findings about the ranks' matrix products.

    Args:
        tflops: TFLOP/s by rank.
        hosts: Host names by rank.
    """
    if not tflops:
        return []
    usual = median(tflops.values())
    slow = [
        warning(
            AREA,
            f"rank {rank} on {hosts.get(rank, 'unknown host')}",
            f"{speed:.0f} TFLOP/s in bf16, the median is {usual:.0f}",
            "Check the GPU's clocks and temperature (nvidia-smi -q), or leave the node out",
        )
        for rank, speed in tflops.items()
        if speed < _SLOW * usual
    ]
    return slow or [ok(AREA, "matrix products", f"{usual:.0f} TFLOP/s in bf16 (median)")]
