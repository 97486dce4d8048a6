"""Training runs that must agree: bf16 with fp32, fp8 with bf16, resumed with uninterrupted."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

from benchmarks.gpu_report.findings import Findings, Skipped
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.small_runs import require_engine, shape_of, train

#: Largest distance of losses ÷ loss: mean over the steps, and the last one.
BF16_MEAN, BF16_LAST = 0.01, 0.02
FP8_MEAN, FP8_LAST = 0.03, 0.06


def bf16_training(setting: Setting, findings: Findings) -> None:
    """Losses in bf16 follow those in fp32, and the model learns."""
    steps = setting.pick(60, 12)
    shape = shape_of(setting)
    expected = train(setting, shape, steps).train_losses
    found = train(setting, shape, steps, bf16=True).train_losses
    _follow(findings, "bf16", found, expected, BF16_MEAN, BF16_LAST)
    findings.at_most("last loss / first loss", found[-1] / found[0], setting.pick(0.8, 0.99))
    with findings.part("Transformer Engine"):
        require_engine(setting)
        engine: Any = {"bf16": True, "transformer_impl": "transformer_engine"}
        found = train(setting, shape, steps, **engine).train_losses
        _follow(findings, "bf16, Transformer Engine", found, expected, BF16_MEAN, BF16_LAST)


def fp8(setting: Setting, findings: Findings) -> None:
    """Losses in fp8 follow those in bf16."""
    require_engine(setting)
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        raise Skipped(f"{torch.cuda.get_device_name()} has no fp8")
    steps = setting.pick(60, 12)
    flags: Any = {"bf16": True, "transformer_impl": "transformer_engine"}
    expected = train(setting, shape_of(setting), steps, **flags).train_losses
    found = train(setting, shape_of(setting), steps, fp8_format="hybrid", **flags).train_losses
    _follow(findings, "fp8", found, expected, FP8_MEAN, FP8_LAST)
    findings.true("fp8 differs from bf16", found != expected, found[-1] - expected[-1])


def resume(setting: Setting, findings: Findings) -> None:
    """A run that saved and went on has the losses of one that did not, to the last bit."""
    steps, half = setting.pick(12, 4), setting.pick(6, 2)
    flags: Any = {"bf16": True, "deterministic_mode": True, "use_distributed_optimizer": True}
    shape = shape_of(setting)
    whole = train(setting, shape, steps, **flags).train_losses
    with setting.folder() as folder:
        first = train(setting, shape, steps, folder, exit_interval=half, **flags).train_losses
        second = train(setting, shape, steps, folder, **flags).train_losses
    findings.equal("steps before saving", len(first), half)
    findings.equal("steps after resuming", len(second), steps - half)
    findings.equal("losses that differ", _different([*first, *second], whole), 0)
    findings.figure("losses", f"{whole[0]:.6f} to {whole[-1]:.6f}")


def _different(found: list[float], expected: list[float]) -> int:
    return sum(one != other for one, other in zip(found, expected, strict=True))


def _follow(
    findings: Findings,
    name: str,
    found: list[float],
    expected: list[float],
    mean_bound: float,
    last_bound: float,
) -> None:
    apart = [abs(one - other) / other for one, other in zip(found, expected, strict=True)]
    findings.true(f"{name}, losses are finite", all(map(math.isfinite, found)), found[-1])
    findings.at_most(f"{name}, losses apart, mean", mean(apart), mean_bound)
    findings.at_most(f"{name}, losses apart, at the end", mean(apart[-3:]), last_bound)
    findings.figure(f"{name}, last loss", found[-1])
    findings.figure(f"{name}, loss to compare with", expected[-1])
