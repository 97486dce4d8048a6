"""Mixtures of experts: what a layer computes, which layers have them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.model.expert_options import expert_layers
from tests.unit.model.builders import build_model, make_inputs, run_model
from tests.unit.training.small import small_options, small_plan

EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
}
ROUTERS = {
    "softmax of the chosen": {},
    "softmax of all, scaled": {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_topk": 3,
    },
    "sigmoid, gated shared expert": {
        "moe_router_score_function": "sigmoid",
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
        "moe_token_dispatcher_type": "alltoall",
    },
    "groups, in fp64": {
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_dtype": "fp64",
    },
}


def in_plain_torch(layer, states, config):
    """What the layer computes, token by token."""
    flat = states.flatten(0, 1).double()
    logits = flat @ layer.router.weight.double().T
    sigmoid = config.moe_router_score_function == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    allowed = torch.zeros_like(scores)
    if config.moe_router_num_groups:
        # One group: that of the best two together (topk / groups of them).
        halves = logits.unflatten(-1, (2, 2)).sum(-1)
        allowed = halves.argmin(-1, keepdim=True) == torch.tensor([0, 0, 1, 1])
    _, chosen = logits.masked_fill(allowed.bool(), -torch.inf).topk(config.moe_router_topk)
    weights = scores.gather(-1, chosen)
    if not config.moe_router_pre_softmax:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * (config.moe_router_topk_scaling_factor or 1.0)
    output = torch.stack([
        sum(w * mlp(layer.experts.local_experts[int(e)], x) for w, e in zip(ws, es, strict=True))
        for x, ws, es in zip(flat, weights, chosen, strict=True)
    ])  # fmt: skip
    if layer.shared_experts is not None:
        gate = (flat @ layer.shared_experts.gate_weight.double().T).sigmoid()
        output = output + gate * mlp(layer.shared_experts, flat)
    return output.view_as(states)


def mlp(module, states):
    gate, up = (states @ module.linear_fc1.weight.double().T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ module.linear_fc2.weight.double().T


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_is_the_weighted_sum_of_the_chosen_experts(megatron, router):
    model = build_model(**EXPERTS, **ROUTERS[router])
    layer = model.decoder.layers[2].mlp
    states = torch.randn(5, 2, 32)
    with torch.no_grad():
        found, bias = layer(states)
    assert bias is None
    expected = in_plain_torch(layer, states, model.config).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_only_the_named_layers_of_the_decoder_have_experts(megatron):
    model = build_model(**EXPERTS, moe_layer_freq=[0, 1, 0, 1])
    sparse = {name.split(".")[2] for name, _ in model.named_parameters() if ".router." in name}
    assert sparse == {"1", "3"}
    assert not [n for n, _ in model.neighbor_encoder.named_parameters() if "expert" in n]
    assert run_model(model, make_inputs(model.config)).isfinite().all()


def test_a_number_names_the_first_of_every_few_layers():
    assert expert_layers(4, None, 3) == expert_layers(4, 1, 3) == [1, 2, 3]
    assert expert_layers(4, [2], 5) == expert_layers(4, 2, 5) == [1, 3, 5]
    assert expert_layers(4, [0, 1, 1], 3) == [2, 3]
    assert expert_layers(None, [2], 5) == []


SPLIT = {"expert_tensor_parallel_size": 2}
BARE = {"disable_bias_linear": True, "num_experts": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_ffn_hidden_size": 8}, "--moe-ffn-hidden-size: 8 without experts"),
        ({**BARE, "moe_router_topk": 5}, "--moe-router-topk: 5 of 4 experts"),
        ({**BARE, "moe_router_topk": 1}, "--moe-router-topk: 1 with a softmax"),
        ({**BARE, "moe_layer_freq": [0]}, r"--moe-layer-freq: \[0\]"),
        ({**BARE, "moe_layer_freq": [0, 0]}, r"--moe-layer-freq: \[0, 0\]"),
        ({**BARE, "moe_layer_freq": [1, 1, 1]}, "--moe-layer-freq: .* model of 2 layers"),
        ({**BARE, "moe_router_num_groups": 2}, "--moe-router-num-groups"),
        ({**BARE, "moe_shared_expert_gate": True}, "--moe-shared-expert-gate"),
        ({"num_experts": 4}, "--num-experts: 4 with biases"),
        ({**BARE, "moe_grouped_gemm": True}, "--moe-grouped-gemm"),
        ({**BARE, "moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor: 1.0"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, message):
    with pytest.raises(RetroError, match=message):
        small_options(**options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**BARE, "retro_deepnorm": True}, "--retro-deepnorm.*experts"),
        ({**BARE, "retro_mup_base_hidden_size": 8}, "--retro-mup-base-hidden-size.*experts"),
        ({**BARE, "parallel_residual": True}, "--parallel-residual.*experts"),
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size: 2 without experts"),
        ({**BARE, "expert_model_parallel_size": 3}, "--expert-model-parallel-size: 3 does not"),
        ({**BARE, "moe_ffn_hidden_size": 9, **SPLIT}, "--moe-ffn-hidden-size: 9"),
        ({**BARE, "tensor_model_parallel_size": 2}, "--sequence-parallel"),
    ],
)
def test_layouts_and_options_that_do_not_go_together_are_refused(megatron, options, message):
    from retro_mcore.training.setup.build import build_model_stages

    plan = small_plan(**options)
    with pytest.raises(ConfigurationError, match=message):
        build_model_stages(plan.arguments, plan.options, plan.options)
