"""DeepNorm: its formula, its scales, and that the depth does not show in a step's effect."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import build_model, make_inputs, run_model


def config_of(**overrides):
    from retro_mcore import RetroConfig
    from tests.unit.model.builders import SMALL

    return RetroConfig(**{**SMALL, "retro_deepnorm": True, **overrides})


def test_the_papers_scales(megatron):
    """Table of figure 2: an encoder-decoder has cross-attention in every decoder layer."""
    config = config_of(num_layers=18, retro_decoder_layers=list(range(1, 19)))
    assert config.deepnorm_alpha == pytest.approx((3 * 18) ** 0.25)
    assert config.deepnorm_beta == pytest.approx((12 * 18) ** -0.25)
    encoder = config.encoder_config()
    assert encoder.deepnorm_alpha == pytest.approx(0.81 * (2**4 * 18) ** (1 / 16))
    assert encoder.deepnorm_beta == pytest.approx(0.87 * (2**4 * 18) ** (-1 / 16))
    sparse = config_of(num_layers=100, retro_decoder_layers=[50])  # nearly decoder only
    assert sparse.deepnorm_alpha == pytest.approx((2 * 100 + 1) ** 0.25)


@pytest.mark.parametrize("fields", [{}, {"num_query_groups": 2, "retro_encoder_hidden_size": 24}])
def test_initial_weights_are_xaviers_times_beta(megatron, fields):
    model = build_model(
        retro_deepnorm=True, hidden_size=256, ffn_hidden_size=512, init_method_std=0.02, **fields
    )
    config, layer = model.config, model.decoder.layers[1]
    channels, width = config.kv_channels, config.hidden_size
    groups = config.num_query_groups
    qkv = layer.self_attention.linear_qkv.weight.unflatten(0, (groups, -1, channels))
    key_value = layer.cross_attention.linear_kv.weight.unflatten(0, (groups, 2, channels))
    kv, encoder = channels * groups, config.encoder_hidden_size
    beta = config.deepnorm_beta
    for weight, fan_in, fan_out, gain in (
        (qkv[:, :-2], width, width, 1),
        (qkv[:, -2], width, kv, 1),
        (qkv[:, -1], width, kv, beta),
        (layer.self_attention.linear_proj.weight, width, width, beta),
        (layer.cross_attention.linear_q.weight, width, width, 1),
        (key_value[:, 0], encoder, kv, 1),
        (key_value[:, 1], encoder, kv, beta),
        (layer.cross_attention.linear_proj.weight, width, width, beta),
        (layer.mlp.linear_fc1.weight, width, 512, beta),
        (layer.mlp.linear_fc2.weight, 512, width, beta),
    ):
        wanted = gain * (2 / (fan_in + fan_out)) ** 0.5
        assert weight.std().item() == pytest.approx(wanted, rel=0.05)


def test_positions_without_neighbors_stay_as_they_are(megatron):
    """Also with a norm after cross-attention: all masked equals retrieval off, bit for bit."""
    model = build_model(retro_deepnorm=True)
    inputs = make_inputs(model.config)
    masked = run_model(model, {**inputs, "mask": torch.ones_like(inputs["mask"])})
    assert torch.equal(masked, run_model(model, {**inputs, "retrieved": None, "mask": None}))
    model.config.retro_attention_gate = 0.0
    assert torch.equal(masked, run_model(model, inputs))


def deep_model(num_layers, **overrides):
    """As it is initialised: norms of one, biases of zero."""
    torch.manual_seed(3)
    model = build_model(
        num_layers=num_layers,
        hidden_size=32,
        ffn_hidden_size=64,
        retro_decoder_layers=[num_layers // 2, num_layers],
        init_method_std=0.02,
        **overrides,
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
    return model


def change_after_a_step(model):
    """How far one step down the gradient moves the last layer's states, root mean square."""
    inputs = make_inputs(model.config)
    before = last_states(model, inputs)
    run_model(model, inputs, labels=inputs["labels"]).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return (last_states(model, inputs) - before).square().mean().sqrt().item()


def last_states(model, inputs):
    states = []
    hook = model.decoder.layers[-1].register_forward_hook(
        lambda module, args, output: states.append(output[0])
    )
    with torch.no_grad():
        run_model(model, inputs)
    hook.remove()
    return states[0]


def post_norm_model(num_layers, monkeypatch):
    """The same layers without DeepNorm's scales: Norm(x + f(x)), Xavier's weights."""
    from retro_mcore import RetroConfig

    def plain(self):
        self.output_layer_init_method, self.retro_final_layernorm = self.init_method, False

    monkeypatch.setattr(RetroConfig, "_derive_deepnorm", plain)
    return deep_model(num_layers, retro_deepnorm=True)


def test_a_steps_effect_does_not_grow_with_the_depth(megatron, monkeypatch):
    """Section 4 of the paper: the update is bounded, with gradient descent as there."""
    shallow, deep = (change_after_a_step(deep_model(n, retro_deepnorm=True)) for n in (6, 96))
    assert 0.5 < deep / shallow < 1.5
    shallow_plain, deep_plain = (change_after_a_step(deep_model(n)) for n in (6, 96))
    assert deep_plain / shallow_plain > 5
    with monkeypatch.context() as patch:
        assert change_after_a_step(post_norm_model(96, patch)) / deep > 5
