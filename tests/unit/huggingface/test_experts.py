"""Mixtures of experts of RetroForCausalLM in training, and options that cannot work."""

from __future__ import annotations

import pytest
import torch

from tests.unit.huggingface.test_model import sample, small_config, small_model

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 8, "disable_bias_linear": True}
SHARED = {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True}


def test_autocast(megatron):
    """A forward and a backward pass; the router keeps its precision."""
    model = small_model(**EXPERTS, **SHARED).float().train()
    router, inputs = model.model.layers[0].mlp.router, sample()
    states = torch.randn(16, 32)
    wanted = router(states)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(states)[0], wanted)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".mlp." in name]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0


def test_every_expert_has_a_gradient(megatron):
    """Experts that no token chose have zeros, and the numbers are those of evaluation."""
    layer = small_model(**EXPERTS).model.layers[0].mlp
    states = torch.randn(1, 1, 32, dtype=torch.float64)
    wanted = layer(states)
    found = layer.train()(states)
    assert torch.equal(found, wanted)
    found.sum().backward()
    chosen = set(layer.router(states[0])[1].flatten().tolist())
    for number, expert in enumerate(layer.experts):
        assert all(p.grad is not None for p in expert.parameters())
        assert any(p.grad.any() for p in expert.parameters()) == (number in chosen)


def test_megatrons_number_of_layers():
    config = small_config(moe_layer_freq=3, **EXPERTS)
    assert [layer for layer in range(1, 5) if config.has_experts(layer)] == [1, 4]
    assert small_config(**config.to_dict()).moe_layer_freq == [3]
    every = small_config(moe_layer_freq=1, **EXPERTS)
    assert all(every.has_experts(layer) for layer in range(1, 5))


GROUPS = {**EXPERTS, "moe_router_num_groups": 2, "moe_router_group_topk": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**EXPERTS, "moe_layer_freq": [-1]}, r"moe_layer_freq is \[-1\]"),
        ({**EXPERTS, "moe_layer_freq": 0}, r"moe_layer_freq is \[0\]"),
        ({**EXPERTS, "moe_layer_freq": [2, 1]}, r"moe_layer_freq is \[2, 1\]"),
        ({**EXPERTS, "moe_layer_freq": [0, 0, 0, 0]}, "with at least one 1"),
        ({**EXPERTS, "num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq needs num_experts"),
        ({**GROUPS, "moe_router_num_groups": 3}, "num_groups is 3 for 4 experts"),
        ({**GROUPS, "moe_router_group_topk": 3}, "from 3 groups"),
        ({**GROUPS, "moe_router_topk": 3}, "of which 3 from 1 groups"),
        ({**EXPERTS, "moe_router_num_groups": 2}, "are given together"),
        ({**EXPERTS, "moe_router_topk": 5}, "moe_router_topk is 5 of 4 experts"),
        ({**EXPERTS, "moe_router_topk": 1}, "moe_router_topk is 1.*without moe_router_pre_softmax"),
        ({**EXPERTS, "moe_router_topk_scaling_factor": 0.0}, "expected a positive number"),
        ({**EXPERTS, "moe_shared_expert_gate": True}, "moe_shared_expert_gate needs"),
        ({**EXPERTS, "retro_deepnorm": True}, "retro_deepnorm does not cover experts"),
        ({**EXPERTS, "retro_mup_base_hidden_size": 16}, "mup_base_hidden_size does not cover"),
        ({"no_rope_layers": [5]}, r"no_rope_layers is \[5\], expected numbers from 1 to 4"),
        ({"rotary_local_base": 9, "rotary_local_layers": [0]}, r"rotary_local_layers is \[0\]"),
        ({"rotary_attention_factor": 2.0}, "rotary_attention_factor needs rotary_frequencies"),
        ({"qk_layernorm_over": "all_heads", "normalization": "RMSNorm"}, "needs qk_layernorm"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_config(**options)


def test_megatrons_number_for_windows():
    config = small_config(sliding_window=8, window_attn_skip_freq=3)
    assert config.window_attn_skip_freq == [3]
