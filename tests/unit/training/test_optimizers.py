"""Optimizers other than AdamW: their groups of weights, resumption, and refusals by name."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.distributed.test_optimizers import (
    MATRICES,
    MUON,
    muon,  # noqa: F401 (a fixture)
    require,
)
from tests.unit.training.small import NO_DROPOUT, small_plan, small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")

RETRIEVAL = ("neighbor_encoder", "cross_att")


def names_by_group(trainer):
    """Names of the weights by kind of optimizer, rate and whether they decay."""
    stages = trainer._parts.stages
    named = {id(p): name for stage in stages for name, p in stage.named_parameters()}
    return {
        (type(part.optimizer).__name__, group["max_lr"], bool(group["wd_mult"])): {
            named[id(parameter)].removeprefix("module.") for parameter in group["params"]
        }
        for part in trainer._parts.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
    }


@pytest.mark.parametrize("changes", [{"sgd_momentum": 0.0}, {"bf16": True}])
def test_sgd_resumes_bit_for_bit(changes, tmp_path):
    changes = {"optimizer": "sgd", "decoupled_lr": 1e-3, **changes}
    whole = train(**changes).train_losses
    first = train(**changes, save=str(tmp_path), exit_interval=3).train_losses
    assert first + train(**changes, load=str(tmp_path)).train_losses == whole
    with pytest.raises(CheckpointError, match="optimizer sgd, and now it is adam"):
        train(load=str(tmp_path), **{**changes, "optimizer": "adam", "sgd_momentum": 0.9})


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_resumes_with_a_decoupled_rate(distributed, tmp_path):
    changes = {"decoupled_lr": 1e-4, "use_distributed_optimizer": distributed}
    whole = train(**changes).train_losses
    first = train(**changes, save=str(tmp_path), exit_interval=3).train_losses
    assert first + train(**changes, load=str(tmp_path)).train_losses == whole


def test_sgd_computes_a_step_of_sgd():
    trainer = small_trainer(optimizer="sgd", lr=0.5, clip_grad=0.0, train_iters=1, **NO_DROPOUT)
    (stage,) = trainer._parts.stages
    before = {name: value.detach().clone() for name, value in stage.named_parameters()}
    trainer.train()
    for name, value in stage.named_parameters():
        decay = 0.01 * before[name] if value.dim() > 1 else 0.0
        expected = before[name] - 0.5 * (value.main_grad + decay)
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "dist_muon"}, "--optimizer: dist_muon without --bf16"),
        ({"optimizer": "adagrad"}, "--optimizer: adagrad, which Megatron does not offer"),
        (
            {"optimizer": "soap", "tensor_model_parallel_size": 2},
            "--optimizer: soap with --tensor-model-parallel-size 2: Megatron's SOAP would",
        ),
        ({"optimizer": "lion", "loss_scale": 2.0}, "--loss-scale: given with --optimizer lion"),
        ({"soap_shampoo_beta": 0.5}, "--soap-shampoo-beta: given with --optimizer adam"),
        ({"optimizer": "soap", "lion_beta1": 0.5}, "--lion-beta1: given with --optimizer soap"),
        (
            {"optimizer": "sgd", "use_distributed_optimizer": True},
            "--optimizer: sgd with --use-distributed-optimizer",
        ),
        ({"optimizer": "muon", "fp16": True}, "--optimizer: muon with --fp16"),
        ({"muon_momentum": 0.5}, "--muon-momentum: given with --optimizer adam"),
        ({"optimizer": "muon", "sgd_momentum": 0.5}, "--sgd-momentum: given with --optimizer muon"),
    ],
)
def test_what_an_optimizer_lacks_is_refused_by_name(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        small_plan(**flags)


def test_mup_is_for_adam():
    with pytest.raises(ConfigurationError, match="--retro-mup-base-hidden-size: 16 with --opt"):
        small_trainer(optimizer="sgd", retro_mup_base_hidden_size=16)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    from retro_mcore.platform import other_optimizers

    monkeypatch.setattr(other_optimizers, "_has_package", lambda: False)
    with pytest.raises(ConfigurationError, match=r"emerging_optimizers is missing.*pip install"):
        small_trainer(optimizer="muon")


@pytest.mark.parametrize(
    "model",
    [
        MUON,
        {**MUON, "bf16": True, "muon_nesterov": True},
        {**MATRICES, "optimizer": "lion"},
        {**MATRICES, "optimizer": "lion", "bf16": True},
        {**MATRICES, "optimizer": "soap", "swiglu": True, "soap_precondition_frequency": 2},
        {**MATRICES, "optimizer": "soap", "bf16": True, "soap_no_kl_shampoo": True},
    ],
    ids=lambda model: f"{model['optimizer']} {'bf16' if 'bf16' in model else 'fp32'}",
)
def test_optimizers_of_matrices_resume_bit_for_bit(model, tmp_path):
    require(model["optimizer"])
    whole = train(**model).train_losses
    first = train(**model, save=str(tmp_path), exit_interval=3).train_losses
    assert first + train(**model, load=str(tmp_path)).train_losses == whole


CLASSES = {"muon": "TensorParallelMuon", "lion": "Lion", "soap": "SOAP"}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("optimizer", CLASSES)
def test_matrices_have_their_optimizer_and_adam_the_rest(optimizer, freeze):
    require(optimizer)
    model = {**MATRICES, "optimizer": optimizer}
    groups = names_by_group(small_trainer(**model, freeze_decoder=freeze))
    (stage,) = small_trainer(**model)._parts.stages
    dimensions = {name.removeprefix("module."): p.dim() for name, p in stage.named_parameters()}
    trained = {n for n in dimensions if not freeze or any(part in n for part in RETRIEVAL)}
    words = {name for name in trained if name.endswith("word_embeddings.weight")}
    positions = {name for name in trained if name.endswith("position_embeddings.weight")}
    matrices = {name for name in trained if dimensions[name] == 2} - words - positions
    assert any(name.startswith("neighbor_encoder.") for name in matrices)
    assert any("cross_attention" in name for name in matrices)
    expected = {
        (CLASSES[optimizer], 1e-2, True): matrices,
        ("AdamW", 1e-2, False): trained - matrices - words - positions,
        ("AdamW", 1e-2, True): positions,
        ("AdamW", 1e-3, True): words,
    }
    found = {key: names for key, names in groups.items() if names}
    assert found == {key: names for key, names in expected.items() if names}


def of_matrices(trainer, name):
    """The part of the optimizer of this class."""
    parts = [part.optimizer for part in trainer._parts.optimizer.chained_optimizers]
    return next(part for part in parts if type(part).__name__ == name)


def test_lion_computes_two_steps_of_lion():
    require("lion")
    trainer = small_trainer(**NO_DROPOUT, optimizer="lion", lr=1e-2, clip_grad=0.0, train_iters=2,
                            lion_beta1=0.6, lion_beta2=0.9)  # fmt: skip
    weights = of_matrices(trainer, "Lion").param_groups[0]["params"]
    expected = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    step = trainer._parts.optimizer.step

    def by_hand():
        rate = trainer._parts.optimizer.param_groups[0]["lr"]
        for value, momentum, weight in zip(expected, momenta, weights, strict=True):
            sign = (0.6 * momentum + 0.4 * weight.main_grad).sign()
            value.mul_(1 - rate * 0.01).sub_(rate * sign)
            momentum.mul_(0.9).add_(0.1 * weight.main_grad)
        return step()

    trainer._parts.optimizer.step = by_hand
    trainer.train()
    for weight, value in zip(weights, expected, strict=True):
        # A sign of rounding may turn: a momentum that is all but zero.
        assert (weight - value).abs().gt(1e-6).float().mean() < 1e-3


def test_soap_reads_adam_s_settings_and_its_own():
    require("soap")
    model = {**MATRICES, "optimizer": "soap", "soap_no_kl_shampoo": True}
    soap = of_matrices(small_trainer(**model, adam_beta1=0.8, soap_shampoo_beta=0.7), "SOAP")
    (group, *_) = soap.param_groups
    found = [group[name] for name in ("betas", "eps", "shampoo_beta", "weight_decay")]
    assert found == [(0.8, 0.999), MATRICES["adam_eps"], 0.7, 0.01]
    assert not soap.use_kl_shampoo
    assert soap.precondition_frequency == 1


@pytest.mark.parametrize("optimizer", ["adaptive_muon", "lion", "soap"])
def test_optimizers_of_later_releases_are_refused_by_name(optimizer, monkeypatch):
    from retro_mcore.platform import other_optimizers

    monkeypatch.setattr(other_optimizers, "has_registry", lambda: False)
    with pytest.raises(ConfigurationError, match=f"{optimizer}, which megatron-core .* 0.18"):
        small_trainer(optimizer=optimizer)


@pytest.mark.parametrize("bf16", [False, True])
def test_each_attention_is_split_at_its_own_heads(bf16, muon):  # noqa: F811
    """Queries, keys and values are orthogonalized each by itself, in the encoder too."""
    trainer = small_trainer(**MUON, bf16=bf16, num_query_groups=2)
    model = trainer._parts.stages[0].module
    part = next(
        part.optimizer
        for part in trainer._parts.optimizer.chained_optimizers
        if hasattr(part.optimizer, "orthogonalize")
    )
    named = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    for name, groups, sizes in (
        ("decoder.layers.0.self_attention.linear_qkv.weight", 2, (16, 8, 8)),
        ("neighbor_encoder.layers.0.self_attention.linear_qkv.weight", 2, (16, 16, 16)),
    ):
        weight = getattr(named[name], "main_param", named[name])
        gradient = torch.randn(weight.shape)
        update = part.orthogonalize(weight, gradient)
        whole = gradient.view(groups, sum(sizes), -1).split(sizes, dim=1)
        parts = update.view(groups, sum(sizes), -1).split(sizes, dim=1)
        for before, after in zip(whole, parts, strict=True):
            rows = before.reshape(-1, 32)
            alone = part.scaled_orthogonalize_fn(rows, None, None)
            torch.testing.assert_close(after.reshape(-1, 32), alone, rtol=1e-5, atol=1e-6, msg=name)
