"""RetroConfig names the field that cannot work."""

from __future__ import annotations

import pytest

from retro_mcore.errors import ConfigurationError, ShapeError
from tests.unit.model.builders import SMALL, build_model, make_inputs, run_model


def make_config(**overrides):
    from retro_mcore import RetroConfig

    return RetroConfig(**{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (6, [6]),
        (12, [6, 9, 12]),
        (15, [6, 9, 12, 15]),
        (16, [9, 12, 15]),
        (24, [9, 12, 15, 18, 21, 24]),
    ],
)
def test_default_rule_for_retro_layers(megatron, num_layers, expected):
    config = make_config(num_layers=num_layers, retro_decoder_layers=None)
    assert config.retro_layer_numbers == expected


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"retro_decoder_layers": None, "num_layers": 5}, "num_layers"),
        ({"retro_decoder_layers": [5]}, "retro_decoder_layers"),
        ({"retro_decoder_layers": [0, 1]}, "retro_decoder_layers"),
        ({"retro_decoder_layers": [3, 2]}, "retro_decoder_layers"),
        ({"retro_chunk_length": 0}, "retro_chunk_length"),
        ({"retro_num_neighbors": 0}, "retro_num_neighbors"),
        ({"retro_num_retrieved_chunks": 0}, "retro_num_retrieved_chunks"),
        ({"retro_encoder_num_layers": 0}, "retro_encoder_num_layers"),
        ({"retro_attention_gate": -1.0}, "retro_attention_gate"),
        ({"retro_attention_gate": float("inf")}, "retro_attention_gate"),
        ({"hidden_dropout": 1.5}, "hidden_dropout"),
        ({"retro_encoder_cross_attention_dropout": -0.1}, "retro_encoder_cross_attention_dropout"),
        ({"retro_retrieved_length": 24}, "retro_retrieved_length"),
        ({"retro_chunk_alignment": "center"}, "retro_chunk_alignment"),
        ({"retro_encoder_residual": "none"}, "retro_encoder_residual"),
        ({"retro_cross_attention_positions": "alibi"}, "retro_cross_attention_positions"),
        ({"retro_encoder_input": "scaled"}, "retro_encoder_input"),
        ({"retro_cross_attention_keys": "next"}, "retro_cross_attention_keys"),
        ({"retro_encoder_hidden_size": 30}, "retro_encoder_hidden_size"),
        (
            {"retro_encoder_num_attention_heads": 1, "tensor_model_parallel_size": 2},
            "retro_encoder_num_attention_heads",
        ),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel"),
        ({"tp_comm_overlap": True}, "tp_comm_overlap"),
        ({"window_size": (3, 1)}, "window_size"),
        ({"window_attn_skip_freq": 2}, "window_attn_skip_freq"),
        ({"window_size": (3, 0), "window_attn_skip_freq": 0}, "window_attn_skip_freq"),
        ({"window_size": (3, 0), "window_attn_skip_freq": [1, 0]}, "window_attn_skip_freq"),
        (
            {
                "tensor_model_parallel_size": 3,
                "sequence_parallel": True,
                "num_attention_heads": 6,
                "hidden_size": 48,
            },
            "sequence_parallel",
        ),
    ],
)
def test_a_bad_field_is_named(megatron, overrides, field):
    with pytest.raises(ConfigurationError) as caught:
        make_config(**overrides)
    assert caught.value.subject == field


def test_unknown_origin(megatron):
    from retro_mcore import RetroConfig

    with pytest.raises(ConfigurationError, match=r"mcore-0\.15"):
        RetroConfig.from_upstream("mcore-0.99", **SMALL)


def test_from_upstream_sets_the_origins_numerics_and_yields_to_the_caller(megatron):
    from retro_mcore import RetroConfig

    config = RetroConfig.from_upstream("mcore-0.15", **{**SMALL, "attention_dropout": 0.3})
    assert (config.retro_chunk_alignment, config.retro_encoder_residual) == ("right", "normed")
    assert not config.retro_final_layernorm
    assert not config.retro_encoder_positions
    assert not config.retro_mask_padding
    assert config.retro_encoder_cross_attention_dropout == 0.3
    assert RetroConfig.from_upstream("mcore-0.5", **SMALL).retro_final_layernorm
    assert RetroConfig.from_upstream("legacy", **SMALL).retro_encoder_residual == "raw"
    left = RetroConfig.from_upstream("legacy", **SMALL, retro_chunk_alignment="left")
    assert left.retro_chunk_alignment == "left"


def test_dropout_reaches_the_modules_that_the_fields_name(megatron):
    model = build_model(
        hidden_dropout=0.11,
        attention_dropout=0.22,
        retro_encoder_hidden_dropout=0.33,
        retro_encoder_attention_dropout=0.44,
        retro_encoder_cross_attention_dropout=0.55,
    )
    decoder, encoder = model.decoder.layers[1], model.neighbor_encoder.layers[0]
    assert decoder.hidden_dropout == 0.11
    assert decoder.self_attention.core_attention.dropout == 0.22
    assert decoder.cross_attention.core_attention.dropout == 0.22
    assert encoder.hidden_dropout == 0.33
    assert encoder.self_attention.core_attention.dropout == 0.44
    assert encoder.cross_attention.core_attention.dropout == 0.55


def test_a_context_of_another_shape_is_refused(megatron):
    model = build_model()
    inputs = make_inputs(model.config)
    inputs["retrieved"] = inputs["retrieved"][:, :-1]
    with pytest.raises(ShapeError, match=r"\(12, 16\).*\(16, 16\)"):
        run_model(model, inputs)


def test_a_foreign_layer_spec_is_refused(megatron):
    from retro_mcore import RetroModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    config = make_config()
    with pytest.raises(ConfigurationError, match="get_retro_decoder_block_spec"):
        RetroModel(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(config),
            vocab_size=96,
            max_sequence_length=64,
        )


def test_learned_positions_must_cover_a_neighbor(megatron):
    with pytest.raises(ConfigurationError, match="max_sequence_length"):
        build_model(retro_num_retrieved_chunks=9)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"retro_mup_base_hidden_size": 0}, "retro_mup_base_hidden_size"),
        ({"retro_mup_base_kv_channels": 8}, "retro_mup_base_kv_channels"),
        ({"retro_mup_base_hidden_size": 16, "softmax_scale": 0.1}, "softmax_scale"),
        ({"retro_deepnorm": True, "init_method": print}, "init_method"),
    ],
)
def test_deepnorm_and_mup_refuse_what_they_set_themselves(megatron, overrides, field):
    with pytest.raises(ConfigurationError) as caught:
        make_config(**overrides)
    assert caught.value.subject == field
