"""Training on two processes: overlapped communication, a frozen decoder, a batch ramp."""

from __future__ import annotations

import math

import pytest
import torch

from tests.processes import run_ranks
from tests.unit.training.small import (
    NO_DROPOUT,
    TRAIN_SAMPLES,
    VOCABULARY,
    RandomSamples,
    small_trainer,
    train,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = {**NO_DROPOUT, "num_layers": 4}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 5000}
PIPELINE = {**MODEL, "pipeline_model_parallel_size": 2, "freeze_decoder": True}
FROZEN = {
    "data parallel": {**MODEL, "freeze_decoder": True, **DISTRIBUTED, **OVERLAP},
    # Stages without anything to train, before or behind those with it.
    "nothing on the first stage": {**PIPELINE, "retro_decoder_layers": [3]},
    "nothing on the last stage": {**PIPELINE, "retro_decoder_layers": [2]},
    "nothing on the first stage, distributed": {
        **PIPELINE,
        **DISTRIBUTED,
        "retro_decoder_layers": [3],
    },
    "nothing on the last stage, distributed": {
        **PIPELINE,
        **DISTRIBUTED,
        "retro_decoder_layers": [2],
    },
}


def weights(trainer):
    named = [item for chunk in trainer._parts.stages for item in chunk.named_parameters()]
    return {name.removeprefix("module."): value.detach().clone() for name, value in named}


def on_one_rank(folder):
    """Losses by name; for frozen decoders also the names of the weights that changed."""
    results = {"plain": train(**MODEL, **DISTRIBUTED, save_interval=3, save=f"{folder}/plain")}
    results["overlap"] = train(
        **MODEL, **DISTRIBUTED, **OVERLAP, save_interval=3, save=f"{folder}/overlap"
    )
    results["continued"] = train(**MODEL, **DISTRIBUTED, load=f"{folder}/overlap", ckpt_step=3)
    ramp = {"rampup_batch_size": [2, 2, 8], "micro_batch_size": 1}
    results["ramp"] = train(**MODEL, **ramp)
    losses = {name: result.train_losses for name, result in results.items()}
    freezing = {name: frozen(f"{folder}/{name}", layout) for name, layout in FROZEN.items()}
    return losses, freezing, [poisoned(**MODEL), poisoned(**MODEL, pipeline_model_parallel_size=2)]


class OnePoisonedSample(RandomSamples):
    """Sample 6 alone holds a token that the others never use."""

    def tokens(self, index):
        tokens = super().tokens(index)
        tokens[0] = VOCABULARY if index == 6 else tokens[0]
        return tokens


def poisoned(**layout):
    """What stops a run whose second iteration meets a token with a weight that is no number."""
    trainer = small_trainer(**layout, untie_embeddings_and_output_weights=True)
    trainer._train_samples = OnePoisonedSample(TRAIN_SAMPLES)
    for name, parameter in trainer._parts.stages[0].named_parameters():
        if name.endswith("word_embeddings.weight"):
            with torch.no_grad():
                parameter[VOCABULARY] = math.nan
    from retro_mcore.training.loop.loss import NonFiniteLossError

    try:
        trainer.train()
    except NonFiniteLossError as error:
        return str(error), trainer._progress.iteration
    return None


def frozen(folder, layout):
    trainer = small_trainer(**layout, save=folder, save_interval=3)
    before = weights(trainer)
    whole = trainer.train().train_losses
    after = weights(trainer)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    resumed = train(**layout, load=folder, ckpt_step=3).train_losses
    return {"whole": whole, "resumed": resumed, "changed": changed, "all": list(before)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, on_one_rank, str(tmp_path_factory.mktemp("two_processes")))


def test_overlapped_communication_changes_nothing(ranks):
    losses = ranks[0][0]
    # The norm of the gradients is summed over other buckets.
    assert losses["overlap"] == pytest.approx(losses["plain"], rel=2e-6)
    # A checkpoint holds the weights after the last step, not those before they were gathered.
    assert losses["continued"] == pytest.approx(losses["plain"][3:], rel=2e-6)


def test_a_batch_ramp_gives_the_losses_of_one_process(ranks, megatron):
    ramp = {"rampup_batch_size": [2, 2, 8], "micro_batch_size": 1}
    assert ranks[0][0]["ramp"] == pytest.approx(train(**MODEL, **ramp).train_losses, rel=2e-6)


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_decoder_stays_while_retrieval_trains(ranks, name):
    for rank in ranks:
        run = rank[1][name]
        retrieval = [n for n in run["all"] if "cross_att" in n or n.startswith("neighbor_encoder")]
        assert run["changed"] == retrieval
        assert run["resumed"] == run["whole"][3:]


@pytest.mark.parametrize("layout", [0, 1], ids=["data parallel", "pipeline"])
def test_a_loss_that_is_no_number_stops_every_rank_and_names_the_samples(ranks, layout):
    # Micro batches of two: their samples are suspect together.
    expected = "iteration 2: the loss is nan on samples [6, 7]"
    for _, _, stops in ranks:
        message, iteration = stops[layout]
        assert message.startswith(expected)
        assert iteration == 1
