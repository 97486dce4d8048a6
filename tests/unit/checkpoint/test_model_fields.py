"""Every option of the model has a meaning for other implementations, and is kept or refused.

Whoever hands a checkpoint on to Megatron would otherwise compute something else with it.
"""

from __future__ import annotations

from dataclasses import fields

import pytest

from retro_mcore.checkpoint.conversion.model_fields import DECODER_FLAGS, MODEL_FIELDS, OURS_ALONE
from retro_mcore.errors import ConfigurationError


def test_every_option_of_the_model_is_classified(megatron):
    """An option that is added must be added to the table, too."""
    from retro_mcore.training.setup.build import ModelArguments

    assert {field.name for field in fields(ModelArguments)} == set(MODEL_FIELDS)


def test_what_only_ours_have_says_when_it_changes_nothing(megatron):
    """Its default, at least, must be neutral; the others are checked by themselves."""
    from retro_mcore.training.setup.build import ModelArguments

    defaults = {field.name: field.default for field in fields(ModelArguments)}
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "attention_dropout": 0.1}
    for name in OURS_ALONE:
        neutral = MODEL_FIELDS[name].is_neutral
        assert neutral(defaults[name], {**defaults, **sizes}), name
    without = {n for n, f in MODEL_FIELDS.items() if f.megatron is None} - set(OURS_ALONE)
    assert without == {"retro_origin", "retro_decoder_layers", "tokenizer_fingerprint"}
    assert set(DECODER_FLAGS) <= set(MODEL_FIELDS)


FLAGS = {
    "no_retrieval": False,
    "retro_origin": "mcore-0.15",
    "retro_decoder_layers": None,
    "seq_length": 64,
    "hidden_size": 32,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "attention_dropout": 0.1,
}


@pytest.mark.parametrize("target", ["megatron", "megatron-torch", "instructretro"])
@pytest.mark.parametrize(
    "option",
    [
        {"retro_cross_attention_positions": "rotary"},
        {"retro_encoder_hidden_size": 16},
        {"retro_encoder_num_attention_heads": 2},
        {"retro_encoder_num_attention_heads": 4, "num_query_groups": 2},
        {"retro_encoder_ffn_hidden_size": 64},
        {"retro_encoder_cross_attention_dropout": 0.3},
        {"retro_deepnorm": True},
        {"retro_mup_base_hidden_size": 16},
        {"retro_mup_base_hidden_size": 16, "retro_mup_base_kv_channels": 8},
        {"sliding_window": 63},
        {"retro_decoder_layers": [2]},
    ],
)
def test_what_upstream_lacks_is_refused_by_name(target, option):
    from retro_mcore.checkpoint.conversion.targets import check_origin

    origin = "legacy" if target == "instructretro" else "mcore-0.15"
    with pytest.raises(ConfigurationError) as caught:
        check_origin(target, {**FLAGS, "retro_origin": origin, **option})
    name = next(iter(option))
    told = {"sliding_window": "last 63 tokens", "retro_decoder_layers": "in [2]"}
    assert told.get(name, name) in str(caught.value)
    check_origin("retro-mcore", {**FLAGS, **option})


@pytest.mark.parametrize(
    "option",
    [
        {"rotary_base": 500_000},
        {"use_rope_scaling": True},
        {"rotary_interleaved": True},
        {"rotary_seq_len_interpolation_factor": 2.0},
        {"qk_layernorm": True},
        {"add_qkv_bias": True},
    ],
)
def test_what_instructretro_lacks_is_refused_there_alone(option):
    from retro_mcore.checkpoint.conversion.targets import check_origin

    check_origin("megatron", {**FLAGS, **option})
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        check_origin("instructretro", {**FLAGS, "retro_origin": "legacy", **option})


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_a_gate_goes_to_the_code_that_has_one(gate):
    """Who hands on a model that was tuned without neighbors: its decoder would read them."""
    from retro_mcore.checkpoint.conversion.targets import check_origin

    gated = {**FLAGS, "retro_attention_gate": gate}
    for target in ("megatron", "megatron-torch"):
        with pytest.raises(ConfigurationError, match="retro_attention_gate"):
            check_origin(target, gated)
        check_origin(target, {**gated, "no_retrieval": True})
        check_origin(target, {**gated, "retro_attention_gate": 1})
    check_origin("instructretro", {**gated, "retro_origin": "legacy"})


@pytest.mark.parametrize(
    "option",
    [
        {"retro_cross_attention_positions": "none"},
        {"retro_encoder_hidden_size": 32},
        {"retro_encoder_num_attention_heads": 4},
        {"retro_encoder_ffn_hidden_size": 128},
        {"retro_encoder_cross_attention_dropout": 0.1},
        {"sliding_window": 64},
        {"rotary_base": 10000.0},
    ],
)
@pytest.mark.parametrize("target", ["megatron", "instructretro"])
def test_the_same_said_in_other_words_is_written(option, target):
    from retro_mcore.checkpoint.conversion.targets import check_origin

    origin = "legacy" if target == "instructretro" else "mcore-0.15"
    check_origin(target, {**FLAGS, "retro_origin": origin, **option})


@pytest.mark.parametrize(
    "argument",
    [
        {"num_experts": 2},
        {"multi_latent_attention": True},
        {"mtp_num_layers": 1},
        {"softmax_type": "learnable"},
        {"position_embedding_type": "none"},
        {"no_rope_freq": 4},
        {"window_attn_skip_freq": 2, "window_size": (127, 0)},
        {"apply_residual_connection_post_layernorm": True},
    ],
)
def test_megatrons_own_options_that_we_lack_are_refused_by_name(argument):
    from argparse import Namespace

    from retro_mcore.checkpoint.conversion.architecture import flags_of_arguments
    from retro_mcore.errors import CheckpointError

    with pytest.raises(CheckpointError, match=next(iter(argument))):
        flags_of_arguments(Namespace(**argument))
    assert flags_of_arguments(Namespace(window_size=(127, 0)))["sliding_window"] == 128
    assert flags_of_arguments(Namespace(window_size=(-1, 0)))["sliding_window"] is None
