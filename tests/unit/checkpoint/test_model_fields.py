"""Every option of the model has a meaning for other implementations, and is kept or refused.

Whoever hands a checkpoint on to Megatron would otherwise compute something else with it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass, fields

import pytest

from retro_mcore.checkpoint.conversion.model_fields import DECODER_FLAGS, MODEL_FIELDS, OURS_ALONE
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.option_traits import (
    below_minimum,
    model_traits,
    names_there,
    stated,
    unclassified,
)
from retro_mcore.model.options import ORIGINS, DecoderOptions, ModelArguments, RetroOptions
from retro_mcore.training.options.checkpoints import CheckpointOptions
from retro_mcore.training.options.finetune import FinetuneOptions
from retro_mcore.training.options.pretrain import TrainingOptions


def test_options_and_their_table_load_without_torch():
    """`--help` must not wait for it, and a command chooses its device before megatron is loaded."""
    program = (
        "import sys, retro_mcore.training.options.pretrain, retro_mcore.training.options.finetune; "
        "import retro_mcore.checkpoint.conversion.model_fields; "
        "print({'torch', 'megatron'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "set()"


def test_every_option_of_the_model_is_classified():
    """Importing the table fails otherwise: an option cannot be forgotten."""
    assert [field.name for field in fields(ModelArguments)] == list(MODEL_FIELDS)


def test_an_option_without_metadata_is_refused_by_name():
    @dataclass(kw_only=True)
    class Forgetful(ModelArguments):
        tanh_softcapping: float | None = None

    with pytest.raises(TypeError, match="tanh_softcapping"):
        model_traits(Forgetful)


def test_every_field_of_the_configuration_is_classified(megatron):
    """As an option, a value of each origin, a fact of the project, or derived."""
    from megatron.core.transformer import TransformerConfig

    from retro_mcore.model.config import RetroConfig

    @dataclass
    class Forgetful(RetroConfig):
        retro_softcapping: float | None = None

    assert unclassified(RetroConfig, TransformerConfig) == []
    assert unclassified(Forgetful, TransformerConfig) == ["retro_softcapping"]
    assert {f.name for f in fields(RetroOptions)} <= {f.name for f in fields(RetroConfig)}


def test_every_origin_states_each_of_its_fields(megatron):
    from retro_mcore.model.config import RetroConfig

    for name, values in stated("origins", RetroConfig).items():
        assert set(values) == set(ORIGINS), name


def test_options_of_the_model_are_passed_to_places_that_exist(megatron):
    """Every option of retrieval reaches the configuration under its own name."""
    from inspect import signature

    from retro_mcore.model.decoder_config import DecoderConfig
    from retro_mcore.model.decoder_model import DecoderModel

    known = {field.name for field in fields(DecoderConfig)}
    assert set(names_there("config", DecoderOptions).values()) <= known
    arguments = set(signature(DecoderModel).parameters)
    assert set(names_there("model", DecoderOptions).values()) <= arguments
    retrieval = [field.name for field in fields(RetroOptions)]
    assert names_there("config", RetroOptions) == dict(zip(retrieval, retrieval, strict=True))


@pytest.mark.parametrize(
    "options", [TrainingOptions, FinetuneOptions], ids=lambda options: options.__name__
)
def test_numbers_below_their_minimum_are_refused_together(options):
    """Of every class of options; a size that is no option of training is checked nowhere else."""
    minimums = stated("at_least", options)
    assert {"micro_batch_size", "num_workers", "tensor_model_parallel_size"} <= set(minimums)
    required = {f.name: 1 for f in fields(options) if f.default is MISSING}
    wrong = options(**{**required, **{name: least - 1 for name, least in minimums.items()}})
    refused = [str(error) for error in below_minimum(wrong)]
    assert len(refused) == len(minimums)
    assert "--num-workers: -1. Choose at least 0" in refused


def test_what_needs_another_option_names_one():
    """One that is None unless it is given."""
    defaults = {field.name: field.default for field in fields(CheckpointOptions)}
    for name, other in stated("needs", CheckpointOptions).items():
        assert defaults[other] is None, name


def test_what_only_ours_have_says_when_it_changes_nothing():
    """Its default, at least, must be neutral; the others are checked by themselves."""
    defaults = {field.name: field.default for field in fields(ModelArguments)}
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "attention_dropout": 0.1}
    for name in OURS_ALONE:
        neutral = MODEL_FIELDS[name].neutral
        assert neutral(defaults[name], {**defaults, **sizes}), name
    without = {n for n, f in MODEL_FIELDS.items() if f.form is None} - set(OURS_ALONE)
    assert without == {"retro_origin", "retro_decoder_layers", "tokenizer_fingerprint"}
    assert set(DECODER_FLAGS) <= set(MODEL_FIELDS)


def test_what_is_written_for_megatron_is_read_back():
    """Every option that Megatron-LM's arguments state comes back with its value."""
    from argparse import Namespace

    from retro_mcore.checkpoint.conversion.architecture import flags_of_arguments
    from retro_mcore.checkpoint.conversion.targets import megatron_arguments

    required = {f.name: 8 for f in fields(ModelArguments) if f.default is MISSING}
    flags = {f.name: f.default for f in fields(ModelArguments)} | required
    flags |= {"num_query_groups": 2, "kv_channels": 4, "ffn_hidden_size": 24, "norm_epsilon": 1e-6}
    flags |= {"max_position_embeddings": 16, "disable_bias_linear": True, "sliding_window": 16}
    flags["window_attn_skip_freq"] = [1, 0] * 4
    arguments = megatron_arguments(flags, 1)
    assert (arguments.layernorm_epsilon, arguments.norm_epsilon) == (1e-6, 1e-6)
    assert (arguments.add_bias_linear, arguments.retro_add_retriever) == (False, True)
    assert (arguments.retro_encoder_layers, arguments.retro_gpt_chunk_length) == (2, 8)
    read = flags_of_arguments(Namespace(**vars(arguments)))
    unread = {name for name, traits in MODEL_FIELDS.items() if traits.form is None}
    stated_there = {n: v for n, v in flags.items() if n not in unread and v is not None}
    stated_there["group_query_attention"] = True  # as its groups say
    assert {name: read.get(name) for name in stated_there} == stated_there
    assert not arguments.bias_gelu_fusion
    assert megatron_arguments(
        {**flags, "openai_gelu": True, "disable_bias_linear": False}, 1
    ).bias_gelu_fusion
    gpt = megatron_arguments({**flags, "no_retrieval": True}, 1)
    assert not [name for name in vars(gpt) if name.startswith("retro_") and name != "retro_origin"
                and name != "retro_add_retriever"]  # fmt: skip


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
        {"retro_encoder_input": "normed"},
        {"retro_cross_attention_keys": "previous"},
        {"retro_cross_attention_keys": "mixed"},
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
        {"add_qkv_bias": True},
    ],
)
def test_what_instructretro_lacks_is_refused_there_alone(option):
    from retro_mcore.checkpoint.conversion.targets import check_origin

    check_origin("megatron", {**FLAGS, **option})
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        check_origin("instructretro", {**FLAGS, "retro_origin": "legacy", **option})


@pytest.mark.parametrize("target", ["megatron", "megatron-torch", "instructretro"])
def test_norms_on_queries_and_keys_go_to_megatrons_gpt_alone(target):
    """The layers of its Retro are built without them, so their weights would have no place."""
    from retro_mcore.checkpoint.conversion.targets import check_origin

    origin = "legacy" if target == "instructretro" else "mcore-0.15"
    normed = {**FLAGS, "qk_layernorm": True, "retro_origin": origin}
    with pytest.raises(ConfigurationError, match="qk_layernorm True"):
        check_origin(target, normed)
    if target != "instructretro":
        check_origin(target, {**normed, "no_retrieval": True})


def test_rotary_options_that_megatrons_script_ignores_are_reported():
    from retro_mcore.checkpoint.conversion.targets import notes_on_target

    rotary = {**FLAGS, "position_embedding_type": "rope", "rotary_base": 500_000}
    (note,) = notes_on_target("megatron", rotary)
    assert "rotary_base 500000" in note
    assert notes_on_target("megatron", {**rotary, "rotary_base": 10000}) == []
    assert notes_on_target("megatron", {**rotary, "no_retrieval": True}) == []
    assert notes_on_target("retro-mcore", rotary) == []
    (note,) = notes_on_target("instructretro", {**rotary, "num_query_groups": 2})
    assert "2 query groups for 4 heads" in note


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
        {"retro_encoder_input": "raw"},
        {"retro_cross_attention_keys": "own"},
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
        {"moe_router_enable_expert_bias": True},
        {"moe_latent_size": 8},
        {"multi_latent_attention": True},
        {"mtp_num_layers": 1},
        {"softmax_type": "learnable"},
        {"position_embedding_type": "none"},
        {"no_rope_freq": 4},
        {"apply_residual_connection_post_layernorm": True},
        {"qk_l2_norm": True},
        {"rope_type": "yarn"},
        {"linear_attention_type": "gated_delta_net"},
        {"enable_hyper_connections": True},
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
    windows = Namespace(window_size=(127, 0), window_attn_skip_freq=2)
    assert flags_of_arguments(windows)["window_attn_skip_freq"] == [2]
    with pytest.raises(CheckpointError, match="window_attn_skip_freq"):
        flags_of_arguments(Namespace(window_size=(127, 0), window_attn_skip_freq="none"))
