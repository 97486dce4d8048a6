"""Training on one process: the loss falls, runs repeat and resume exactly, mistakes are refused."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.unit.training.small import (
    BATCH,
    TRAIN_SAMPLES,
    VOCABULARY,
    RandomSamples,
    small_plan,
    small_trainer,
    train,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, megatron):
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer = small_trainer(save=str(directory))
    return trainer.train(), weights(trainer), directory


def weights(trainer):
    parts = trainer._parts
    state = {name: value.clone() for name, value in parts.stages[0].named_parameters()}
    for index, moments in enumerate(parts.optimizer.chained_optimizers[0].optimizer.state.values()):
        state.update({f"{index}.{name}": value.clone() for name, value in moments.items()})
    return state


def test_the_loss_starts_at_chance_and_falls(uninterrupted):
    result, _, _ = uninterrupted
    assert len(result.train_losses) == TRAIN_SAMPLES // BATCH == result.iteration
    assert result.consumed_samples == TRAIN_SAMPLES
    assert abs(result.train_losses[0] - math.log(128)) < 0.2  # the padded vocabulary
    assert result.train_losses[-1] < result.train_losses[0]
    assert [iteration for iteration, _ in result.valid_losses] == [3, 6]


def test_the_same_seed_gives_the_same_losses_with_workers_too(uninterrupted):
    assert train(num_workers=1).train_losses == uninterrupted[0].train_losses


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path):
    result, expected, _ = uninterrupted
    first = train(save=str(tmp_path), exit_interval=4)
    assert first.iteration == 4
    resumed = small_trainer(save=str(tmp_path), load=str(tmp_path))
    second = resumed.train()
    assert first.train_losses + second.train_losses == result.train_losses
    actual = weights(resumed)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_metrics_of_an_interrupted_run_have_no_gap_and_no_repetition(tmp_path):
    train(save=str(tmp_path), exit_interval=5, save_interval=3)
    # As if the run had been killed after iteration 5 without a checkpoint of it.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    result = train(save=str(tmp_path), load=str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r["iteration"] for r in records if r["kind"] == "train"] == [2, 4, 6]
    assert [r["iteration"] for r in records if r["kind"] == "valid"] == [3, 6]
    assert result.loss_curve.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_matplotlib_ends_without_a_curve(tmp_path, monkeypatch, caplog):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    result = train(save=str(tmp_path))
    assert result.iteration == 6
    assert result.loss_curve is None
    assert "the loss curve could not be written (matplotlib: not installed" in caplog.text


def test_a_finished_run_is_reused(uninterrupted):
    from retro_mcore.training.loop.trainer import finished_run

    result, _, directory = uninterrupted
    again = finished_run(small_plan(save=str(directory), load=str(directory)))
    assert again.reused
    assert again.iteration == result.iteration
    assert again.valid_losses == result.valid_losses
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_a_checkpoint_of_another_configuration_is_refused_by_name(uninterrupted):
    directory = str(uninterrupted[2])
    with pytest.raises(CheckpointError, match=r"lr 0\.01, and now it is 0\.02"):
        train(load=directory, lr=2e-2)
    with pytest.raises(CheckpointError, match="num_layers 2, and now it is 3"):
        train(load=directory, num_layers=3)


def test_training_from_the_start_does_not_overwrite_a_checkpoint(uninterrupted):
    with pytest.raises(ConfigurationError, match="--load"):
        train(save=str(uninterrupted[2]))


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(save=str(tmp_path), exit_interval=2)
    checkpoint = tmp_path / "iter_0000002"
    (checkpoint / "common.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="iter_0000002"):
        train(load=str(tmp_path))
    (checkpoint / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        train(load=str(tmp_path))


class OnePoisonedSample(RandomSamples):
    """Sample 2 alone holds a token that the others never use."""

    def tokens(self, index):
        tokens = super().tokens(index)
        tokens[0] = VOCABULARY if index == 2 else tokens[0]
        return tokens


def test_a_nan_loss_names_iteration_and_samples():
    from retro_mcore.training.loop.loss import NonFiniteLossError

    trainer = small_trainer(untie_embeddings_and_output_weights=True)
    trainer._train_samples = OnePoisonedSample(TRAIN_SAMPLES)
    model = trainer._parts.stages[0]
    with torch.no_grad():
        model.module.embedding.word_embeddings.weight[VOCABULARY] = math.nan
    before = [parameter.clone() for parameter in model.parameters()]
    # The second micro batch of the first iteration.
    with pytest.raises(
        NonFiniteLossError, match=r"iteration 1: the loss is nan on samples \[2, 3\]"
    ):
        trainer.train()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num())  # no step was taken


def test_without_retrieval_it_is_a_gpt_model():
    result = train(no_retrieval=True, train_iters=2)
    assert result.iteration == 2
    assert result.num_parameters < train(train_iters=1).num_parameters


def test_fp16_resumes_from_a_checkpoint_that_precedes_the_first_update(tmp_path):
    first = train(save=str(tmp_path), fp16=True, exit_interval=1)
    second = train(load=str(tmp_path), fp16=True)
    assert first.train_losses + second.train_losses == train(fp16=True).train_losses
