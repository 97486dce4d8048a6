"""Counted parameters and memory against models that were built."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.processes import START_METHOD, run_ranks
from tests.unit.checkpoint.test_huggingface import arguments, tokens_of_test

BASE = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "retro_decoder_layers": [3, 5],
}
MODELS = {
    "plain": {},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "llama": {
        "num_query_groups": 2,
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
        "kv_channels": 16,
    },
    "qwen": {"disable_bias_linear": True, "add_qkv_bias": True, "qk_layernorm": True},
    "like Gemma": {"geglu": True, "normalization": "RMSNorm", "sublayer_norms": "both"},
    "like OLMo": {
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "sublayer_norms": "post",
        "qk_layernorm": True,
        "qk_layernorm_over": "all_heads",
    },
    "GPT": {"no_retrieval": True},
    "like Qwen 2 MoE": {
        "num_experts": 4,
        "moe_layer_freq": [0, 1, 1, 0, 1, 1],
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
        "swiglu": True,
        "disable_bias_linear": True,
    },
    "mcore-0.15": {"retro_origin": "mcore-0.15"},
}
LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},  # experts need it
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 x VPP3": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 3,
    },
}


@pytest.mark.parametrize("model", MODELS)
def test_parameters_of_a_built_model(megatron, model):
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model
    from retro_mcore.training.setup.estimate import count_parameters

    model_arguments = arguments(**{**BASE, **MODELS[model]})
    built = build_model(model_arguments, ParallelOptions(device="cpu"))
    counted = count_parameters(built.config, model_arguments)
    assert counted.total == sum(parameter.numel() for parameter in built.parameters())
    retrieval = ("neighbor_encoder", "cross_att")
    of_retrieval = [
        p.numel() for n, p in built.named_parameters() if any(r in n for r in retrieval)
    ]
    assert counted.retrieval == sum(of_retrieval)


@pytest.mark.parametrize(("bf16", "adam", "sgd"), [(False, 8, 4), (True, 12, 8)])
def test_each_optimizer_has_its_own_state(megatron, bf16, adam, sgd):
    from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
    from retro_mcore.training.setup.build import build_config
    from retro_mcore.training.setup.estimate import count_parameters, estimate_memory

    model = arguments(**BASE)
    config = build_config(model, ParallelOptions(device="cpu", bf16=bf16), RecomputeOptions())
    counted = count_parameters(config, model)
    states = {
        name: estimate_memory(config, model, 1, 1, 1, False, name).optimizer
        for name in ("adam", "sgd", "muon", "lion")
    }
    assert states["adam"] == counted.total * adam
    assert states["sgd"] == counted.total * sgd
    assert states["muon"] == counted.total * sgd + counted.embedding * (adam - sgd)
    assert states["lion"] == states["muon"]


@pytest.mark.parametrize("name", MODELS)
def test_soap_keeps_squares_of_every_matrix(megatron, name):
    from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
    from retro_mcore.training.setup.build import build_config, build_model
    from retro_mcore.training.setup.estimate import estimate_memory

    model, parallel = arguments(**{**BASE, **MODELS[name]}), ParallelOptions(device="cpu")
    config = build_config(model, parallel, RecomputeOptions())
    matrices = [
        weight.shape
        for name, weight in build_model(model, parallel).named_parameters()
        if weight.dim() == 2 and "embedding" not in name and "output_layer" not in name
    ]
    memory = {
        optimizer: estimate_memory(config, model, 1, 1, 1, False, optimizer).optimizer
        for optimizer in ("adam", "soap")
    }
    squares = sum(2 * (rows**2 + columns**2) for rows, columns in matrices)
    assert memory["soap"] - memory["adam"] == 4 * squares


@pytest.mark.distributed
@pytest.mark.slow
def test_weights_of_every_rank(megatron):
    ranks = run_ranks(2, weights_of_layouts)
    for name in ranks[0]:  # which of them needs most depends on activations too
        assert ranks[0][name][1] in [rank[name][0] for rank in ranks], name


def weights_of_layouts():
    """Bytes of this rank's weights, and the estimate of the largest rank's, by model and layout."""
    from retro_mcore.training.setup.estimate import estimate_memory
    from tests.distributed.test_load_gpt import build

    found = {}
    for layout, sizes in LAYOUTS.items():  # outside: models of one layout share its groups
        for model, changes in MODELS.items():
            flags = {**BASE, **changes}
            from retro_mcore.platform import setup_device

            setup_device("cpu")
            chunks = build(sizes, **flags)
            numel = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            estimate = estimate_memory(chunks[0].config, arguments(**flags), 1, 4, 1, False)
            found[f"{model}, {layout}"] = (4 * numel, estimate.weights)
    return found


@pytest.mark.parametrize("model", ["plain", "llama", "GPT"])
def test_activations_are_of_the_right_size(megatron, model):
    """Within a factor of two of what a forward pass keeps, without dropout, in fp32."""
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model
    from retro_mcore.training.setup.estimate import estimate_memory

    flags = {**BASE, "hidden_size": 64, **MODELS[model]}
    model_arguments = replace(arguments(**flags), padded_vocab_size=128)
    built = build_model(model_arguments, ParallelOptions(device="cpu")).train()
    estimate = estimate_memory(built.config, model_arguments, 2, 1, 1, False)
    kept = kept_bytes(built, model_arguments)
    assert 0.5 < estimate.activations / kept < 2


def kept_bytes(model, model_arguments) -> int:
    tokens = tokens_of_test()
    context = {}
    if not model_arguments.no_retrieval:
        rows = 2 * (tokens.size(1) // 8) * 2
        context["context_input_ids"] = tokens[:1, :16].expand(rows, 16).contiguous()
    storages = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens, **context)
    return sum(size for size, _ in storages.values())


SIZES = {"layers": 4, "hidden": 64, "length": 256, "batch": 2, "vocabulary": 512}
DROPOUT = {"hidden_dropout": 0.1, "retro_encoder_hidden_dropout": 0.1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SIMULATED = {
    "dropout": (1, DROPOUT),
    "dropout, bf16": (1, {**DROPOUT, "bf16": True}),
    "dropout, full recomputation, bf16": (1, {**DROPOUT, **FULL, "bf16": True}),
    "dropout, sequence parallel, bf16": (
        2,
        {**DROPOUT, "tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": True},
    ),
    "dropout, PP2": (2, {**DROPOUT, "pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "experts": (1, {"num_experts": 4, "disable_bias_linear": True}),
}


@pytest.mark.slow
def test_activations_are_near_those_of_a_simulated_step():
    """Without attention dropout, for which the CPU keeps scores, and gated MLPs, for which local
    layers keep more than fused ones."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        found = pool.submit(estimated_and_simulated).result()
    problems = {name: pair for name, pair in found.items() if not 0.85 < pair[0] / pair[1] < 1.1}
    assert problems == {}


def estimated_and_simulated():
    """Bytes beside weights, gradients and optimizer state on the largest rank, both ways."""
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    from benchmarks.parallel_cost import plan_of
    from retro_mcore.training.setup.build import build_config
    from retro_mcore.training.setup.estimate import estimate_memory
    from retro_mcore.training.setup.simulate import simulate

    found = {}
    for name, (ranks, layout) in SIMULATED.items():
        plan = plan_of(layout, SIZES, None)
        config = build_config(plan.arguments, plan.options, plan.options)
        estimate = estimate_memory(config, plan.arguments, 1, SIZES["batch"], 1, False)
        largest = max(simulate(plan, ranks).stages, key=lambda stage: stage.peak)
        kinds = (largest.memory[kind] for kind in ("activations", "temporary"))
        found[name] = estimate.activations, sum(kinds)
    return found
