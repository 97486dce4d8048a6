"""muP: the activations' scale is the same at every width, at the start and after steps of Adam."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import MODEL_KEYS, SMALL, make_inputs, run_model

WIDTHS = (64, 128, 256, 512)
BASE = 64


def build(width, mup, seed=0, **overrides):
    """As it is initialised, with ordinary training in mind."""
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec

    torch.manual_seed(seed)
    fields = {
        **SMALL,
        "num_layers": 2,
        "retro_decoder_layers": [2],
        "retro_encoder_num_layers": 1,
        "hidden_size": width,
        "ffn_hidden_size": 2 * width,
        "init_method_std": 0.1,
        "retro_mup_base_hidden_size": BASE if mup else None,
        **overrides,
    }
    model_kwargs = {key: fields.pop(key) for key in MODEL_KEYS if key in fields}
    config = RetroConfig(**fields)
    spec = get_retro_decoder_block_spec(config)
    return RetroModel(config, spec, vocab_size=96, max_sequence_length=64, **model_kwargs)


def train(model, steps, lr):
    """Adam, with the learning rates that muP asks for."""
    from retro_mcore.model.initialization import SCALED_LEARNING_RATE, learning_rate_scale

    scale = learning_rate_scale(model.config)
    groups = {scale: [], 1.0: []}
    for parameter in model.parameters():
        groups[scale if hasattr(parameter, SCALED_LEARNING_RATE) else 1.0].append(parameter)
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": lr * scale} for scale, parameters in groups.items()]
    )
    inputs = make_inputs(model.config)
    for _ in range(steps):
        optimizer.zero_grad()
        run_model(model, inputs, labels=inputs["labels"]).mean().backward()
        optimizer.step()


@torch.no_grad()
def activations(model):
    """Root mean squares: of the logits, the last layer, the encoder, what cross-attention adds."""
    found = {}

    def remember(name, pick):
        return lambda module, args, output: found.update({name: pick(output)})

    layer = model.decoder.layers[-1]
    hooks = [
        layer.register_forward_hook(remember("last layer", lambda output: output[0])),
        layer.mlp.register_forward_hook(remember("MLP", lambda output: output[0])),
        layer.cross_attention.register_forward_hook(
            remember("cross-attention", lambda output: output["output"])
        ),
        model.neighbor_encoder.register_forward_hook(remember("encoder", lambda output: output)),
    ]
    found["logits"] = run_model(model, make_inputs(model.config))
    for hook in hooks:
        hook.remove()
    return {name: states.square().mean().sqrt().item() for name, states in found.items()}


def trained(width, mup, seeds=2):
    """Mean over initialisations."""
    runs = []
    for seed in range(seeds):
        model = build(width, mup, seed)
        train(model, steps=4, lr=0.005)
        runs.append(activations(model))
    return {name: sum(run[name] for run in runs) / seeds for name in runs[0]}


def test_flat_over_widths_under_mup_and_drifting_without(megatron):
    with_mup, without = ([trained(width, mup) for width in WIDTHS] for mup in (True, False))
    for name in with_mup[0]:
        flat, drifting = ([run[name] for run in runs] for runs in (with_mup, without))
        assert max(flat) / min(flat) < 1.8, (name, flat)
        assert drifting[-1] / drifting[0] > 3, (name, drifting)


def test_nothing_changes_at_the_base_width(megatron):
    mup, plain = build(BASE, mup=True), build(BASE, mup=False)
    for (name, mine), theirs in zip(mup.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    inputs = make_inputs(mup.config)
    torch.testing.assert_close(run_model(mup.eval(), inputs), run_model(plain.eval(), inputs))


def test_attention_scales_with_one_over_the_channels(megatron):
    """Wider heads: sqrt(base) / channels, in both cross-attentions and the encoder too."""
    model = build(128, mup=True, kv_channels=32, retro_mup_base_kv_channels=8)
    for layer in (model.decoder.layers[1], model.neighbor_encoder.layers[0]):
        for attention in (layer.self_attention, layer.cross_attention):
            assert attention.core_attention.softmax_scale == pytest.approx(8**0.5 / 32)
    narrow = build(128, mup=True, retro_encoder_hidden_size=64)  # heads of 32 and of 16 channels
    encoder = narrow.neighbor_encoder.layers[0].self_attention.core_attention
    assert encoder.softmax_scale == pytest.approx(16**-0.5)


def test_who_learns_at_which_rate(megatron):
    from retro_mcore.model.initialization import SCALED_LEARNING_RATE, learning_rate_scale

    model = build(256, mup=True, retro_encoder_hidden_size=128)
    assert learning_rate_scale(model.config) == 0.25
    scaled = {n for n, p in model.named_parameters() if hasattr(p, SCALED_LEARNING_RATE)}
    vectors = {n for n, p in model.named_parameters() if p.dim() == 1}
    ordinary = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight"}
    ordinary |= {"output_layer.weight", *vectors}
    assert scaled == {name for name, _ in model.named_parameters()} - ordinary
