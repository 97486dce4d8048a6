"""Credit of neighbors, compared with whole forward passes without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.inference.small import CHUNK_LENGTH as M
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts, requests_for, small_model

pytestmark = pytest.mark.usefixtures("megatron")

TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


class FirstOnly(ChunkFunction):
    """The second neighbor is missing."""

    def neighbors_of(self, chunks):
        found = super().neighbors_of(chunks)
        found.mask[:, 1] = True
        return found


def generate(model, prompt_length, source, **options):
    from retro_mcore.inference.generation import generate

    options = {"max_new_tokens": 15, "min_new_tokens": 15, **options}
    requests = requests_for(prompts(prompt_length), neighbors=source, **options)
    return generate(model, Vocabulary(), requests)[0]


def losses(model, text, without=None, retrieval=True):
    """Losses [T - 1] by the model's forward pass over whole chunks."""
    from retro_mcore.retrieval.neighbors import RetrievedNeighbors
    from retro_mcore.samples.batch import position_ids, retrieved_inputs

    num_chunks = -(-(len(text.tokens) - 1) // M)
    tokens = text.tokens[:-1] + [0] * (num_chunks * M - len(text.tokens) + 1)
    tokens_1S = torch.tensor([tokens])
    packed = RetrievedNeighbors.pack([text.neighbors[:num_chunks]], num_chunks, 0)
    if without is not None:
        packed.mask[:, without] = True
    found = [torch.from_numpy(part) for part in (packed.tokens, packed.mask)]
    context = retrieved_inputs(*found) if retrieval else {}
    with torch.no_grad():
        logits_SV = model(tokens_1S, position_ids(tokens_1S), None, **context)[0]
    labels = torch.tensor(text.tokens[1:])
    logits_SV = logits_SV[: len(labels), : Vocabulary().vocab_size]
    return torch.nn.functional.cross_entropy(logits_SV, labels, reduction="none").numpy()


@pytest.mark.parametrize("prompt_length", [11, 2 * M])
def test_credit_is_the_loss_without_a_neighbor_minus_the_loss_with_it(prompt_length):
    model = small_model()
    text = generate(model, prompt_length, ChunkFunction(), neighbor_credit=True)
    credit = text.neighbor_credit
    assert credit.shape == (prompt_length + 15, 2)
    assert credit.dtype == np.float32
    for rank in range(2):
        expected = losses(model, text, without=rank) - losses(model, text)
        np.testing.assert_allclose(credit[1:, rank], expected, **TOLERANCE)
    np.testing.assert_allclose(credit[:M], 0, atol=1e-6)  # these tokens read no neighbors
    assert np.abs(credit[M:]).max() > 0.01


def test_a_missing_neighbor_has_no_credit_and_the_only_one_has_all():
    model = small_model()
    text = generate(model, 11, FirstOnly(), neighbor_credit=True)
    assert not text.neighbor_credit[:, 1].any()
    expected = losses(model, text, retrieval=False) - losses(model, text)
    np.testing.assert_allclose(text.neighbor_credit[1:, 0], expected, **TOLERANCE)


def test_a_text_that_ends_with_a_chunk_is_credited_without_its_last_neighbors():
    model = small_model()
    every = list(range(1, Vocabulary().vocab_size))
    text = generate(
        model, 2 * M, ChunkFunction(), neighbor_credit=True, stop_tokens=every, min_new_tokens=0
    )
    assert len(text.tokens) == 2 * M
    assert len(text.neighbors) == 2
    expected = losses(model, text, without=0) - losses(model, text)
    np.testing.assert_allclose(text.neighbor_credit[1:, 0], expected, **TOLERANCE)
    short = generate(
        model, M, ChunkFunction(), neighbor_credit=True, stop_tokens=every, min_new_tokens=0
    )
    assert short.neighbor_credit is None


def test_in_two_chunks_the_answer_alone_has_credit():
    model = small_model()
    text = generate(model, 5, ChunkFunction(), neighbor_credit=True, two_chunks=True)
    np.testing.assert_allclose(text.neighbor_credit[:5], 0, atol=1e-6)
    assert np.abs(text.neighbor_credit[5:]).min(0).max() > 0
    assert [text.chunk_read_for(place, M) for place in (0, 4, 5, 19)] == [None, None, 0, 0]


def test_credit_is_measured_only_where_it_is_asked_for():
    from retro_mcore.inference.generation import generate as generate_all

    model = small_model()
    asked, other = requests_for(
        prompts(11, 9), neighbors=ChunkFunction(), max_new_tokens=4, neighbor_credit=True
    )
    requests = [asked, replace(other, neighbor_credit=False)]
    first, second = generate_all(model, Vocabulary(), requests)
    assert first.neighbor_credit is not None
    assert second.neighbor_credit is None
