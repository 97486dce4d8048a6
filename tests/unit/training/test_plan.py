"""Flags against the project, the order of the data, and the sizes of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError, ProjectError
from retro_mcore.samples.batch import collate
from retro_mcore.training.loop.sample_reader import MicroBatchSampler, require_split
from retro_mcore.training.reporting.metrics import MetricsFile, read_metrics
from tests.unit.training.small import (
    BATCH,
    CHUNK_LENGTH,
    NUM_NEIGHBORS,
    SEQUENCE_LENGTH,
    TRAIN_SAMPLES,
    RandomSamples,
    small_plan,
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seq_length": 64}, "--seq-length: 64, but config.json of project says 32"),
        ({"global_batch_size": 8}, "--global-batch-size: 8"),
        ({"train_iters": 7}, "--train-iters: needs 28 samples, but .* has 24"),
        ({"train_samples": 25}, "--train-samples: needs 25"),
        ({"train_iters": 2, "train_samples": 8}, "--train-iters: given with --train-samples"),
        ({"train_iters": 0}, "--train-iters: 0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "--lr: 0.001 with --min-lr 0.01"),
        ({"lr_warmup_iters": 6}, "--lr-warmup-iters: 6"),
        ({"bf16": True, "fp16": True}, "--bf16: given together with --fp16"),
        (
            {"bf16": True, "freeze_decoder": True, "pipeline_model_parallel_size": 2},
            "--freeze-decoder: given with --bf16 in a pipeline",
        ),
        ({"recompute_method": "uniform"}, "--recompute-method: uniform, which has no effect"),
        ({"recompute_granularity": "full"}, "--recompute-method: not given"),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_flags_that_cannot_work_are_refused_by_name(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        small_plan(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_attention_heads": 3}, "--num-attention-heads: 3 does not divide"),
        ({"num_query_groups": 3}, "--num-query-groups: 3 does not divide"),
        (
            {"num_query_groups": 1, "tensor_model_parallel_size": 2},
            "--tensor-model-parallel-size: 2 does not divide --num-query-groups 1",
        ),
        ({"sequence_parallel": True}, "--sequence-parallel: given with"),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_sizes_that_do_not_divide_are_refused_by_name(flags, message):
    from retro_mcore.training.setup.build import build_config

    plan = small_plan(**flags)
    with pytest.raises(ConfigurationError, match=message):
        build_config(plan.arguments, plan.options, plan.options)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("fp32_residual_connection", True, {}),
        ("fp8_margin", 3, {"fp8_format": "hybrid", "bf16": True}),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_a_run_is_resumed_in_the_precision_that_it_began_in(name, value, others):
    saved = vars(small_plan(**others).checkpoint_args())
    checkpoint, plan = Path("checkpoint"), small_plan(**{name: value}, **others)
    with pytest.raises(CheckpointError, match=f"trained with {name} .*, and now it is {value}"):
        plan.check_resumes(saved, checkpoint)
    del saved[name]  # written before it was kept: the default
    with pytest.raises(CheckpointError, match=name):
        plan.check_resumes(saved, checkpoint)
    small_plan(**others).check_resumes(saved, checkpoint)
    plan = small_plan(**{name: value}, **others, finetune=True, load="x")
    plan.check_resumes(saved, checkpoint)


@pytest.mark.parametrize("no_retrieval", [False, True])
@pytest.mark.usefixtures("megatron")
def test_dropouts_that_are_no_probabilities_are_refused_by_flag(no_retrieval):
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.model_config import RecomputeOptions, build_config

    plan = small_plan(
        no_retrieval=no_retrieval, hidden_dropout=1.5, retro_encoder_attention_dropout=float("nan")
    )
    with pytest.raises(ConfigurationError) as caught:
        build_config(plan.arguments, ParallelOptions(), RecomputeOptions())
    assert "--hidden-dropout: 1.5. Give a number from 0 to 1" in str(caught.value)
    assert "--retro-encoder-attention-dropout: nan" in str(caught.value)


def test_what_the_project_repeats_is_accepted_and_the_rest_is_resolved():
    plan = small_plan(seq_length=SEQUENCE_LENGTH, seed=1234, lr_warmup_fraction=0.5)
    assert plan.train_iters == TRAIN_SAMPLES // BATCH
    assert plan.train_samples == plan.schedule.lr_decay_samples == TRAIN_SAMPLES
    assert plan.schedule.lr_warmup_samples == TRAIN_SAMPLES // 2
    assert plan.arguments.padded_vocab_size == 128


def test_ranks_share_out_every_sample_once_and_in_order():
    batches = [list(MicroBatchSampler(4, 16, 2, rank, 2)) for rank in range(2)]
    assert batches == [[[4, 5], [8, 9], [12, 13]], [[6, 7], [10, 11], [14, 15]]]


def test_a_rest_is_left_out_in_training_and_kept_in_evaluation():
    assert list(MicroBatchSampler(0, 7, 2, 0, 2)) == [[0, 1]]
    kept = [list(MicroBatchSampler(0, 7, 2, rank, 2, keep_rest=True)) for rank in range(2)]
    assert kept == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    assert list(MicroBatchSampler(0, 1, 2, 1, 2, keep_rest=True)) == []


def test_a_batch_shifts_labels_and_orders_rows_by_sample_chunk_neighbor():
    samples = [{**RandomSamples(2)[index], "sample_id": index} for index in range(2)]
    batch = collate(samples)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.sample_ids == [0, 1]
    assert batch.loss_mask.sum() == 2 * SEQUENCE_LENGTH
    num_chunks = SEQUENCE_LENGTH // CHUNK_LENGTH
    for sample, chunk, neighbor in ((0, 0, 1), (1, 2, 0)):
        row = (sample * num_chunks + chunk) * NUM_NEIGHBORS + neighbor
        expected = torch.from_numpy(samples[sample]["neighbor_tokens"][chunk, neighbor])
        assert torch.equal(batch.retrieved_tokens[row], expected)
    inputs = batch.model_inputs()
    assert torch.equal(inputs["context_position_ids"][3], torch.arange(2 * CHUNK_LENGTH))


def test_a_split_without_samples_is_named():
    with pytest.raises(ProjectError, match="test split"):
        require_split({"test": None}, "test", "project")


def test_metrics_survive_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {"kind": "train", "iteration": 1, "loss": 2.0}
    path.write_text(json.dumps(record) + '\n{"kind": "tr')
    assert read_metrics(path) == [record]
    MetricsFile(path, 5).write({**record, "iteration": 6})
    assert [entry["iteration"] for entry in read_metrics(path)] == [1, 6]
