"""Simulated steps against steps that were made, on gloo: memory, bytes sent, FLOPs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.processes import START_METHOD, run_ranks

TINY = {"layers": 4, "hidden": 64, "length": 256, "batch": 8, "vocabulary": 512}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BF16 = {"bf16": True, "use_distributed_optimizer": True}
EXPERTS = {"num_experts": 4, "disable_bias_linear": True}
EP2 = {**EXPERTS, "expert_model_parallel_size": 2}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
ALONE: dict[str, dict[str, Any]] = {
    "one process": {},
    "recomputation": FULL,
    "recomputation of norms and MLPs": {
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm", "mlp"],
    },
    "bf16": {"bf16": True},
    "fp16, SGD": {"fp16": True, "optimizer": "sgd", "loss_scale": 1.0},
    "like Llama": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "num_query_groups": 1,
        "untie_embeddings_and_output_weights": True,
    },
    "GPT": {"no_retrieval": True},
    "experts": EXPERTS,
    "experts, all to all, recomputation": {**EXPERTS, **ALL_TO_ALL, **FULL},
    "many experts, bf16": {
        **EXPERTS,
        "num_experts": 96,
        "moe_router_topk": 7,
        "moe_layer_freq": [0, 1, 0, 0],
        "moe_shared_expert_intermediate_size": 32,
        "bf16": True,
    },
}
ON_TWO: dict[str, dict[str, Any]] = {
    "TP2": TP2,
    "TP2+SP": {**TP2, "sequence_parallel": True},
    "PP2": PP2,
    "PP2 of 2": {**PP2, "num_virtual_stages_per_pipeline_rank": 2},
    "PP2, recomputation, bf16": {**PP2, **FULL, **BF16},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
    "DP2, distributed optimizer": {"use_distributed_optimizer": True},
    "DP2, bf16, all overlapped": {
        **BF16,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "EP2": EP2,
    "EP2, all to all": {**EP2, **ALL_TO_ALL},
    "EP2, all to all, distributed optimizer, recomputation": {
        **{**EP2, **ALL_TO_ALL, **FULL},
        "use_distributed_optimizer": True,
    },
    "TP2+SP, experts": {**TP2, **EXPERTS, "sequence_parallel": True},
    "TP2+SP, whole experts, all to all": {
        **{**TP2, **EP2, **ALL_TO_ALL},
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
    },
    "CP2, EP2, all to all": {**EP2, **ALL_TO_ALL, "context_parallel_size": 2},
    "PP2, experts": {**PP2, **EXPERTS},
}
#: Bytes differ by loop variables that outlive a pass.
TOLERANCE = 0.05


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(1, ALONE), (2, ON_TWO)], ids=["one process", "two"]
)
@pytest.mark.distributed
@pytest.mark.slow
def test_a_simulated_step_is_that_of_real_tensors(ranks, layouts):
    made = run_ranks(ranks, make_steps, layouts, TINY)
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        simulated = pool.submit(simulate_steps, layouts, TINY, ranks).result()
    problems = []
    for name, layout in layouts.items():
        stages = layout.get("pipeline_model_parallel_size", 1)
        for stage in range(stages):
            real, guess = made[stage * ranks // stages][name], simulated[name].stages[stage]
            problems += [f"{name}, stage {stage}: {each}" for each in differences(real, guess)]
    assert problems == []


def make_steps(layouts, sizes):
    """What a real step takes on this rank, by layout."""
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    from benchmarks.parallel_cost import measure
    from retro_mcore.training.loop.optimizer import release_functions

    found = {}
    for name, layout in layouts.items():
        trainer, _, found[name] = measure(layout, sizes, None, evenly=True)
        release_functions(trainer._parts.stages)
    return found


def simulate_steps(layouts, sizes, ranks):
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    from benchmarks.parallel_cost import plan_of
    from retro_mcore.training.setup.simulate import simulate

    return {name: simulate(plan_of(layout, sizes, None), ranks) for name, layout in layouts.items()}


def differences(real, guess):
    """What is further apart than it may be."""
    if abs(guess.peak / real.peak - 1) > TOLERANCE:
        yield f"peak {guess.peak}, really {real.peak}"
    for kind, count in real.memory.items():
        if abs(guess.memory[kind] - count) > TOLERANCE * real.peak:
            yield f"{kind} {guess.memory[kind]}, really {count}"
    if guess.sent != real.sent:
        yield f"sent {guess.sent}, really {real.sent}"
    if guess.flops != real.flops:
        yield f"FLOPs {guess.flops}, really {real.flops}"
