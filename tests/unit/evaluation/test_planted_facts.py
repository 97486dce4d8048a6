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
FACTS_PER_TEXT, NUM_NEIGHBORS = 8, 3


def planted(generator: np.random.Generator, num_texts: int) -> tuple[Any, np.ndarray]:
    """Texts of facts [city, code] over a chunk's end, each fact in one of the chunk's neighbors.

    A neighbor is [city, code]. The others are facts about other cities. Codes are drawn anew for
    each text, so the model cannot know them.

    Returns:
        The batch, and the ranks i64 [texts, facts] of the neighbors that hold the facts, from 0.
    """
    from retro_mcore.samples.batch import RetroBatch

    shape = (num_texts, FACTS_PER_TEXT, NUM_CITIES)

    def draw(values: np.ndarray) -> np.ndarray:
        shuffled = generator.permuted(np.broadcast_to(values, shape), axis=-1)
        return shuffled[..., :NUM_NEIGHBORS]

    neighbors = np.stack([draw(CITIES), draw(CODES)], axis=-1)
    ranks = generator.integers(NUM_NEIGHBORS, size=shape[:2])
    facts = np.take_along_axis(neighbors, ranks[..., None, None], axis=2)[:, :, 0]
    text = np.insert(facts.reshape(num_texts, -1), 0, START, axis=1)
    given = torch.from_numpy(neighbors), torch.zeros(neighbors.shape, dtype=torch.bool)
    return RetroBatch.from_text(torch.from_numpy(text), given), ranks


def small_model(**changes: Any) -> Any:
    return build_model(
        num_layers=1,
        retro_decoder_layers=[1],
        retro_encoder_num_layers=1,
        hidden_size=4 * NUM_CITIES,
        retro_chunk_length=2,
        retro_num_neighbors=NUM_NEIGHBORS,
        retro_num_retrieved_chunks=1,
        share_embeddings_and_output_weights=False,
        **changes,
    )


def trained_model(num_steps: int = 250) -> Any:
    """A model trained on other texts of the same kind until it copies."""
    model = small_model(init_method_std=0.1, ffn_hidden_size=128)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    generator = np.random.default_rng(0)
    for step in range(num_steps):
        batch, _ = planted(generator, 48)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20)
        logits_BSV = model(**batch.model_inputs())
        asked, codes = logits_BSV[:, 1::2].flatten(0, 1), batch.labels[:, 1::2].flatten()
        loss = torch.nn.functional.cross_entropy(asked, codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def copying_model() -> Any:
    """A model with weights set by hand that looks up its city in the neighbors.

    Hidden channels: 0 to 15 a token's city, 16 to 31 its code, 32 to 47 the city of its neighbor
    text, 48 to 63 the code to predict. The neighbor encoder averages the cities of a text into
    channels 32 to 47. Chunked cross-attention compares them with the last token's city, and moves
    the code into the channels that the output layer reads.
    """
    model = small_model(num_attention_heads=1)
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


def credits_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Credit [200, K] for the codes of 200 planted facts, and where the neighbors with facts are.

    Checks that the model copies.
    """
    from retro_mcore.evaluation.attribution import batch_credit
    from retro_mcore.training.loop.scoring import token_losses

    loaded: Any = SimpleNamespace(
        model=model,
        arguments=SimpleNamespace(retro_num_neighbors=NUM_NEIGHBORS),
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=0),
    )
    batch, ranks = planted(np.random.default_rng(1), 25)
    ((_, losses_BS),) = token_losses([model], [batch])
    assert losses_BS is not None
    assert losses_BS[:, 1::2].mean() < 0.2
    credit_BSK = batch_credit(loaded, batch)
    assert credit_BSK is not None
    credit_FK = credit_BSK[:, 1::2].reshape(-1, NUM_NEIGHBORS).numpy()
    assert len(credit_FK) == 200
    return credit_FK, np.arange(NUM_NEIGHBORS) == ranks.reshape(-1, 1)


@pytest.mark.usefixtures("megatron")
def test_the_neighbor_that_a_model_surely_copies_from_has_the_credit():
    credit_FK, holds_FK = credits_of(copying_model())
    assert credit_FK[holds_FK].min() > 3  # without it the other facts mislead
    assert np.abs(credit_FK[~holds_FK]).max() < 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("megatron")
def test_a_trained_model_credits_the_neighbor_that_holds_a_planted_fact():
    credit_FK, holds_FK = credits_of(trained_model())
    top = credit_FK.argmax(1) == holds_FK.argmax(1)
    assert top.mean() >= 0.95
    assert np.median(credit_FK[holds_FK]) > 1 > 10 * np.median(np.abs(credit_FK[~holds_FK]))
