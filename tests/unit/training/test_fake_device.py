"""Training steps on a fake device: what a GPU's program leaves on the CPU shows without a GPU."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fake_device import is_possible, use_fake_device
from tests.processes import START_METHOD
from tests.unit.training.small import BATCH, VOCABULARY, small_options, small_project
from tests.unit.training.test_model_flags import ENCODER, FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_possible(),
        reason=f"torch {torch.__version__} has no backends in Python, or has CUDA",
    ),
]

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERTS = {"num_experts": 4, "disable_bias_linear": True}
#: Options with tensors of their own: positions, masks, scales, statistics.
CASES: dict[str, dict[str, Any]] = {
    "rotary positions": {},
    "learned positions, bf16": {"position_embedding_type": "learned_absolute", "bf16": True},
    "rotary cross-attention, another encoder": {
        **ENCODER,
        "retro_cross_attention_positions": "rotary",
        "use_rope_scaling": True,
        "retro_encoder_rotary_scaling": True,
    },
    "documents": {"reset_attention_mask": True},
    "window, recomputation": {"sliding_window": 8, **FULL},
    "a partial first chunk": {"retro_origin": "mcore-0.15"},
    "DeepNorm": {"retro_deepnorm": True},
    "muP": {"retro_mup_base_hidden_size": 16},
    **FAMILIES,
    "GPT": {"no_retrieval": True},
    "experts": EXPERTS,
    "TP2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "CP2, documents": {"context_parallel_size": 2, "reset_attention_mask": True},
    "PP2": {"pipeline_model_parallel_size": 2},
}
#: Tokens of a sample, where they are no whole chunks.
LENGTHS = {"a partial first chunk": 29}


def test_nothing_is_left_on_the_cpu():
    assert in_a_process(steps, CASES) == dict.fromkeys(CASES)


MISTAKES = ("neighbors", "their mask", "documents", "loss mask", "mask of a window", "weight")


def test_what_is_left_on_the_cpu_is_found():
    found = in_a_process(steps_with_mistakes, MISTAKES)
    assert {name: error and error[0] for name, error in found.items()} == dict.fromkeys(
        MISTAKES, "FakeTensorDeviceMismatchError"
    )


def in_a_process(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        return pool.submit(function, *args).result()


def steps(cases):
    """The error of a training step, by case, if there is one: its type and text."""
    device = use_fake_device()
    return {name: error_of(device, flags, LENGTHS.get(name)) for name, flags in cases.items()}


def steps_with_mistakes(mistakes):
    from retro_mcore.platform import attention

    device = use_fake_device()
    found, mask = {}, attention.window_mask
    for mistake in mistakes:
        flags = {"sliding_window": 8, "reset_attention_mask": mistake == "documents"}
        if mistake == "mask of a window":
            attention.window_mask = lambda *sizes: mask(*sizes[:-1], torch.device("cpu"))
        found[mistake] = error_of(device, flags, mistake=mistake)
        attention.window_mask = mask
    return found


def error_of(device, flags, length=None, mistake=None):
    from retro_mcore.training.setup import simulate
    from retro_mcore.training.setup.plan import make_plan

    def one_step(parts, plan, num_microbatches, tracker):
        if mistake == "weight":
            norm = parts.stages[0].module.decoder.final_layernorm
            norm.weight = torch.nn.Parameter(norm.weight.detach().cpu())
        batches = simulate._batches(plan)
        return simulate.measure_step(parts, plan, batches, num_microbatches, tracker)

    def batches(plan):
        while True:
            yield left_on_the_cpu(batch_of(plan, length), mistake, device)

    simulate._step_of_many, simulate._batches = one_step, batches
    whole = small_options(micro_batch_size=BATCH, **flags)
    plan = make_plan(whole, small_project(), VOCABULARY)
    options = plan.options
    ranks = options.tensor_model_parallel_size * options.pipeline_model_parallel_size
    try:
        simulate.simulate(plan, ranks * options.context_parallel_size)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def batch_of(plan, length=None):
    """A micro batch as the trainer reads it: padding, a missing neighbor, two documents."""
    from retro_mcore.chunking import ChunkGrid
    from retro_mcore.samples.batch import RetroBatch

    rows, length = plan.options.micro_batch_size, length or plan.sequence_length
    neighbors = segments = None
    if plan.with_retrieval:
        chunk_length = plan.arguments.retro_chunk_length
        chunks = ChunkGrid(length, chunk_length, "right").num_chunks
        shape = rows, chunks, plan.arguments.retro_num_neighbors, 2 * chunk_length
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[..., -3:] = mask[0, :1, -1] = True
        neighbors = torch.zeros(shape, dtype=torch.long), mask
    if plan.options.reset_attention_mask:
        segments = torch.zeros(rows, length, dtype=torch.long)
        segments[:, length // 2 :] = 1
    text = torch.zeros(rows, length + 1, dtype=torch.long)
    return RetroBatch.from_text(text, neighbors, segments=segments)


def left_on_the_cpu(batch, mistake, device):
    """The batch on the device, but for one of its tensors."""
    names = {"neighbors": "retrieved_tokens", "their mask": "retrieved_mask"}
    names |= {"documents": "segments", "loss mask": "loss_mask"}
    moved = batch.to(device)
    name = names.get(mistake)
    return moved if name is None else replace(moved, **{name: getattr(batch, name)})
