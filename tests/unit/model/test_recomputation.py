"""Selective recomputation changes no gradient."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import build_model, make_inputs, run_model

DROPOUT = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "retro_encoder_hidden_dropout": 0.1,
    "retro_encoder_attention_dropout": 0.1,
}


def gradients(megatron_seed=7, **overrides):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    model = build_model(**DROPOUT, **overrides).train()
    inputs = make_inputs(model.config)
    model_parallel_cuda_manual_seed(megatron_seed, force_reset_rng=True)
    run_model(model, inputs, labels=inputs["labels"]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("modules", [["core_attn"], ["layernorm"], ["mlp"], ["layernorm", "mlp"]])
def test_selective_recomputation_with_dropout(megatron, modules):
    expected = gradients()
    found = gradients(recompute_granularity="selective", recompute_modules=modules)
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name
