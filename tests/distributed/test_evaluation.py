"""Evaluation on two processes gives the numbers of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from retro_mcore.distributed import get_world_size
from tests.integration.small_checkpoint import small_checkpoint
from tests.processes import run_ranks
from tests.unit.data.projects import built_project
from tests.unit.evaluation.questions import write_test_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {
    "data parallel": {},
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline parallel": {"pipeline_model_parallel_size": 2},
    "context parallel": {"context_parallel_size": 2},
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
            attribute=True,
            micro_batch_size=3,
            device="cpu",
            **layout,
        )
    )
    rows = [*result.perplexities, *result.bits_per_byte]
    points = result.leakage["valid"]
    gains = [(gain.gain, gain.helped, gain.num_tokens) for gain in result.gains]
    beside = {"leakage": [point.as_json() for point in points], "gains": gains}
    return [row.loss for row in rows], beside


def answer(project: str, checkpoints: str, folder: str, **layout):
    """The bytes of the predictions."""
    from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa

    output = Path(folder, f"{'_'.join(layout)}_{get_world_size()}")
    evaluate_qa(
        EvaluateQaOptions(
            project_dir=project,
            load=checkpoints,
            sample_input_file=f"{folder}/nq/test.json",
            output=str(output),
            retro_neighbors="live",
            prompt_format="reformat_prompt_short",
            ft_neighbours=1,
            max_new_tokens=12,
            micro_batch_size=2,
            device="cpu",
            **layout,
        )
    )
    return (output / "predictions_live.jsonl").read_bytes()


def on_one_rank(project, checkpoints, folder):
    results = {name: evaluate(project, checkpoints, folder, **LAYOUTS[name]) for name in LAYOUTS}
    results["answers"] = answer(project, checkpoints, folder)
    for parallel in ("tensor", "pipeline"):
        flag = {f"{parallel}_model_parallel_size": 2}
        results[f"{parallel} parallel answers"] = answer(project, checkpoints, folder, **flag)
    return results


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("evaluation"))
    one = evaluate(str(built_project()), small_checkpoint(), folder)
    write_test_file(Path(folder))
    one = (*one, answer(str(built_project()), small_checkpoint(), folder))
    two = run_ranks(2, on_one_rank, str(built_project()), small_checkpoint(), folder)
    return one, two


def test_two_data_parallel_ranks_give_the_same_bits(one_and_two):
    one, two = one_and_two
    for rank in two:
        assert rank["data parallel"] == one[:2]


@pytest.mark.parametrize("layout", ["sequence parallel", "pipeline parallel", "context parallel"])
def test_a_model_on_two_ranks_gives_the_same_numbers(one_and_two, layout):
    one, two = one_and_two
    for rank in two:
        assert rank[layout][0] == pytest.approx(one[0], rel=1e-6)


@pytest.mark.parametrize("layout", ["sequence parallel", "pipeline parallel", "context parallel"])
def test_a_model_on_two_ranks_credits_neighbors_alike(one_and_two, layout):
    one, two = one_and_two
    for rank in two:
        for ours, theirs in zip(rank[layout][1]["gains"], one[1]["gains"], strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-5)  # a difference of losses in fp32
            assert ours[2] == theirs[2]


def test_two_ranks_write_the_predictions_of_one(one_and_two):
    one, two = one_and_two
    assert one[2].count(b"\n") == 7
    for rank in two:
        assert rank["answers"] == one[2]
        assert rank["tensor parallel answers"] == one[2]
        assert rank["pipeline parallel answers"] == one[2]


def on_tensor_parallel_ranks(project, checkpoints, folder):
    return evaluate(project, checkpoints, folder, tensor_model_parallel_size=2)


def test_a_rank_that_holds_padding_alone_changes_no_number(tmp_path):
    """A small vocabulary padded for many ranks: the last of them have no token at all."""
    checkpoints = small_checkpoint(make_vocab_size_divisible_by=2048)
    where = (str(built_project()), checkpoints, str(tmp_path))
    one = evaluate(*where)
    for rank in run_ranks(2, on_tensor_parallel_ranks, *where):
        assert rank[0] == pytest.approx(one[0], rel=1e-6)
