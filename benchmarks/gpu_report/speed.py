"""Speed: a step against the retired model, model FLOPs utilization, cached decoding."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report.findings import Findings, Skipped
from benchmarks.gpu_report.numerics import distance
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.small_runs import Shape, make_trainer, require_engine

#: Aims: our time ÷ the retired model's; time of recomputation ÷ time with the cache.
STEP_AIM, DECODING_AIM = 0.6, 20.0
#: Both ways compute in bf16. With 24 layers each is 0.015 from fp32, so they are 0.021 apart.
DECODING_LOGITS = 0.04


def step_time(setting: Setting, findings: Findings) -> None:
    """Forward and backward pass in bf16 ÷ those of megatron-core 0.15.3's Retro."""
    if setting.retired is None:
        raise Skipped("megatron-core 0.15.3 is not given (--retired FOLDER)")
    from benchmarks import model_step

    for layers, hidden in setting.pick(((12, 768), (24, 1024)), ((6, 64),)):
        options = model_step.Options(
            hidden_size=[hidden],
            num_layers=layers,
            seq_length=setting.pick(2048, 128),
            chunk_length=setting.pick(64, 16),
            retrieved=setting.pick(128, 32),
            batch=setting.pick(4, 2),
            dtype="bfloat16",
            device=setting.device,  # type: ignore[arg-type]
            rounds=setting.pick(10, 2),
            retired=Path(setting.retired),
        )
        sides = model_step.measure_size(hidden, options, ("retired", "ours"), counted=False)
        retired, ours = sides
        name = f"{layers} x {hidden}"
        apart = abs(ours.loss - retired.loss) / retired.loss
        findings.at_most(f"{name}, losses apart", apart, 0.01)
        findings.figure(f"{name}, retired, ms", 1000 * retired.seconds)
        findings.figure(f"{name}, ours, ms", 1000 * ours.seconds)
        findings.figure(
            f"{name}, peak memory, ours / retired", ours.peak_bytes / retired.peak_bytes
        )
        ratio = model_step.time_ratio(ours, retired)
        findings.aim(f"{name}, time, ours / retired", ratio, at_most=STEP_AIM)


def utilization(setting: Setting, findings: Findings) -> None:
    """MFU of training steps in bf16, optimizer included, by implementation of the layers."""
    findings.figure("parameters counted", "matrix products only; causal attention in full")
    for name, flags in {
        "local": {},
        "Transformer Engine": {"transformer_impl": "transformer_engine"},
    }.items():
        with findings.part(name):
            if flags:
                require_engine(setting)
            _utilization(setting, findings, name, flags)


def _utilization(setting: Setting, findings: Findings, name: str, flags: dict[str, Any]) -> None:
    from retro_mcore.training.reporting.flops import peak_flops, training_flops_per_sample

    shape = setting.pick(
        Shape(24, 2048, 16, 2048, 64, 4, 32_768, 3), Shape(2, 64, 2, 64, 16, 2, 256)
    )
    steps = setting.pick(8, 2)
    _forget(setting)
    fast = {"use_cpu_initialization": setting.device == "cpu", "bf16": True}
    trainer = make_trainer(setting, shape, 10**4, **fast, **flags)
    seconds = _step_seconds(trainer, steps)
    config = trainer._parts.stages[0].config
    flops = shape.batch * training_flops_per_sample(config, shape.sequence, shape.vocabulary)
    findings.figure(f"{name}, ms per step of {shape.batch} x {shape.sequence}", 1000 * seconds)
    findings.figure(f"{name}, tokens/s", shape.batch * shape.sequence / seconds)
    findings.figure(f"{name}, TFLOP/s", flops / seconds / 1e12)
    peak = peak_flops(trainer._device)
    if peak is not None:
        findings.figure(f"{name}, MFU", flops / seconds / peak)
    if setting.device == "cuda":
        findings.figure(f"{name}, peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)


def _forget(setting: Setting) -> None:
    """Free what earlier models held, and forget their peak."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _step_seconds(trainer: Any, steps: int) -> float:
    """Median seconds of a step, after two that warm up, on batches in memory."""
    from retro_mcore.training.loop.loss import forward_backward
    from retro_mcore.training.loop.optimizer import release_functions

    parts, plan = trainer._parts, trainer.plan
    ready = itertools.cycle(list(itertools.islice(trainer._train_batches(), 2)))
    times = []
    for stage in parts.stages:
        stage.train()
    for _ in range(2 + steps):
        torch.cuda.synchronize()  # does nothing on the CPU
        start = time.perf_counter()
        for stage in parts.stages:
            stage.zero_grad_buffer()
        parts.optimizer.zero_grad()
        micro = plan.options.micro_batch_size
        forward_backward(parts.stages, ready, 1, plan.sequence_length, micro, True)
        parts.optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    release_functions(parts.stages)
    return statistics.median(times[2:])


def decoding(setting: Setting, findings: Findings) -> None:
    """Time per token with the cache at the end of a window, and with recomputation."""
    from benchmarks import generation

    setting.setup()
    window = setting.pick(4096, 128)
    options = generation.Options(
        windows=[window],
        hidden_size=setting.pick(1024, 64),
        num_layers=setting.pick(24, 3),
        vocab_size=setting.pick(32_768, 1024),
        dtype="bfloat16",
        device=setting.device,  # type: ignore[arg-type]
    )
    model = generation.build_model(options, window)
    with torch.no_grad():
        _same_logits(findings, model, options, window)
        recomputed = generation.recompute(model, options, window)
        cached = generation.decode(model, options, window)
    findings.figure(f"window {window}, recomputed, ms per token", 1000 * recomputed)
    findings.figure(f"window {window}, cached, ms per token", 1000 * cached)
    findings.figure(f"window {window}, cached, tokens/s", 1 / cached)
    if not setting.small:
        findings.aim("recomputed / cached", recomputed / cached, at_least=DECODING_AIM)


def _same_logits(findings: Findings, model: Any, options: Any, window: int) -> None:
    """Logits with the cache are those of recomputation, after a prompt and after more tokens."""
    from benchmarks import generation
    from retro_mcore.inference.decoders import CachedDecoder, FullRecomputation

    source = generation.RandomNeighbors(options)
    text = generation.text_of(options, window // 4, source)
    cached: Any = CachedDecoder(model, 0, 1, window)
    recomputing: Any = FullRecomputation(model, 0)
    apart = []
    for token in range(options.chunk_length + 2):
        found = cached.next_logits([text]).float()
        if token % options.chunk_length < 2:
            apart.append(distance(found, recomputing.next_logits([text]).float()))
        text.tokens.append(token + 1)
        generation.give_neighbors(text, options, source)
    findings.at_most("cached logits, distance to recomputed ones", max(apart), DECODING_LOGITS)
