"""Which kernels compute attention, as the profiler sees it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_report.findings import Findings
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.small_runs import build_model, make_batch, require_engine, shape_of

_OPERATION = re.compile(r"aten::_scaled_dot_product_(\w+?)_attention(?!\w*backward)|"
                        r"aten::_scaled_dot_product_attention_(math)$")  # fmt: skip
#: Kernels that never hold all scores: flash attention of PyTorch, flash-attn and cuDNN.
_FUSED_KERNEL = re.compile(r"flash|fmha|sdpa", re.IGNORECASE)


def attention(setting: Setting, findings: Findings) -> None:
    """Causal self-attention runs as flash attention, and no attention as plain matrix products."""
    decoder = {"no_retrieval": True, "bf16": True}
    counted = operations(_profile(setting, retrieval=False, **decoder))
    findings.figure("local layers, GPT", dict(counted))
    flash = counted["flash"] + counted["cudnn"]
    findings.equal("local layers, self-attentions in flash attention", flash, counted.total())
    findings.true("local layers, self-attention was seen", flash > 0, flash)
    counted = operations(_profile(setting, bf16=True))
    findings.figure("local layers, Retro", dict(counted))
    findings.equal("local layers, attentions as matrix products", counted["math"], 0)
    flash = counted["flash"] + counted["cudnn"]
    layers = shape_of(setting).layers
    findings.true("local layers, Retro, each layer in flash attention", flash >= layers, flash)
    with findings.part("Transformer Engine"):
        require_engine(setting)
        _engine(setting, findings, decoder)


def _engine(setting: Setting, findings: Findings, decoder: dict[str, Any]) -> None:
    names = _profile(setting, retrieval=False, transformer_impl="transformer_engine", **decoder)
    fused = sorted({name[:80] for name in names if _FUSED_KERNEL.search(name)})
    findings.figure("Transformer Engine, fused kernels", ", ".join(fused))
    findings.true("Transformer Engine, fused attention runs", bool(fused), len(fused))
    softmax = [name for name in names if "softmax" in name.lower() and "loss" not in name.lower()]
    unfused = [name for name in softmax if re.search(r"scaled_|softmax_warp", name)]
    findings.equal("Transformer Engine, unfused softmax kernels", len(unfused), 0)


def _profile(setting: Setting, retrieval: bool = True, **flags: Any) -> list[str]:
    """The names of all events of a forward and backward pass."""
    model = build_model(setting, shape_of(setting), **flags)
    batch = make_batch(setting, shape_of(setting), retrieval)
    activities = [ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        model(**batch.model_inputs()).float().mean().backward()
        torch.cuda.synchronize()  # does nothing on the CPU
    return [event.name for event in profiler.events()]


def operations(names: list[str]) -> Counter[str]:
    """Number of attentions by PyTorch's kind: flash, efficient, cudnn, math."""
    found = filter(None, map(_OPERATION.match, names))
    return Counter(match[1] or match[2] for match in found)
