"""What options do to a run: batch ramp, precisions, a frozen decoder, overlap, spikes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.loop.resume import FINISHED_FILE
from tests.unit.training.small import (
    TRAIN_SAMPLES,
    VOCABULARY,
    RandomSamples,
    small_options,
    small_project,
    small_trainer,
    train,
)

pytestmark = pytest.mark.usefixtures("megatron")


def records(directory, kind="train"):
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def parameters(trainer):
    chunk = trainer._parts.stages[0].module
    named = ((name.removeprefix("module."), value) for name, value in chunk.named_parameters())
    return {name: value.detach().clone() for name, value in named}


def test_a_batch_ramp_resumes_with_its_sizes_and_position(tmp_path):
    ramp = {"rampup_batch_size": [2, 2, 8], "log_interval": 1}
    whole = train(save=str(tmp_path / "whole"), **ramp)
    assert [record["batch_size"] for record in records(tmp_path / "whole")] == [2] * 4 + [4] * 4
    assert whole.consumed_samples == TRAIN_SAMPLES
    first = train(save=str(tmp_path / "parts"), exit_interval=3, **ramp)
    second = train(save=str(tmp_path / "parts"), load=str(tmp_path / "parts"), **ramp)
    assert first.train_losses + second.train_losses == whole.train_losses
    assert first.consumed_samples == 6
    again = train(load=str(tmp_path / "parts"), **ramp)
    assert again.train_losses == []


def test_a_run_stops_when_its_time_is_up_and_resumes(tmp_path):
    save = str(tmp_path)
    first = train(save=save, exit_duration_in_mins=0.0)
    assert first.stopped_by == "--exit-duration-in-mins"
    assert first.iteration == 1
    second = train(save=save, load=save)
    assert second.stopped_by is None
    assert first.train_losses + second.train_losses == train().train_losses


def test_a_run_that_has_reached_its_last_iteration_says_so(tmp_path):
    save, finished = str(tmp_path), tmp_path / FINISHED_FILE
    train(save=save, train_iters=3, exit_interval=2)
    assert not finished.exists()
    for _ in range(2):  # the second finds it finished
        train(save=save, load=save, train_iters=3)
        assert finished.read_text(encoding="utf-8") == "3\n"
    longer = {"train_iters": 6, "override_opt_param_scheduler": True}
    train(save=save, load=save, exit_duration_in_mins=0.0, **longer)
    assert not finished.exists()


def test_each_size_of_a_ramp_must_divide_into_micro_batches():
    with pytest.raises(ConfigurationError, match="for a global batch of 3"):
        train(rampup_batch_size=[3, 1, 8])


def test_bf16_trains_close_to_fp32():
    full, half = train(), train(bf16=True)
    assert half.train_losses == pytest.approx(full.train_losses, abs=0.03)
    assert half.train_losses != full.train_losses


def test_an_fp16_overflow_skips_the_step_and_is_reported(tmp_path, capsys):
    flags = {"fp16": True, "hysteresis": 1, "initial_loss_scale": 2.0**19, "log_interval": 1}
    trainer = small_trainer(save=str(tmp_path / "whole"), **flags)
    before = parameters(trainer)
    whole = trainer.train()
    lines = records(tmp_path / "whole")
    skipped = [line["skipped_iterations"] for line in lines]
    assert skipped[0] == 1
    assert "loss" not in lines[0]
    assert skipped[-1] == 0
    scales = [line["loss_scale"] for line in lines]
    assert scales[1] == scales[0] / 2
    # The schedule waits for the first step that is taken.
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == rates[1]
    assert "skipped: the gradients overflowed fp16" in capsys.readouterr().out
    assert not all(torch.equal(before[n], value) for n, value in parameters(trainer).items())
    # The loss scale that was found is resumed with.
    first = train(save=str(tmp_path / "parts"), exit_interval=3, **flags)
    second = train(save=str(tmp_path / "parts"), load=str(tmp_path / "parts"), **flags)
    assert first.train_losses + second.train_losses == whole.train_losses
    assert [line["loss_scale"] for line in records(tmp_path / "parts")] == scales


def test_an_fp16_run_that_takes_no_step_leaves_the_weights(tmp_path):
    trainer = small_trainer(fp16=True, loss_scale=2.0**40, train_iters=2)
    before = parameters(trainer)
    trainer.train()
    assert all(torch.equal(before[n], value) for n, value in parameters(trainer).items())


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    from retro_mcore.training.loop.loss import NonFiniteLossError

    trainer = small_trainer()
    (weight, *_) = trainer._parts.stages[0].module.decoder.parameters()
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = parameters(trainer)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is \w+ on samples \[0, 1, 2, 3\]"):
        trainer.train()
    assert all(torch.equal(before[n], value) for n, value in parameters(trainer).items())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_distributed_optimizer": True, "bf16": True},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ],
    ids=["plain", "distributed optimizer, bf16", "recomputed"],
)
def test_a_frozen_decoder_stays_bit_for_bit_while_retrieval_trains(flags, tmp_path):
    trainer = small_trainer(freeze_decoder=True, save=str(tmp_path), exit_interval=3, **flags)
    before = parameters(trainer)
    first = trainer.train()
    after = parameters(trainer)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    retrieval = {
        name
        for name in after
        if "cross_att" in name or name.startswith("neighbor_encoder") or "cross_attn" in name
    }
    assert changed == retrieval
    second = train(freeze_decoder=True, load=str(tmp_path), **flags)
    whole = train(freeze_decoder=True, **flags)
    assert first.train_losses + second.train_losses == whole.train_losses


def test_a_model_without_retrieval_has_nothing_but_its_decoder():
    with pytest.raises(ConfigurationError, match="--freeze-decoder: given together"):
        train(freeze_decoder=True, no_retrieval=True)


def test_decoupled_learning_rates_are_the_embeddings_own():
    trainer = small_trainer(decoupled_lr=1e-4, decoupled_min_lr=0.0)
    groups = trainer._parts.optimizer.param_groups
    rates = {group["max_lr"]: group["params"] for group in groups}
    assert set(rates) == {1e-2, 1e-4}
    assert trainer.train().train_losses


class SuddenlyRandomSamples(RandomSamples):
    """The first hundred samples are one token, over and over."""

    def tokens(self, index):
        tokens = super().tokens(index)
        return tokens if index >= 100 else tokens * 0 + 7


def test_a_loss_spike_is_reported_with_its_samples(tmp_path, capsys):
    from retro_mcore.training.loop.spikes import SpikeDetector
    from retro_mcore.training.setup.plan import make_plan

    project = small_project(retro_gpt_train_samples=104, retro_gpt_eval_interval=100)
    trainer = small_trainer(save=str(tmp_path))
    trainer.plan = make_plan(small_options(save=str(tmp_path)), project, VOCABULARY)
    trainer._train_samples = SuddenlyRandomSamples(104)
    trainer._spikes = SpikeDetector(window=20)
    trainer.train()
    (spike,) = records(tmp_path, "spike")
    assert spike["iteration"] == 26
    assert spike["samples"] == [100, 101, 102, 103]
    assert spike["loss"] > spike["usual"]
    assert "loss spike" in capsys.readouterr().out


def test_a_lasting_rise_of_the_loss_is_no_series_of_spikes():
    from retro_mcore.training.loop.spikes import SpikeDetector

    detector = SpikeDetector(window=20)
    losses = [2 + 0.01 * (i % 3) for i in range(30)] + [3 + 0.01 * (i % 3) for i in range(30)]
    assert [i for i, loss in enumerate(losses) if detector.add(loss)] == [30]
