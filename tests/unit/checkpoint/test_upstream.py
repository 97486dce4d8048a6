"""Weights, logits and gradients that megatron-core 0.15.3 itself wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retro_mcore.errors import CheckpointError

CASES = ["l6_k1", "ragged"]
DATA = Path(__file__).parents[2] / "data"


def load_case(name):
    return torch.load(DATA / f"upstream_0_15_3_{name}.pt", weights_only=True)


def upstream_config_fields(stored):
    """The fields of RetroConfig from a stored case's config."""
    return {
        "num_layers": stored["num_layers"],
        "hidden_size": stored["hidden_size"],
        "num_attention_heads": stored["num_attention_heads"],
        "ffn_hidden_size": stored["ffn_hidden_size"],
        "retro_chunk_length": stored["chunk_length"],
        "retro_num_neighbors": stored["num_neighbors"],
        "retro_num_retrieved_chunks": stored["num_retrieved_chunks"],
        "retro_encoder_num_layers": stored["encoder_num_layers"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "retro_encoder_hidden_dropout": 0.0,
        "retro_encoder_attention_dropout": 0.0,
    }


def build_case(case, **overrides):
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec

    stored = case["config"]
    fields = upstream_config_fields(stored)
    config = RetroConfig.from_upstream("mcore-0.15", **{**fields, **overrides})
    positions = case["state_dict"]["embedding.position_embeddings.weight"]
    return RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config),
        vocab_size=stored["vocab_size"],
        max_sequence_length=positions.size(0),
        share_embeddings_and_output_weights=not stored["untie"],
    )


def run_case(model, inputs, **kwargs):
    return model(
        inputs["tokens"],
        inputs["position_ids"],
        None,
        context_input_ids=inputs["context_input_ids"],
        context_position_ids=inputs["context_position_ids"],
        **kwargs,
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_and_losses(megatron, name):
    from retro_mcore.checkpoint.conversion import upstream

    case = load_case(name)
    model = build_case(case)
    upstream.load_state_dict(model, case["state_dict"])
    outputs = case["outputs"]
    torch.testing.assert_close(
        run_case(model, case["inputs"]), outputs["logits"], atol=1e-5, rtol=0
    )
    losses = run_case(model, case["inputs"], labels=case["inputs"]["labels"])
    torch.testing.assert_close(losses, outputs["token_loss"], atol=1e-5, rtol=0)
    double = run_case(model.double(), case["inputs"])
    torch.testing.assert_close(double, outputs["logits_fp64"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_every_parameter(megatron, name):
    from retro_mcore.checkpoint.conversion import upstream

    case = load_case(name)
    model = build_case(case)
    upstream.load_state_dict(model, case["state_dict"])
    losses = run_case(model, case["inputs"], labels=case["inputs"]["labels"])
    mask = case["inputs"]["loss_mask"]
    ((losses * mask).sum() / mask.sum()).backward()
    first = model.config.retro_layer_numbers[0]
    seen = set()
    for name, parameter in model.named_parameters():
        upstream_name = upstream.to_upstream_name(name, first)
        wanted = case["outputs"]["grads"][upstream_name]
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm(), upstream_name
        seen.add(upstream_name)
    assert seen == set(case["outputs"]["grads"])


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_lossless(megatron, name):
    from retro_mcore.checkpoint.conversion import upstream

    case = load_case(name)
    model = build_case(case)
    upstream.load_state_dict(model, case["state_dict"])
    exported = upstream.export_state_dict(model)
    assert exported.keys() == case["state_dict"].keys()
    for key, tensor in exported.items():
        assert torch.equal(tensor, case["state_dict"][key]), key


def test_names_round_trip(megatron):
    from retro_mcore.checkpoint.conversion.upstream import from_upstream_name, to_upstream_name

    for name, _ in build_case(load_case("l6_k1")).named_parameters():
        assert from_upstream_name(to_upstream_name(name, 6), 6) == name


def test_a_state_dict_that_does_not_fit_changes_nothing(megatron):
    from retro_mcore.checkpoint.conversion import upstream

    case = load_case("l6_k1")
    model = build_case(case)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    broken = dict(case["state_dict"])
    removed = "decoder.layers.5.cross_attention.attn.linear_q.weight"
    del broken[removed]
    broken["decoder.final_layernorm.weight"] = torch.zeros(32)
    broken["embedding.position_embeddings.weight"] = torch.zeros(3, 32)
    with pytest.raises(CheckpointError) as caught:
        upstream.load_state_dict(model, broken)
    for problem in (
        f"missing {removed}",
        "unknown decoder.final_layernorm.weight",
        "embedding.position_embeddings.weight is (3, 32)",
    ):
        assert problem in str(caught.value)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
