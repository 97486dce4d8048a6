"""DeepNorm and muP in training: their learning rates, and resuming, also from another layout."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ConfigurationError
from tests.unit.training.small import NO_DROPOUT, small_plan, small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")

# The small model is 32 wide: hidden weights learn at a quarter of the rate.
MUP = {"retro_mup_base_hidden_size": 8, "retro_deepnorm": True, "lr_decay_style": "constant"}


def rates(trainer):
    """The learning rate of each parameter's group, by name."""
    parts = trainer._parts
    groups = parts.optimizer.param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rate_of[id(p)] for name, p in parts.stages[0].module.named_parameters()}


def test_hidden_weights_learn_slower_under_mup():
    trainer = small_trainer(**MUP, lr=0.01)
    trainer.train()
    found = rates(trainer)
    assert found["decoder.layers.1.cross_attention.linear_kv.weight"] == pytest.approx(0.0025)
    assert found["neighbor_encoder.layers.0.mlp.linear_fc1.weight"] == pytest.approx(0.0025)
    assert found["embedding.word_embeddings.weight"] == pytest.approx(0.01)
    assert found["decoder.layers.0.mlp.linear_fc1.bias"] == pytest.approx(0.01)
    assert trainer._parts.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)  # as reported


@pytest.mark.parametrize("distributed", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, distributed):
    flags = {**MUP, **NO_DROPOUT, "use_distributed_optimizer": distributed}
    whole = train(**flags)
    first = train(**flags, save=str(tmp_path), exit_interval=4)
    resumed = small_trainer(**flags, save=str(tmp_path), load=str(tmp_path))
    second = resumed.train()
    assert first.train_losses + second.train_losses == whole.train_losses
    slow = "decoder.layers.0.mlp.linear_fc2.weight"
    if not distributed:  # whose groups hold parts of a buffer
        assert rates(resumed)[slow] == pytest.approx(0.0025)
    assert torch.isfinite(torch.tensor(second.train_losses)).all()


def test_the_norm_after_cross_attention_trains_with_a_frozen_decoder():
    trainer = small_trainer(**MUP, freeze_decoder=True)
    learning = {n for n, p in trainer._parts.stages[0].module.named_parameters() if p.requires_grad}
    assert "decoder.layers.1.cross_attn_bda.norm.weight" in learning
    assert not any("mlp_bda" in name and name.startswith("decoder") for name in learning)


def test_they_are_refused_without_retrieval():
    from retro_mcore.training.setup.build import build_config

    plan = small_plan(no_retrieval=True, retro_deepnorm=True)
    with pytest.raises(ConfigurationError, match="--retro-deepnorm: True, together with"):
        build_config(plan.arguments, plan.options, plan.options)
