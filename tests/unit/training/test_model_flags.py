"""Flags of the model: they reach its configuration, and it trains, is saved and resumes."""

from __future__ import annotations

import pytest

from retro_mcore.errors import ConfigurationError
from tests.unit.training.small import NO_DROPOUT, small_plan, small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")

ENCODER = {
    "retro_encoder_hidden_size": 16,
    "retro_encoder_num_attention_heads": 2,
    "retro_encoder_ffn_hidden_size": 40,
}


def shapes(trainer):
    """The parameters' shapes by name."""
    parameters = trainer._parts.stages[0].module.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def test_the_encoder_has_sizes_of_its_own():
    found = shapes(small_trainer(**ENCODER))
    assert found["decoder.layers.1.cross_attention.linear_kv.weight"] == (64, 16)
    assert found["neighbor_encoder.layers.0.self_attention.linear_qkv.weight"] == (48, 16)
    assert found["neighbor_encoder.layers.0.mlp.linear_fc1.weight"] == (40, 16)


def test_such_a_model_resumes_as_if_never_interrupted(tmp_path):
    flags = {**ENCODER, **NO_DROPOUT, "retro_cross_attention_positions": "rotary"}
    whole = train(**flags)
    first = train(**flags, save=str(tmp_path), exit_interval=4)
    second = train(**flags, save=str(tmp_path), load=str(tmp_path))
    assert first.train_losses + second.train_losses == whole.train_losses


FAMILIES = {
    "like Gemma": {
        "normalization": "RMSNorm",
        "apply_layernorm_1p": True,
        "geglu": True,
        "sublayer_norms": "both",
        "qk_layernorm": True,
        "embedding_multiplier": 5.5,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "rotary_local_base": 100,
        "rotary_local_layers": [1],
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "like OLMo": {
        "normalization": "RMSNorm",
        "sublayer_norms": "post",
        "qk_layernorm": True,
        "qk_layernorm_over": "all_heads",
        "no_rope_layers": [2],
    },
    "parallel residual": {"parallel_residual": True, "residual_multiplier": 0.5},
}


@pytest.mark.parametrize(
    "family",
    [
        "like Gemma",
        pytest.param("like OLMo", marks=pytest.mark.slow),
        pytest.param("parallel residual", marks=pytest.mark.slow),
    ],
)
def test_a_familys_model_resumes_as_if_never_interrupted(tmp_path, family):
    flags = {**FAMILIES[family], **NO_DROPOUT}
    whole = train(**flags)
    assert whole.train_losses[-1] < whole.train_losses[0]
    first = train(**flags, save=str(tmp_path), exit_interval=4)
    second = train(**flags, save=str(tmp_path), load=str(tmp_path))
    assert first.train_losses + second.train_losses == whole.train_losses


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"no_rope_layers": [3]}, "--no-rope-layers"),
        ({"rotary_local_base": 100}, "--rotary-local-base"),
        ({"rotary_attention_factor": 1.2}, "--rotary-attention-factor"),
        ({"rotary_frequencies": [1.0]}, "--rotary-frequencies|rotary_frequencies"),
        ({"parallel_residual": True, "sublayer_norms": "post"}, "--parallel-residual"),
        ({"qk_layernorm_over": "all_heads"}, "--qk-layernorm-over"),
        ({"geglu": True, "swiglu": True}, "--swiglu"),
        ({"residual_multiplier": 0.5, "retro_deepnorm": True}, "--residual-multiplier"),
        ({"logits_scaling": 0.0}, "--logits-scaling"),
    ],
)
@pytest.mark.parametrize("no_retrieval", [False, True])
def test_what_a_familys_layers_cannot_compute_is_refused(flags, named, no_retrieval):
    if no_retrieval and "retro_deepnorm" in flags:
        return
    with pytest.raises(ConfigurationError, match=named):
        small_trainer(**flags, no_retrieval=no_retrieval)


def test_relative_positions_change_the_losses():
    plain = train(**NO_DROPOUT).train_losses
    rotary = train(**NO_DROPOUT, retro_cross_attention_positions="rotary").train_losses
    assert rotary != plain


def test_cross_attention_has_a_dropout_of_its_own():
    from retro_mcore.training.setup.build import build_config

    def rate(**flags):
        plan = small_plan(retro_encoder_attention_dropout=0.2, **flags)
        config = build_config(plan.arguments, plan.options, plan.options)
        return config.retro_encoder_cross_attention_dropout

    assert rate() == 0.2
    assert rate(retro_encoder_cross_attention_dropout=0.3) == 0.3
    assert rate(retro_encoder_cross_attention_dropout=0.0) == 0.0
    # The releases used the decoder's rate, which is 0.1 here.
    assert rate(retro_origin="mcore-0.15") == 0.1


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigurationError, match="10 over 4 attention heads"):
        small_trainer(retro_encoder_hidden_size=10)
