"""The MLP that recomputes its activation equals Megatron's, bit for bit, and keeps less."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import SMALL


def tanh_gelu(states):
    """In PyTorch's elementary functions, as Megatron's: each keeps something."""
    return 0.5 * states * (1 + torch.tanh(0.79788456 * states * (1 + 0.044715 * states * states)))


VARIANTS = {
    "GELU": {},
    "GELU, no biases": {"add_bias_linear": False},
    "tanh GELU": {"activation_func": tanh_gelu},
    "SwiGLU": {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
}


def build_mlps(**overrides):
    """Megatron's own MLP, and ours with its weights."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from retro_mcore import RetroConfig
    from retro_mcore.platform.mlp import RecomputingMLP

    config = RetroConfig(**{**SMALL, **overrides})
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    megatrons = MLP(config, linears, ffn_hidden_size=config.ffn_hidden_size)
    ours = RecomputingMLP(config)
    ours.load_state_dict(megatrons.state_dict())
    return megatrons, ours


def step(mlp, states):
    """Output, bias, all gradients, and the bytes kept for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    states = states.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, bias = mlp(states)
    for parameter in mlp.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    output.square().sum().backward()
    gradients = [p.grad for p in mlp.parameters() if p.grad is not None]
    return [output, bias, states.grad, *gradients], sum(kept.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_megatrons_and_keeps_less(megatron, variant):
    megatrons, ours = build_mlps(**VARIANTS[variant])
    states = torch.randn(6, 3, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    expected, kept_by_megatron = step(megatrons, states)
    found, kept = step(ours, states)
    for mine, wanted in zip(found, expected, strict=True):
        assert (mine is None and wanted is None) or torch.equal(mine, wanted)
    wide = 4 * states[..., 0].numel() * SMALL["ffn_hidden_size"]  # bytes of one wide activation
    saved = {"SwiGLU": 3, "tanh GELU": 5}.get(variant, 1)
    assert kept_by_megatron - kept >= saved * wide
    assert torch.equal(ours(states)[0], megatrons(states)[0])  # as evaluation does


def test_the_model_uses_it(megatron):
    from retro_mcore.platform.mlp import RecomputingMLP
    from tests.unit.model.builders import build_model

    model = build_model()
    layers = [*model.decoder.layers, *model.neighbor_encoder.layers]
    assert all(type(layer.mlp) is RecomputingMLP for layer in layers)
