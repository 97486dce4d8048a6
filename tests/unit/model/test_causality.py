"""What may change what: tokens, neighbors, padding and missing neighbors, by perturbation."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import VOCABULARY, build_model, make_inputs, run_model

CHUNK_LENGTH, SEQUENCE_LENGTH = 8, 32


@pytest.fixture(params=["learned_absolute", "rope"])
def model(megatron, request):
    # float64: a position that changes at all is told from one that does not.
    return build_model(position_embedding_type=request.param).double()


def changed_positions(model, inputs, perturbed, sample=0):
    """The positions of a sample whose logits differ."""
    with torch.no_grad():
        difference = run_model(model, inputs) - run_model(model, perturbed)
    return difference[sample].abs().amax(dim=-1).gt(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("position", [0, 7, 8, 20, 31])
def test_a_token_changes_nothing_before_it(model, position):
    inputs = make_inputs(model.config)
    tokens = inputs["tokens"].clone()
    tokens[0, position] = (tokens[0, position] + 1) % VOCABULARY
    changed = changed_positions(model, inputs, {**inputs, "tokens": tokens})
    assert changed == list(range(position, SEQUENCE_LENGTH))


@pytest.mark.parametrize("layers", [None, 2, [1, 1, 0, 1]])
def test_a_token_reaches_as_far_as_the_windows(megatron, layers):
    """Without neighbors: one window further in every layer that has one, to the end in others."""
    model = build_model(window_size=(3, 0), window_attn_skip_freq=layers, num_layers=4).double()
    inputs = {**make_inputs(model.config), "retrieved": None, "mask": None}
    tokens = inputs["tokens"].clone()
    tokens[0, 5] = (tokens[0, 5] + 1) % VOCABULARY
    changed = changed_positions(model, inputs, {**inputs, "tokens": tokens})
    end = 5 + 4 * 3 + 1 if layers is None else SEQUENCE_LENGTH
    assert changed == list(range(5, end))


@pytest.mark.parametrize("chunk", range(SEQUENCE_LENGTH // CHUNK_LENGTH))
def test_neighbors_reach_from_the_last_token_of_their_chunk_on(model, chunk):
    inputs = make_inputs(model.config)
    retrieved = inputs["retrieved"].clone()
    retrieved[0, chunk, 0, 0] = (retrieved[0, chunk, 0, 0] + 1) % VOCABULARY
    changed = changed_positions(model, inputs, {**inputs, "retrieved": retrieved})
    assert changed == list(range((chunk + 1) * CHUNK_LENGTH - 1, SEQUENCE_LENGTH))


def test_samples_do_not_see_each_other(model):
    inputs = make_inputs(model.config)
    retrieved, tokens = inputs["retrieved"].clone(), inputs["tokens"].clone()
    retrieved[1] = (retrieved[1] + 1) % VOCABULARY
    tokens[1] = (tokens[1] + 1) % VOCABULARY
    perturbed = {**inputs, "retrieved": retrieved, "tokens": tokens}
    assert changed_positions(model, inputs, perturbed, sample=0) == []
    assert changed_positions(model, inputs, perturbed, sample=1) == list(range(SEQUENCE_LENGTH))


def test_padding_changes_nothing(model):
    inputs = make_inputs(model.config)
    refilled = torch.where(
        inputs["mask"], (inputs["retrieved"] + 17) % VOCABULARY, inputs["retrieved"]
    )
    assert changed_positions(model, inputs, {**inputs, "retrieved": refilled}) == []


def test_a_chunk_without_neighbors_leaves_the_gpt_decoder_alone(model):
    inputs = make_inputs(model.config)
    nothing_missing = torch.ones_like(inputs["mask"])
    without = {**inputs, "retrieved": None, "mask": None}
    with torch.no_grad():
        all_missing = run_model(model, {**inputs, "mask": nothing_missing})
        assert torch.equal(all_missing, run_model(model, without))
    only_chunk_2 = nothing_missing.clone()
    only_chunk_2[0, 2] = inputs["mask"][0, 2]
    changed = changed_positions(model, without, {**inputs, "mask": only_chunk_2})
    assert changed == list(range(3 * CHUNK_LENGTH - 1, SEQUENCE_LENGTH))


def test_the_order_of_neighbors_does_not_matter(model):
    inputs = make_inputs(model.config)
    flipped = {key: inputs[key].flip(2) for key in ("retrieved", "mask")}
    with torch.no_grad():
        torch.testing.assert_close(
            run_model(model, inputs), run_model(model, {**inputs, **flipped}), atol=1e-9, rtol=0
        )


def test_the_order_of_a_neighbors_tokens_matters(model):
    inputs = make_inputs(model.config)
    retrieved = inputs["retrieved"].clone()
    retrieved[0, 0, 0, :2] = retrieved[0, 0, 0, :2].flip(0)
    changed = changed_positions(model, inputs, {**inputs, "retrieved": retrieved})
    assert changed == list(range(CHUNK_LENGTH - 1, SEQUENCE_LENGTH))


@pytest.mark.parametrize("length", range(1, SEQUENCE_LENGTH))
def test_every_prefix_has_the_logits_of_the_whole(model, length):
    inputs = make_inputs(model.config)
    chunks = length // CHUNK_LENGTH
    prefix = {
        "tokens": inputs["tokens"][:, :length],
        "retrieved": inputs["retrieved"][:, :chunks],
        "mask": inputs["mask"][:, :chunks],
    }
    with torch.no_grad():
        whole = run_model(model, inputs)[:, :length]
        torch.testing.assert_close(run_model(model, prefix), whole, atol=1e-9, rtol=0)


def test_a_closed_gate_is_retrieval_off(model):
    inputs = make_inputs(model.config)
    without = run_model(model, {**inputs, "retrieved": None, "mask": None})
    model.config.retro_attention_gate = 0.0
    assert torch.equal(run_model(model, inputs), without)


def test_relative_positions_tell_where_a_neighbors_token_stands(megatron):
    """Without any positions inside the encoder the order of a neighbor's tokens is invisible."""
    fields = {
        "retro_encoder_positions": False,
        "position_embedding_type": "rope",
        "retro_cross_attention_keys": "own",  # those of the token before tell who comes before whom
    }
    blind = build_model(**fields).double()
    seeing = build_model(**fields, retro_cross_attention_positions="rotary").double()
    inputs = {**make_inputs(blind.config), "mask": None}
    swapped = {**inputs, "retrieved": inputs["retrieved"].flip(-1)}
    with torch.no_grad():
        torch.testing.assert_close(run_model(blind, inputs), run_model(blind, swapped))
        difference = (run_model(seeing, inputs) - run_model(seeing, swapped)).abs().max()
    assert difference > 1e-3


def test_retrieval_off_is_megatrons_own_gpt_model(megatron):
    from megatron.core.models.gpt import GPTModel

    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    model = build_model()
    gpt = GPTModel(
        config=model.config,
        transformer_layer_spec=get_gpt_decoder_block_spec(model.config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
    ).eval()
    shared = {name: value for name, value in model.state_dict().items() if name in gpt.state_dict()}
    gpt.load_state_dict(shared, strict=True)
    inputs = {**make_inputs(model.config), "retrieved": None, "mask": None}
    tokens = inputs["tokens"]
    with torch.no_grad():
        expected = gpt(tokens, torch.arange(SEQUENCE_LENGTH).expand_as(tokens), None)
        assert torch.equal(run_model(model, inputs), expected)
