"""On two processes every layout gives the losses of one, and checkpoints change layout."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import test_token_mean as token_mean
from tests.processes import run_ranks
from tests.unit.training.small import NO_DROPOUT, train

pytestmark = pytest.mark.distributed

MODEL = {**NO_DROPOUT, "num_layers": 4, "retro_decoder_layers": [2, 3]}
TENSOR_PARALLEL = {**MODEL, "tensor_model_parallel_size": 2}
PIPELINE_PARALLEL = {**MODEL, "pipeline_model_parallel_size": 2}
LAYOUTS = {
    "data parallel": MODEL,
    "distributed optimizer": {**MODEL, "use_distributed_optimizer": True},
    "tensor parallel": TENSOR_PARALLEL,
    "sequence parallel": {**TENSOR_PARALLEL, "sequence_parallel": True},
    "context parallel": {**MODEL, "context_parallel_size": 2},
}
# Stages draw their initial weights from streams of their own, so these begin where one process
# stopped.
DISTRIBUTED = {"use_distributed_optimizer": True}
PIPELINES = {
    # Tied weights have a gradient bucket of their own, and megatron loses count of the padding
    # between buckets (compatibility.unpadded_bucket_offsets).
    "pipeline, distributed optimizer": {**PIPELINE_PARALLEL, **DISTRIBUTED},
    "pipeline parallel": PIPELINE_PARALLEL,
    "interleaved": {**PIPELINE_PARALLEL, "num_virtual_stages_per_pipeline_rank": 2},
}
STOP = 3
#: Layouts that resume from their own checkpoint; the others, from that of one process
#: (test_checkpoints resumes them from their own, bit for bit).
OWN = ("data parallel", "distributed optimizer", "context parallel")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, megatron):
    directory = str(tmp_path_factory.mktemp("one_process"))
    stopped = train(**MODEL, save=directory, exit_interval=STOP)
    resumed = train(**MODEL, load=directory)
    train(**MODEL, **DISTRIBUTED, save=f"{directory}/distributed", exit_interval=STOP)
    return directory, stopped.train_losses + resumed.train_losses


@pytest.fixture(scope="module")
def two_processes(one_process, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two_processes"))
    return folder, run_ranks(2, on_one_rank, folder, one_process[0])[0]


def on_one_rank(folder, saved_by_one_process):
    results = {}
    for name, layout in LAYOUTS.items():
        directory = f"{folder}/{name}"
        results[name, "stopped"] = train(**layout, save=directory, exit_interval=STOP).train_losses
        load = directory if name in OWN else saved_by_one_process
        results[name, "resumed"] = train(**layout, load=load).train_losses
    name = "context parallel"
    results[name] = train(**LAYOUTS[name], load=saved_by_one_process).train_losses
    for name, layout in PIPELINES.items():
        directory = f"{folder}/{name}"
        distributed = layout.get("use_distributed_optimizer", False)
        saved = f"{saved_by_one_process}/distributed" if distributed else saved_by_one_process
        began = train(**layout, load=saved, save=directory, exit_interval=STOP + 1)
        results[name] = began.train_losses + train(**layout, load=directory).train_losses
    results["token mean"] = token_mean.on_one_rank(saved_by_one_process, token_mean.FEW)
    return results


def test_layouts_train_on_the_token_mean(one_process, two_processes):
    token_mean.check(two_processes[1]["token mean"], one_process[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_and_resumes_like_one_process(one_process, two_processes, layout):
    _, expected = one_process
    results = two_processes[1]
    losses = results[layout, "stopped"] + results[layout, "resumed"]
    assert losses == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_continues_what_a_layout_began(one_process, two_processes, layout):
    distributed = LAYOUTS[layout].get("use_distributed_optimizer", False)
    directory = f"{two_processes[0]}/{layout}"
    losses = train(**MODEL, load=directory, use_distributed_optimizer=distributed).train_losses
    assert losses == pytest.approx(one_process[1][STOP:], rel=2e-6)


def test_context_parallel_ranks_continue_what_one_process_began(one_process, two_processes):
    _, results = two_processes
    assert results["context parallel"] == pytest.approx(one_process[1][STOP:], rel=2e-6)


@pytest.mark.parametrize("layout", PIPELINES)
def test_a_pipeline_and_one_process_continue_each_other(one_process, two_processes, layout):
    folder, results = two_processes
    assert results[layout] == pytest.approx(one_process[1][STOP:], rel=2e-6)
    distributed = PIPELINES[layout].get("use_distributed_optimizer", False)
    options = {**MODEL, "use_distributed_optimizer": distributed}
    losses = train(**options, load=f"{folder}/{layout}").train_losses
    assert losses == pytest.approx(one_process[1][STOP + 1 :], rel=2e-6)


def test_a_checkpoint_of_two_processes_is_rebuilt_on_one(two_processes, megatron):
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    model, arguments = load_model_from_checkpoint(f"{two_processes[0]}/tensor parallel")
    assert arguments.retro_decoder_layers == [2, 3]
    assert not model.training
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        logits = model(tokens, tokens, None)
    assert logits.shape == (1, 32, arguments.padded_vocab_size)
