"""Saved under one layout of four processes, loaded under any other: training continues as if never
interrupted, the distributed optimizer's state included."""

from __future__ import annotations

import pytest

from tests.processes import run_ranks
from tests.unit.training.small import NO_DROPOUT, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = {
    **NO_DROPOUT,
    "num_layers": 4,
    "retro_decoder_layers": [2, 3],
    "micro_batch_size": 1,
    "use_distributed_optimizer": True,
}
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "PP2, DP2": PIPELINE,
    "TP2, DP2": TENSOR,
    "TP2+SP, PP2": {**TENSOR, **PIPELINE, "sequence_parallel": True},
    "PP2 of 2, DP2": {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2},
    "DP4": {},
    "CP2, TP2": {**TENSOR, "context_parallel_size": 2},
}
# Each is saved by one layout and loaded by the other.
PAIRS = [
    ("PP2, DP2", "TP2, DP2"),
    ("PP2, DP2", "TP2+SP, PP2"),
    ("TP2, DP2", "PP2, DP2"),
    ("TP2, DP2", "TP2+SP, PP2"),
    ("TP2+SP, PP2", "PP2, DP2"),
    ("TP2+SP, PP2", "TP2, DP2"),
    ("TP2+SP, PP2", "PP2 of 2, DP2"),
    ("PP2 of 2, DP2", "TP2+SP, PP2"),
    ("PP2 of 2, DP2", "DP4"),
    ("DP4", "PP2 of 2, DP2"),
    ("CP2, TP2", "PP2, DP2"),
    ("PP2, DP2", "CP2, TP2"),
]
FIRST, SECOND = 2, 4


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, megatron):
    directory = str(tmp_path_factory.mktemp("one_process"))
    stopped = train(**MODEL, save=directory, exit_interval=FIRST)
    return directory, stopped.train_losses + train(**MODEL, load=directory).train_losses


@pytest.fixture(scope="module")
def four_processes(one_process, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("four_processes"))
    return folder, run_ranks(4, on_one_rank, folder, one_process[0])[0]


def on_one_rank(folder, saved_by_one_process):
    results = {}
    for name, layout in LAYOUTS.items():
        places = {"load": saved_by_one_process, "save": f"{folder}/{name}"}
        began = train(**MODEL, **layout, **places, exit_interval=SECOND)
        results[name] = began.train_losses
    for saved, loaded in PAIRS:
        continued = train(**MODEL, **LAYOUTS[loaded], load=f"{folder}/{saved}")
        results[saved, loaded] = continued.train_losses
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_and_one_process_continue_each_other(one_process, four_processes, layout):
    expected = one_process[1]
    folder, results = four_processes
    assert results[layout] == pytest.approx(expected[FIRST:SECOND], rel=2e-6)
    losses = train(**MODEL, load=f"{folder}/{layout}").train_losses
    assert losses == pytest.approx(expected[SECOND:], rel=2e-6)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_layout_continues_what_another_began(one_process, four_processes, saved, loaded):
    losses = four_processes[1][saved, loaded]
    assert losses == pytest.approx(one_process[1][SECOND:], rel=2e-6)
