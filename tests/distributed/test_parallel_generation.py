"""Generation under tensor and pipeline parallelism: every rank gets the text of one process."""

from __future__ import annotations

import queue
from functools import partial
from typing import Any

import pytest
import torch

from retro_mcore.errors import ProjectError
from tests.distributed.layouts import Layout, build_chunks, join_layout, load_part, serial_weights
from tests.processes import run_ranks
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts, requests_for

pytestmark = pytest.mark.distributed

M, NEW_TOKENS = 4, 9
PROMPTS = prompts(3, 17, 9)  # odd: sequence parallelism must turn itself off
FIELDS: dict[str, Any] = {"num_layers": 4, "position_embedding_type": "rope"}
LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2 with sequence parallelism": Layout(tensor=2, sequence=True),
    "PP2, encoder on the first stage": Layout(pipeline=2),
    "PP2, encoder on the last stage": Layout(
        pipeline=2, fields={"retro_decoder_layers": [3, 4], "add_bias_linear": False}
    ),
    "PP2, no neighbors beyond the first stage": Layout(
        pipeline=2,
        fields={"retro_decoder_layers": [1, 2], "position_embedding_type": "learned_absolute"},
    ),
}
for layout in LAYOUTS.values():
    layout.fields = {**FIELDS, "retro_decoder_layers": [2, 4], **layout.fields}
USES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "neighbor_credit": True},
    "sampled": {"temperature": 0.8, "top_logprobs": 2, "stop_tokens": [5, 6, 7, 8]},
    "two chunks": {
        "temperature": 0.0,
        "two_chunks": True,
        "prompt_logprobs": True,
        "neighbor_credit": True,
    },
}
#: One layout of each kind of parallelism: samples, and serves. The others differ in what crosses
#: the stages' boundary for each token.
ONE_OF_A_KIND = ("TP2 with sequence parallelism", "PP2, encoder on the first stage")


def uses_of(name):
    """The uses that a layout is tested in."""
    return {use: USES[use] for use in USES if use != "sampled" or name in ONE_OF_A_KIND}


@pytest.fixture(scope="module")
def two_ranks(megatron):
    weights = {name: serial_weights(layout.model_fields()) for name, layout in LAYOUTS.items()}
    return weights, run_ranks(2, on_one_rank, weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_write_what_one_writes(megatron, two_ranks, name):
    weights, ranks = two_ranks
    layout = LAYOUTS[name]
    (model,) = build_chunks(Layout(fields=layout.model_fields()))
    load_part(model, weights[name])
    for use, options in uses_of(name).items():
        expected = write(model, ChunkFunction(retrieved_length=2 * M), **options)
        for rank in ranks:
            texts = rank[name, use]
            assert [text.tokens for text in texts] == [text.tokens for text in expected]
            assert [text.finish_reason for text in texts] == [
                text.finish_reason for text in expected
            ]
            assert_same_logprobs(texts, expected)
    assert len({tuple(text.tokens) for text in expected}) == len(PROMPTS)


def assert_same_logprobs(texts, expected):
    for ours, theirs in zip(texts, expected, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            values = [[entry.logprob for entry in getattr(text, name)] for text in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert (ours.neighbor_credit is None) == (theirs.neighbor_credit is None)
        if theirs.neighbor_credit is not None:
            assert ours.neighbor_credit == pytest.approx(theirs.neighbor_credit, abs=2e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_first_rank_searches_and_its_errors_reach_all(two_ranks, name):
    _, ranks = two_ranks
    assert [rank[name, "searches"] > 0 for rank in ranks] == [True, False]
    for rank in ranks:
        assert rank[name, "error"] == "index: gone. Build it"


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_the_first_rank_serves_and_the_others_follow(two_ranks, name):
    _, (first, second) = two_ranks
    assert first[name, "served"] == [text.tokens for text in first[name, "greedy"]]
    assert second[name, "served"] is None  # and it came back


def on_one_rank(weights):
    from retro_mcore.platform.parallel import whole_sequences

    results = {}
    for name, layout in LAYOUTS.items():
        join_layout(layout)
        (model,) = build_chunks(layout)
        load_part(model, weights[name])
        source = ChunkFunction(retrieved_length=2 * M)
        for use, options in uses_of(name).items():
            results[name, use] = write(model, source, **options)
        results[name, "searches"] = len(source.asked)
        if name in ONE_OF_A_KIND:
            with whole_sequences(model):
                results[name, "served"] = serve(model)
        try:
            write(model, Broken(), temperature=0.0)
        except ProjectError as error:
            results[name, "error"] = str(error)
    return results


def serve(model):
    """The texts that a service writes, to clients one after another; None if it follows."""
    from retro_mcore.inference.generation import GenerationRequest, StoppingOptions
    from retro_mcore.inference.sampling import SamplingOptions
    from retro_mcore.server.service import GenerationService, Job, is_first_rank

    service = GenerationService(model, Vocabulary(eod=90), max_batch_size=2)
    if not is_first_rank(model):
        return service.follow()
    service.start()
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    jobs = [
        Job(
            GenerationRequest(
                tokens=prompt,
                sampling=SamplingOptions(temperature=0),
                stopping=StoppingOptions(max_new_tokens=NEW_TOKENS),
                neighbors=ChunkFunction(retrieved_length=2 * M),
            ),
            partial(note, ended, number),
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    texts = {}
    for job in jobs:
        service.submit([job])
    while len(texts) < len(jobs):
        number, event = ended.get(timeout=60)
        assert event.error is None, event.error
        texts[number] = event.text.tokens
    service.close()
    return [texts[number] for number in range(len(jobs))]


def note(ended, number, event):
    if event.token is None:
        ended.put((number, event))


class Broken:
    def neighbors_of(self, chunks):
        raise ProjectError("index", "gone", "Build it")


def write(model, source, temperature, **options):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions

    torch.manual_seed(1234)
    requests = requests_for(
        PROMPTS,
        max_new_tokens=NEW_TOKENS,
        sampling=SamplingOptions(temperature=temperature),
        neighbors=source,
        **options,
    )
    return generate(model.eval(), Vocabulary(eod=90), requests)
