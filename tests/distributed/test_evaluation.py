"""Evaluation on two processes gives the numbers of one."""

from __future__ import annotations

import pytest

from tests.processes import run_ranks
from tests.unit.data.projects import built_project
from tests.unit.inference.trained import trained_checkpoints

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "data parallel": {},
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline parallel": {"pipeline_model_parallel_size": 2},
}


def evaluate(project: str, checkpoints: str, folder: str, **layout):
    from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity

    result = evaluate_perplexity(
        EvaluatePerplexityOptions(
            project_dir=project,
            load=checkpoints,
            output=f"{folder}/perplexity.json",
            protocol="both",
            retro_eval_neighbors=["real", "random", "none"],
            leakage=True,
            micro_batch_size=3,
            device="cpu",
            **layout,
        )
    )
    rows = [*result.perplexities, *result.bits_per_byte]
    points = result.leakage["valid"]
    return [row.loss for row in rows], [point.as_json() for point in points]


def on_one_rank(project, checkpoints, folder):
    return {name: evaluate(project, checkpoints, folder, **LAYOUTS[name]) for name in LAYOUTS}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("evaluation"))
    one = evaluate(str(built_project()), trained_checkpoints(), folder)
    two = run_ranks(2, on_one_rank, str(built_project()), trained_checkpoints(), folder)
    return one, two


def test_two_data_parallel_ranks_give_the_same_bits(one_and_two):
    one, two = one_and_two
    for rank in two:
        assert rank["data parallel"] == one


@pytest.mark.parametrize("layout", ["sequence parallel", "pipeline parallel"])
def test_a_model_on_two_ranks_gives_the_same_numbers(one_and_two, layout):
    one, two = one_and_two
    for rank in two:
        assert rank[layout][0] == pytest.approx(one[0], rel=1e-6)
