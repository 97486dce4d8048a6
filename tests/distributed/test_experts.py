"""A model with experts gives losses and gradient norms of one process under every layout, and its
checkpoints change layout."""

from __future__ import annotations

import pytest
import torch

from tests.processes import run_ranks
from tests.unit.checkpoint.families import save_model
from tests.unit.training.test_token_mean import run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("megatron")]

# Positions that count, by sample: on two ranks a whole micro batch holds none.
COUNTS = [0, 0, 31, 2, 9, 1, 32, 17] * 3
MODEL = {
    "num_layers": 4,
    "retro_decoder_layers": [2, 3],
    "num_experts": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "disable_bias_linear": True,
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.05,
    "micro_batch_size": 2,
}
EXPERTS = {"expert_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CONTEXT = {"context_parallel_size": 2}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "EP2, distributed optimizer": {**EXPERTS, **DISTRIBUTED},
    "TP2 with SP": TENSOR,
    "CP2, EP2": {**CONTEXT, **EXPERTS},
    "CP2": CONTEXT,
    "CP2, all to all, distributed optimizer": {**CONTEXT, **ALL_TO_ALL, **DISTRIBUTED},
    "CP2, recomputed": {**CONTEXT, **FULL},
    "EP2": EXPERTS,
    "DP2": {},
    "EP2, all to all": {**EXPERTS, **ALL_TO_ALL},
    "TP2 with SP, all to all": {**TENSOR, **ALL_TO_ALL},
    "TP2 with SP, whole experts": {**TENSOR, **EXPERTS, "expert_tensor_parallel_size": 1},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 of 2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "EP2, recomputed": {**EXPERTS, **FULL},
    "TP2 with SP, recomputed experts": {
        **TENSOR,
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
    },
}
FEW = list(LAYOUTS)[:3]
FOUR = {
    "TP2 with SP, EP2": {**TENSOR, **EXPERTS},
    "EP2, DP2, distributed optimizer": {**EXPERTS, **DISTRIBUTED},
    "CP2, EP2, DP2": {**CONTEXT, **EXPERTS},
    "CP2, TP2 with SP, EP2": {**CONTEXT, **TENSOR, **EXPERTS},
    "PP2, EP2": {"pipeline_model_parallel_size": 2, **EXPERTS},
}
# Sums of float32 in another order.
LOSS, NORM = {"rel": 1e-5}, {"rel": 1e-4}
# One process stops after the first iteration, the layout after the second; one process trains the
# third.
FIRST, SECOND = 1, 2


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, megatron):
    directory = str(tmp_path_factory.mktemp("one_process"))
    run(COUNTS, **MODEL, save=directory, exit_interval=FIRST)
    run(COUNTS, **MODEL, **DISTRIBUTED, save=f"{directory}/distributed", exit_interval=FIRST)
    return directory, run(COUNTS, **MODEL, load=directory)


def on_one_rank(begun, folder, layouts):
    results = {}
    for name, layout in layouts.items():
        load = f"{begun}/distributed" if "use_distributed_optimizer" in layout else begun
        places = {"load": load, "save": f"{folder}/{name}", "exit_interval": SECOND}
        results[name] = run(COUNTS, **MODEL, **layout, **places)
        results[name, "parameters"] = parameters_on_one_rank(layout)
    return results


def parameters_on_one_rank(layout):
    """The whole model's number of parameters, and the one that is planned with."""
    from retro_mcore.training.loop.resume import num_parameters
    from retro_mcore.training.setup.build import build_model_stages
    from retro_mcore.training.setup.estimate import count_parameters
    from tests.unit.training.small import small_plan

    plan = small_plan(**{**MODEL, **layout, "retro_decoder_layers": [2]})
    models = build_model_stages(plan.arguments, plan.options)  # in the groups of the run before
    return num_parameters(models), count_parameters(models[0].config, plan.arguments).total


def compare(one_process, folder, processes, layouts):
    begun, (losses, norms, valid) = one_process
    found = run_ranks(processes, on_one_rank, begun, str(folder), layouts)[0]
    for name, layout in layouts.items():
        optimizer = DISTRIBUTED if "use_distributed_optimizer" in layout else {}
        last = run(COUNTS, **MODEL, **optimizer, load=f"{folder}/{name}")
        assert found[name][0] + last[0] == pytest.approx(losses, **LOSS), name
        assert found[name][1] + last[1] == pytest.approx(norms, **NORM), name
        assert last[2] == pytest.approx(valid, **LOSS), name
        counted, planned = found[name, "parameters"]
        assert counted == planned, name


def test_two_processes_continue_one_and_one_continues_them(one_process, tmp_path):
    compare(one_process, tmp_path, 2, {name: LAYOUTS[name] for name in FEW})


@pytest.mark.slow
def test_every_layout_of_two_processes(one_process, tmp_path):
    compare(one_process, tmp_path, 2, LAYOUTS)


@pytest.mark.slow
def test_every_layout_of_four_processes(one_process, tmp_path):
    compare(one_process, tmp_path, 4, FOUR)


def weights_on_one_rank(layouts, gpt=None):
    """The whole model's weights, as initialized, or from a GPT, under each layout."""
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.checkpoint.conversion.model_weights import gather_weights
    from retro_mcore.training.options.from_checkpoint import model_options_of_gpt
    from retro_mcore.training.setup.build import build_model_stages
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds
    from retro_mcore.training.setup.retrofit import resolved_flags
    from tests.unit.training.small import small_plan

    taken = {} if gpt is None else model_options_of_gpt(gpt)
    results = {}
    for name, layout in layouts.items():
        changes = {**MODEL, **layout} if gpt is None else {**taken, **layout}
        plan = small_plan(**{**changes, "retro_decoder_layers": [2]})
        options = plan.options
        initialize_parallel(
            options.tensor_model_parallel_size,
            expert_model_parallel_size=options.expert_model_parallel_size,
            expert_tensor_parallel_size=options.expert_tensor_parallel_size,
        )
        set_seeds(1)
        models = build_model_stages(plan.arguments, options)
        if gpt is not None:
            load_gpt(models, gpt, resolved_flags(plan.arguments), 100)
        results[name] = gather_weights(models)
    return results


SPREAD = {
    "EP2": EXPERTS,
    "TP2 with SP, whole experts": LAYOUTS["TP2 with SP, whole experts"],
}


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_how_experts_are_divided(megatron):
    expected = weights_on_one_rank({"one": {}})["one"]
    found = run_ranks(2, weights_on_one_rank, SPREAD)[1]
    for name, weights in found.items():
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items()), name


@pytest.mark.slow
def test_each_rank_takes_its_experts_of_a_hugging_face_model(megatron, tmp_path):
    save_model("Qwen 2 MoE", tmp_path)
    expected = weights_on_one_rank({"one": {}}, str(tmp_path))["one"]
    found = run_ranks(2, weights_on_one_rank, {**SPREAD, "TP2": TENSOR}, str(tmp_path))[1]
    decoder = [key for key in expected if key.startswith("decoder.") and "cross_att" not in key]
    for name, weights in found.items():
        assert all(torch.equal(weights[key], expected[key]) for key in decoder), name
