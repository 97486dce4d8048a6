"""On two processes every layout and micro batch gives loss and gradient norm of one process."""

from __future__ import annotations

import pytest

from tests.processes import run_ranks
from tests.unit.training.test_token_mean import TOLERANCE, run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("megatron")]

# One sample and, on two ranks, a whole micro batch hold nothing that counts.
COUNTS = [0, 0, 31, 2, 9, 1, 32, 17]
MODEL = {"num_layers": 4, "retro_decoder_layers": [2, 3], "finetune": True}
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "data parallel": {},
    "distributed optimizer": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "averaged in the collective": {"ddp_average_in_collective": True},
    "tensor and sequence parallel": {**TENSOR, "sequence_parallel": True},
    "context parallel": {"context_parallel_size": 2},
    "pipeline parallel": PIPELINE,
    "pipeline, distributed optimizer": {**PIPELINE, "use_distributed_optimizer": True},
    "interleaved": {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2},
}


# Those of the default test run ride along with test_training's processes.
FEW = [
    ("data parallel", 1),
    ("tensor and sequence parallel", 2),
    ("context parallel", 2),
    ("pipeline parallel", 2),
]
ALL = [(layout, micro_batch_size) for layout in LAYOUTS for micro_batch_size in (1, 4)]


def on_one_rank(weights, cases):
    return {
        case: run(COUNTS, **MODEL, **LAYOUTS[case[0]], load=weights, micro_batch_size=case[1])
        for case in cases
    }


def check(found, weights):
    """Compare what `on_one_rank` gave with one process and one micro batch."""
    expected = run(COUNTS, **MODEL, load=weights, micro_batch_size=8)
    for where, values in found.items():
        for got, wanted in zip(values, expected, strict=True):
            assert got == pytest.approx(wanted, **TOLERANCE), where


@pytest.mark.slow
def test_every_layout_trains_on_the_token_mean(tmp_path):
    run(COUNTS, **{**MODEL, "finetune": False}, save=str(tmp_path))
    check(run_ranks(2, on_one_rank, str(tmp_path), ALL)[0], str(tmp_path))
