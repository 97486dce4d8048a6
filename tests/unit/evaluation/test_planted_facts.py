"""The neighbor that holds a fact gets the credit for it, by a model that copies from neighbors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.model.builders import VOCABULARY, build_model

CITIES, CODES, WORDS = np.arange(1, 41), np.arange(41, 81), np.arange(81, VOCABULARY)
CHUNK_LENGTH, NUM_NEIGHBORS = 4, 3


def planted(generator: np.random.Generator, count: int) -> tuple[Any, np.ndarray]:
    """Texts that ask for a city's code, each with the fact as one of its neighbors.

    A text is [word, word, word, city | code, word …], and a neighbor [word, city, code, word]. The
    other neighbors are facts about other cities. Which code a city has changes with every text, so
    the model cannot know it.

    Returns:
        The batch, and the rank of each text's fact, from 0.
    """
    from retro_mcore.samples.batch import RetroBatch

    text = generator.choice(WORDS, (count, 2 * CHUNK_LENGTH + 1))
    neighbors = generator.choice(WORDS, (count, 2, NUM_NEIGHBORS, CHUNK_LENGTH))
    mask = np.zeros(neighbors.shape, bool)
    mask[:, 1] = True
    ranks = generator.integers(NUM_NEIGHBORS, size=count)
    for row, rank in enumerate(ranks):
        neighbors[row, 0, :, 1] = generator.choice(CITIES, NUM_NEIGHBORS, replace=False)
        neighbors[row, 0, :, 2] = generator.choice(CODES, NUM_NEIGHBORS, replace=False)
        text[row, CHUNK_LENGTH - 1 : CHUNK_LENGTH + 1] = neighbors[row, 0, rank, 1:3]
    given = torch.from_numpy(neighbors), torch.from_numpy(mask)
    return RetroBatch.from_text(torch.from_numpy(text), given), ranks


def train_to_copy(num_steps: int) -> Any:
    """A model that learned to read codes in its neighbors."""
    model = build_model(
        num_layers=1,
        retro_decoder_layers=[1],
        retro_encoder_num_layers=1,
        hidden_size=64,
        ffn_hidden_size=64,
        retro_chunk_length=CHUNK_LENGTH,
        retro_num_neighbors=NUM_NEIGHBORS,
        retro_num_retrieved_chunks=1,
        init_method_std=0.1,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = np.random.default_rng(0)
    for _ in range(num_steps):
        batch, _ = planted(generator, 64)
        logits_BSV = model(**batch.model_inputs())
        code = CHUNK_LENGTH - 1
        loss = torch.nn.functional.cross_entropy(logits_BSV[:, code], batch.labels[:, code])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("megatron")
def test_the_neighbor_that_holds_a_planted_fact_has_the_top_credit():
    from retro_mcore.evaluation.attribution import batch_credit

    loaded: Any = SimpleNamespace(
        model=train_to_copy(1000),
        arguments=SimpleNamespace(retro_num_neighbors=NUM_NEIGHBORS),
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=0),
    )
    batch, ranks = planted(np.random.default_rng(1), 200)
    credit_BSK = batch_credit(loaded, batch)
    assert credit_BSK is not None
    credit_BK = credit_BSK[:, CHUNK_LENGTH - 1].numpy()
    share = (credit_BK.argmax(1) == ranks).mean()
    assert share >= 0.95
    # The fact is worth more than a nat, and the others next to nothing.
    others = np.ones(credit_BK.shape, bool)
    others[np.arange(200), ranks] = False
    assert np.median(credit_BK[~others]) > 1
    assert np.median(np.abs(credit_BK[others])) < 0.2
