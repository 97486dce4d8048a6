"""Serving from several ranks: no request stops them, and a rank that is gone is told."""

from __future__ import annotations

import os
import queue
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from retro_mcore.errors import ConfigurationError, ProjectError
from tests.distributed.layouts import Layout, build_chunks, join_layout, load_part, serial_weights
from tests.processes import START_METHOD, run_ranks
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

M = 4
FIELDS = {
    "num_layers": 4,
    "position_embedding_type": "rope",
    "retro_decoder_layers": [2, 4],
}
PROMPT = prompts(9)[0]


class Spelled(Vocabulary):
    """Token 89 cannot be written."""

    def __init__(self):
        super().__init__(eod=90)

    def detokenize(self, tokens):
        if 89 in tokens:
            raise ValueError("no such token")
        return "".join(f"t{token:02} " for token in tokens)


class Failing(ChunkFunction):
    """A search that fails for chunks of one token alone."""

    def neighbors_of(self, chunks):
        if any(len(set(chunk.tokens)) == 1 for chunk in chunks):
            raise ProjectError("index", "gone", "Build it")
        return super().neighbors_of(chunks)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_no_request_stops_the_ranks_or_its_companions(megatron, parallel):
    layout = Layout(**{parallel: 2}, fields=FIELDS)
    weights = serial_weights(layout.model_fields())
    first, second = run_ranks(2, serve_bad_and_good, layout, weights)
    assert second == "followed"
    alone, refused, failed, together = first
    assert all(isinstance(error, ConfigurationError) for error in refused)
    assert [type(error).__name__ for error in failed] == ["ProjectError", "ValueError"] or [
        type(error).__name__ for error in failed
    ] == ["ProjectError", "PeerError"]
    assert together == [alone] * 3


def serve_bad_and_good(layout, weights):
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.inference.sampling import LogitAdjustments, SamplingOptions
    from retro_mcore.server.service import GenerationService, Job, is_first_rank

    join_layout(layout)
    (model,) = build_chunks(layout)
    load_part(model, weights)
    service = GenerationService(model.eval(), Spelled(), max_batch_size=4)
    if not is_first_rank(model):
        service.follow()
        return "followed"
    service.start()
    source = Failing(retrieved_length=2 * M)

    def request(tokens, sampling=None, adjustments=None, **stopping):
        return GenerationRequest(
            tokens=tokens,
            sampling=SamplingOptions(**(sampling or {"temperature": 0})),
            adjustments=LogitAdjustments(**(adjustments or {})),
            stopping=StoppingOptions(**{"max_new_tokens": 12, **stopping}),
            neighbors=source,
        )

    def run(requests):
        ended: queue.SimpleQueue = queue.SimpleQueue()
        jobs = [Job(one, partial(note, ended, number)) for number, one in enumerate(requests)]
        service.submit(jobs)
        results = dict(ended.get(timeout=120) for _ in jobs)
        return [results[number] for number in range(len(jobs))]

    refused = []
    for bad in (
        request(PROMPT, min_new_tokens=2, stop_tokens=(99999999,)),
        request(PROMPT, stop_tokens=(-1,)),
        request(PROMPT, min_new_tokens=2, stop_tokens=tuple(range(90))),
        request(PROMPT, adjustments={"logit_bias": {95: 1.0}}),
        request([90]),
        request([]),
        request(PROMPT, max_new_tokens=10**9),
    ):
        try:
            service.submit([Job(bad, print)])
        except ConfigurationError as error:
            refused.append(error)
    (alone,) = run([request(PROMPT)])
    good = request(PROMPT, {"temperature": 5e-324})
    failed_search, together = run([request([8] * M), good])
    unwritable, *more = run([request([89], stop_strings=("x",)), good, request(PROMPT)])
    service.close()
    return alone, refused, [failed_search, unwritable], [together, *more]


def note(ended, number, event):
    if event.token is None:
        ended.put((number, event.error or event.text.tokens))


def test_a_rank_that_is_gone_is_told(tmp_path, megatron):
    layout = Layout(tensor=2, fields=FIELDS)
    weights = serial_weights(layout.model_fields())
    torch.multiprocessing.start_processes(
        lose_a_rank, args=(str(tmp_path), layout, weights), nprocs=2, start_method=START_METHOD
    )
    assert (tmp_path / "seen").read_text() == "failed"


def lose_a_rank(rank, folder, layout, weights):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    join_layout(layout)
    from retro_mcore.server.service import GenerationService, is_first_rank

    (model,) = build_chunks(layout)
    load_part(model, weights)
    service = GenerationService(model.eval(), Spelled(), max_batch_size=4)
    torch.distributed.barrier()
    if not is_first_rank(model):
        os._exit(0)
    service.start()
    end = time.monotonic() + 60
    while service.is_alive and time.monotonic() < end:
        time.sleep(0.2)
    seen = "failed" if service.has_failed and not service.is_alive else "alive"
    Path(folder, "seen").write_text(seen)
    os._exit(0)
