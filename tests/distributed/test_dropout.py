"""Dropout under sequence parallelism: one stream of random numbers for decoder and encoder."""

from __future__ import annotations

import pytest
import torch

from tests.processes import join_megatron, run_ranks
from tests.unit.model.builders import build_model, make_inputs, run_model

pytestmark = pytest.mark.distributed

RATES = ("hidden", "attention", "retro_encoder_hidden", "retro_encoder_attention")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_recomputation_draws_the_same_masks_and_no_stream_repeats(megatron):
    for rank in run_ranks(2, with_and_without_recomputation):
        states = rank["states"]
        assert len({state.numpy().tobytes() for state in states}) == len(states)
        for name, wanted in rank["kept"].items():
            assert torch.equal(rank["recomputed"][name], wanted), name


def with_and_without_recomputation():
    join_megatron(tensor_model_parallel_size=2)
    kept, states = gradients_and_states()
    recomputed, _ = gradients_and_states(**FULL)
    return {"kept": kept, "recomputed": recomputed, "states": states}


def gradients_and_states(**fields):
    """Every gradient, and the random state with which each layer began, the encoder's too."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    dropout = dict.fromkeys((f"{rate}_dropout" for rate in RATES), 0.3)
    model = build_model(
        tensor_model_parallel_size=2, sequence_parallel=True, **dropout, **fields
    ).train()
    states = []
    for layer in (*model.decoder.layers, *model.neighbor_encoder.layers):
        layer.register_forward_pre_hook(lambda *_: states.append(torch.cuda.get_rng_state()))
    inputs = make_inputs(model.config)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    run_model(model, inputs, labels=inputs["labels"]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, states
