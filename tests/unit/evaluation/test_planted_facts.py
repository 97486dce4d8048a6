"""The neighbor that holds a planted fact gets the credit for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.model.builders import VOCABULARY, build_model

NUM_CITIES = 16
CITIES, CODES, START = np.arange(1, 17), np.arange(17, 33), 33
NUM_TEXTS, FACTS_PER_TEXT, NUM_NEIGHBORS = 25, 8, 3


def planted() -> tuple[Any, np.ndarray]:
    """Texts of facts [city, code] over a chunk's end, each fact in one of the chunk's neighbors.

    A neighbor is [city, code]. The others are facts about other cities. Codes are drawn anew for
    each text, so the model cannot know them.

    Returns:
        The batch, and the ranks i64 [texts, facts] of the neighbors that hold the facts, from 0.
    """
    from retro_mcore.samples.batch import RetroBatch

    generator = np.random.default_rng(1)
    shape = (NUM_TEXTS, FACTS_PER_TEXT, NUM_CITIES)

    def draw(values: np.ndarray) -> np.ndarray:
        shuffled = generator.permuted(np.broadcast_to(values, shape), axis=-1)
        return shuffled[..., :NUM_NEIGHBORS]

    neighbors = np.stack([draw(CITIES), draw(CODES)], axis=-1)
    ranks = generator.integers(NUM_NEIGHBORS, size=shape[:2])
    facts = np.take_along_axis(neighbors, ranks[..., None, None], axis=2)[:, :, 0]
    text = np.insert(facts.reshape(NUM_TEXTS, -1), 0, START, axis=1)
    given = torch.from_numpy(neighbors), torch.zeros(neighbors.shape, dtype=torch.bool)
    return RetroBatch.from_text(torch.from_numpy(text), given), ranks


def copying_model() -> Any:
    """A model with weights set by hand that looks up its city in the neighbors.

    Hidden channels: 0 to 15 a token's city, 16 to 31 its code, 32 to 47 the city of its neighbor
    text, 48 to 63 the code to predict. The neighbor encoder averages the cities of a text into
    channels 32 to 47. Chunked cross-attention compares them with the last token's city, and moves
    the code into the channels that the output layer reads.
    """
    model = build_model(
        num_layers=1,
        retro_decoder_layers=[1],
        retro_encoder_num_layers=1,
        hidden_size=4 * NUM_CITIES,
        num_attention_heads=1,
        retro_chunk_length=2,
        retro_num_neighbors=NUM_NEIGHBORS,
        retro_num_retrieved_chunks=1,
        share_embeddings_and_output_weights=False,
    )
    weights = dict(model.named_parameters())
    city, code, read, predicted = (
        slice(start, start + NUM_CITIES) for start in range(0, 4 * NUM_CITIES, NUM_CITIES)
    )
    width, one = 4 * NUM_CITIES, torch.eye(NUM_CITIES)
    values = slice(width + predicted.start, width + predicted.stop)  # keys come first
    encoder = "neighbor_encoder.layers.0.self_attention"
    decoder = "decoder.layers.0.cross_attention"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        embeddings = weights["embedding.word_embeddings.weight"]
        embeddings[1:17, city] = 4 * one
        embeddings[17:33, code] = 4 * one
        own_values = slice(2 * width + read.start, 2 * width + read.stop)
        weights[f"{encoder}.linear_qkv.weight"][own_values, city] = one
        weights[f"{encoder}.linear_proj.weight"].copy_(torch.eye(width))
        weights[f"{decoder}.linear_q.weight"][:NUM_CITIES, city] = 2 * one
        weights[f"{decoder}.linear_kv.weight"][:NUM_CITIES, read] = one
        weights[f"{decoder}.linear_kv.weight"][values, code] = one
        weights[f"{decoder}.linear_proj.weight"].copy_(torch.eye(width))
        weights["output_layer.weight"][17:33, predicted] = 3 * one
    return model


@pytest.mark.usefixtures("megatron")
def test_the_neighbor_that_holds_a_planted_fact_has_the_top_credit():
    from retro_mcore.evaluation.attribution import batch_credit
    from retro_mcore.training.loop.scoring import token_losses

    loaded: Any = SimpleNamespace(
        model=copying_model(),
        arguments=SimpleNamespace(retro_num_neighbors=NUM_NEIGHBORS),
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=0),
    )
    batch, ranks = planted()
    ((_, losses_BS),) = token_losses([loaded.model], [batch])
    assert losses_BS[:, 1::2].max() < 0.1  # it copies every code
    credit_BSK = batch_credit(loaded, batch)
    assert credit_BSK is not None
    credit_FK, ranks_F = credit_BSK[:, 1::2].reshape(-1, NUM_NEIGHBORS).numpy(), ranks.ravel()
    assert len(credit_FK) == 200
    assert (credit_FK.argmax(1) == ranks_F).mean() >= 0.95
    holds = np.arange(NUM_NEIGHBORS) == ranks_F[:, None]
    assert credit_FK[holds].min() > 3  # without it the other facts mislead
    assert np.abs(credit_FK[~holds]).max() < 0.1
