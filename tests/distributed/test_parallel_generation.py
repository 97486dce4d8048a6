"""Generation under tensor parallelism: every rank gets the one-process model's text."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ProjectError
from tests.processes import join_megatron, run_ranks
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts, small_model

pytestmark = pytest.mark.distributed

LENGTHS = (3, 17, 9)  # odd: sequence parallelism must pad


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_two_ranks_write_what_one_writes(megatron, two_ranks, temperature):
    expected = write(1, False, temperature)
    for rank in two_ranks:
        assert rank["texts", False, temperature] == expected
        assert rank["texts", True, temperature] == expected


def test_only_the_first_rank_searches_and_its_errors_reach_all(two_ranks):
    assert [rank["searches"] > 0 for rank in two_ranks] == [True, False]
    for rank in two_ranks:
        assert rank["error"] == "index: gone. Build it"


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, on_one_rank)


def on_one_rank():
    join_megatron(tensor_model_parallel_size=2)
    source = ChunkFunction()
    results = {
        ("texts", sequence_parallel, temperature): write(2, sequence_parallel, temperature, source)
        for sequence_parallel in (False, True)
        for temperature in (0.0, 0.8)
    }
    try:
        write(2, False, 0.0, Broken())
    except ProjectError as error:
        results["error"] = str(error)
    return {**results, "searches": len(source.asked)}


class Broken:
    def neighbors_of(self, chunks):
        raise ProjectError("index", "gone", "Build it")


def write(tensor_parallel, sequence_parallel, temperature, source=None):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions

    torch.manual_seed(1234)
    model = small_model(
        tensor_model_parallel_size=tensor_parallel, sequence_parallel=sequence_parallel
    )
    texts = generate(
        model,
        Vocabulary(eod=90),
        prompts(*LENGTHS),
        max_new_tokens=12,
        sampling=SamplingOptions(temperature=temperature),
        neighbors=source or ChunkFunction(),
    )
    return [text.tokens for text in texts]
