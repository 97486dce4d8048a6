"""Optimizers other than AdamW on two processes give the losses of one, and their checkpoints change
layout.

All but SGD need the package emerging_optimizers: `make test-muon`.
"""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ConfigurationError, RetroError
from tests.processes import run_ranks
from tests.unit.training.small import NO_DROPOUT, small_trainer, train

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("megatron")]

MODEL = {**NO_DROPOUT, "num_layers": 4, "retro_decoder_layers": [2, 3]}
# In a pipeline the encoder is on the second stage, with an embedding of its own.
SGD = {
    **MODEL,
    "retro_decoder_layers": [3],
    "untie_embeddings_and_output_weights": True,
    "optimizer": "sgd",
    "lr": 0.1,
    "decoupled_lr": 2.0,
}
# The encoder's heads have other sizes than the decoder's.
MATRICES = {
    **MODEL,
    "retro_encoder_num_attention_heads": 2,
    "decoupled_lr": 1e-3,
    "position_embedding_type": "learned_absolute",
    "adam_eps": 1e-5,  # above rounding, which Adam and SOAP would enlarge to whole steps
}
MUON = {**MATRICES, "optimizer": "muon", "muon_fp32_matmul_prec": "highest"}
LION = {**MATRICES, "optimizer": "lion"}
# SOAP divides by it twice.
SOAP = {**MATRICES, "optimizer": "soap", "adam_eps": 1e-3}
OF_EXPERTS = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 48,
    "disable_bias_linear": True,
    "moe_aux_loss_coeff": 0.1,
}
EXPERTS = {**MUON, **OF_EXPERTS}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {"DP2": {}, "TP2 with SP": TENSOR, "PP2": {"pipeline_model_parallel_size": 2}}
EXPERT_PARALLEL = {"expert_model_parallel_size": 2}
# Sums of float32 in another order: of a forward pass, and with steps of SGD.
SUMS = {"rel": 2e-6}
# After steps on matrices. Newton-Schulz steps multiply what is left of small singular values by up
# to 4 each, so rounding of 1e-7 by 4 ** 5. Lion's sign of an entry that is rounding may turn: the
# loss changes by 2 * rate * gradient of this entry, about 1e-5 of it, and ten may turn. SOAP's
# eigenvectors turn by rounding over the gap of their eigenvalues, 1e-7 / 1e-3. Optimizers differ
# from one another by 1e-3.
STEPS = {"rel": 1e-4}
BEGIN, END = 2, 4


def layouts(model):
    """Those that the optimizer trains in."""
    from retro_mcore.platform.other_optimizers import has_registry

    left_out = {"soap": ["TP2 with SP"]}.get(model["optimizer"], [])
    if model["optimizer"] == "muon" and "bf16" in model and not has_registry():
        left_out = ["PP2"]
    return {name: layout for name, layout in LAYOUTS.items() if name not in left_out}


def continued(model, begun, folder):
    """Losses of runs that continue a checkpoint of one process, and word embeddings, by layout."""
    losses, words = {}, {}
    for name, layout in layouts(model).items():
        places = {"load": begun, "save": f"{folder}/{name}", "exit_interval": END}
        trainer = small_trainer(**model, **layout, **places)
        losses[name] = trainer.train().train_losses
        (stage,) = trainer._parts.stages
        words[name] = [
            p for n, p in stage.named_parameters() if n.endswith("word_embeddings.weight")
        ]
    return losses, words


def check(model, tmp_path):
    """One process begins, two continue and one ends; or one does all of it."""
    begun = str(tmp_path / "one")
    whole = train(**model).train_losses
    first = train(**model, save=begun, exit_interval=BEGIN).train_losses
    assert first + train(**model, load=begun).train_losses == whole
    ranks = run_ranks(2, continued, model, begun, str(tmp_path))
    for name, losses in ranks[0][0].items():
        last = train(**model, load=str(tmp_path / name)).train_losses
        found = first + losses + last
        known = BEGIN + 1  # its weights are those of the checkpoint
        assert found[:known] == pytest.approx(whole[:known], **SUMS), name
        assert found == pytest.approx(whole, **(SUMS if model is SGD else STEPS)), name
    copies = [table for _, words in ranks for table in words["PP2"]]
    assert all(torch.equal(copies[0], table) for table in copies)
    return len(copies)


def test_sgd_in_every_layout(tmp_path):
    assert check(SGD, tmp_path) == 2  # the encoder's stage has a copy


def require(optimizer):
    """Skips where an optimizer cannot be built."""
    from retro_mcore.platform.other_optimizers import check_available

    try:
        check_available(optimizer)
    except ConfigurationError as error:
        pytest.skip(str(error))


@pytest.fixture
def muon(megatron):
    """Skips where Muon cannot be built."""
    require("muon")


@pytest.mark.parametrize(
    "model",
    [
        MUON,
        {**MUON, "optimizer": "adaptive_muon"},
        LION,
        SOAP,
    ],
    ids=lambda model: model["optimizer"],
)
def test_optimizers_of_matrices_in_every_layout(model, tmp_path):
    require(model["optimizer"])
    check(model, tmp_path)


# The norm that clips gradients is summed in another order.
LOW, WHOLE = {"bf16": True, "clip_grad": 0.0}, {"optimizer": "dist_muon"}
FROZEN = {"freeze_decoder": True}


def test_whole_matrices_are_trained_as_divided_ones_in_every_layout(muon, tmp_path):
    """Bit for bit, from a checkpoint and to one. bfloat16 says too little across layouts."""
    found = []
    for name, optimizer in {"muon": {}, "dist_muon": WHOLE}.items():
        model, folder = {**MUON, **LOW, **optimizer}, tmp_path / name
        begun = str(folder / "one")
        losses = {"one": train(**model, save=begun, exit_interval=BEGIN).train_losses}
        losses |= run_ranks(2, continued, model, begun, str(folder))[0][0]
        for layout in layouts(model):
            losses[layout] += train(**model, load=str(folder / layout)).train_losses
        found.append(losses)
    assert found[0] == {name: found[1][name] for name in found[0]}


def refusal_of(model):
    try:
        small_trainer(**model)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_muon_in_bfloat16_is_refused_in_pipelines_that_would_not_resume(muon):
    from retro_mcore.platform.other_optimizers import has_registry

    (first, second) = run_ranks(2, refusal_of, {**MUON, **LOW, **LAYOUTS["PP2"]})
    assert first == second
    assert ("resumes with other states" in first) is not has_registry()


def alone(models, begun):
    """Losses of whole runs, and why Muon does not resume with experts divided otherwise.

    Runs that save stop, and go on.
    """
    losses = {name: train(**model).train_losses for name, model in models.items()}
    for name, model in models.items():
        if "save" in model:
            losses[name] += train(
                **{**model, "load": model["save"], "exit_interval": None}
            ).train_losses
    try:
        train(**EXPERTS, **EXPERT_PARALLEL, load=begun)
    except RetroError as error:
        return losses, str(error)
    return losses, ""


def test_muon_divides_matrices_and_experts_as_asked(muon, tmp_path):
    begun = str(tmp_path)
    places = {"save": str(tmp_path / "frozen"), "exit_interval": BEGIN}
    one, experts = train(**MUON).train_losses, train(**EXPERTS, save=begun).train_losses
    models = {
        "distributed": {**MUON, **TENSOR, "muon_tp_mode": "distributed"},
        "blockwise": {**MUON, **TENSOR, "muon_tp_mode": "blockwise"},
        "CP2": {**MUON, "context_parallel_size": 2},
        "EP2": {**EXPERTS, **EXPERT_PARALLEL},
        "TP2 with experts": {**EXPERTS, **TENSOR},
    }
    models |= {
        "bf16": {**MUON, **LOW},
        "whole matrices": {**MUON, **LOW, **WHOLE},
        "bf16, frozen": {**MUON, **LOW, **FROZEN},
        "whole matrices, frozen, resumed": {**MUON, **LOW, **FROZEN, **WHOLE, **places},
        "bf16 experts": {**EXPERTS, **EXPERT_PARALLEL, **LOW},
        "whole experts": {**EXPERTS, **EXPERT_PARALLEL, **LOW, **WHOLE},
    }
    losses, refusal = run_ranks(2, alone, models, begun)[0]
    assert losses["whole matrices"] == losses["bf16"]
    assert losses["whole matrices, frozen, resumed"] == losses["bf16, frozen"]
    assert losses["whole experts"] == losses["bf16 experts"]
    assert losses["distributed"] == pytest.approx(one, **STEPS)
    assert losses["blockwise"] != pytest.approx(one, **STEPS)  # another optimizer
    assert losses["CP2"] == pytest.approx(one, **STEPS)
    assert losses["EP2"] == pytest.approx(experts, **STEPS)
    assert losses["TP2 with experts"] == pytest.approx(experts, **STEPS)
    assert "holds 2 parts of an optimizer, of groups of weights" in refusal


@pytest.mark.parametrize("whole", [LION, SOAP], ids=lambda model: model["optimizer"])
def test_later_optimizers_divide_samples_and_experts(whole, tmp_path):
    require(whole["optimizer"])
    experts = {**whole, **OF_EXPERTS, "swiglu": True}
    places = {"save": str(tmp_path / "EP2"), "exit_interval": BEGIN}
    models = {
        "CP2": {**whole, "context_parallel_size": 2},
        "EP2": {**experts, **EXPERT_PARALLEL, **places},
    }
    train(**EXPERTS, save=str(tmp_path / "muon"), exit_interval=1)
    losses, _ = run_ranks(2, alone, models, str(tmp_path / "muon"))[0]
    assert losses["CP2"] == pytest.approx(train(**whole).train_losses, **STEPS)
    assert losses["EP2"] == pytest.approx(train(**experts).train_losses, **STEPS)
