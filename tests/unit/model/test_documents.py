"""Documents of a sample that are kept apart are computed as if each were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.samples.batch import RetroBatch, collate
from retro_mcore.samples.separation import Separation
from tests.unit.model.builders import SMALL, build_model

M, K, EOD = SMALL["retro_chunk_length"], SMALL["retro_num_neighbors"], 0
R = M * SMALL["retro_num_retrieved_chunks"]
APART = {"reset_position_ids": True, "reset_attention_mask": True}
#: Lengths of documents, their ends included: less than a chunk, one chunk, more.
LENGTHS = (M + 3, M, 5, 2 * M + 1)
#: The models are in float64, but rotary angles, of positions counted from the sample's first token,
#: and the loss are computed in float32.
ROUNDING = {"atol": 2e-5, "rtol": 1e-6}


def document(length, generator):
    """A document padded to whole chunks, and the neighbors of its chunks."""
    chunks = -(-length // M)
    tokens = np.full(chunks * M, EOD)
    tokens[: length - 1] = generator.integers(1, 90, length - 1)
    neighbors = generator.integers(1, 90, (chunks, K, R))
    mask = generator.random((chunks, K, R)) < 0.1
    return {"tokens": tokens, "neighbor_tokens": neighbors, "neighbor_mask": mask}


def batch_of(documents, **separation):
    """One sample of these documents."""
    joined = {key: np.concatenate([each[key] for each in documents]) for key in documents[0]}
    tokens = joined.pop("tokens")
    text = np.append(tokens, EOD)
    ends = Separation(EOD, M, **separation)
    past_end = np.concatenate([np.cumsum(each["tokens"] == EOD) > 0 for each in documents])
    loss_mask = (~past_end).astype(np.float32)
    return collate([{"text": text, "loss_mask": loss_mask, "sample_id": 0, **joined,
                     **ends.items(text)}])  # fmt: skip


def without_neighbors(batch):
    return RetroBatch(**{**vars(batch), "retrieved_tokens": None, "retrieved_mask": None})


VARIANTS = {
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "rotary": {"position_embedding_type": "rope", "retro_cross_attention_positions": "rotary"},
    "no positions": {"position_embedding_type": "rope", "no_rope_layers": [1, 2, 3, 4]},
    "a window, DeepNorm": {"position_embedding_type": "rope", "window_size": (M, 0),
                           "window_attn_skip_freq": 2, "retro_deepnorm": True},
}  # fmt: skip


@pytest.mark.parametrize("retrieval", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_documents_alone(megatron, variant, retrieval):
    model = build_model(**VARIANTS[variant]).double()
    generator = np.random.default_rng(3)
    documents = [document(length, generator) for length in LENGTHS]

    def logits(*chosen, **separation):
        batch = batch_of(chosen, **separation)
        with torch.no_grad():
            return model(**(batch if retrieval else without_neighbors(batch)).model_inputs())[0]

    together = logits(*documents, **APART)
    start = 0
    for each in documents:
        end = start + len(each["tokens"])
        torch.testing.assert_close(together[start:end], logits(each), **ROUNDING)
        start = end
    assert not torch.allclose(together[-1], logits(*documents)[-1], atol=1e-3)


def gradients(model, batch):
    """The sum of the losses that count, and its gradients."""
    model.zero_grad()
    losses = model(**batch.model_inputs(), labels=batch.labels)
    loss = (losses * batch.loss_mask).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def test_gradients_under_recomputation_are_those_of_the_documents_alone(megatron):
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform",
                 "recompute_num_layers": 1}  # fmt: skip
    model = build_model(**recompute).double().train()
    generator = np.random.default_rng(4)
    documents = [document(length, generator) for length in LENGTHS]
    loss, found = gradients(model, batch_of(documents, **APART))
    alone = [gradients(model, batch_of([each])) for each in documents]
    torch.testing.assert_close(loss, sum(each for each, _ in alone), **ROUNDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for _, each in alone), **ROUNDING)


@pytest.mark.parametrize("passages", [True, False])
def test_packed_instructions_learn_what_they_learn_alone(megatron, passages):
    """Losses and gradients of a packed row, with passages for the encoder and without.

    Without them, examples need not begin on chunk boundaries.
    """
    from retro_mcore.data.instruction.dataset import _lay_out
    from retro_mcore.data.instruction.samples import EncodedExample, InstructionFormat

    generator = np.random.default_rng(5)
    encoder = {"num_encoder_passages": K, "chunk_length": M, "retrieved_length": R}
    format = InstructionFormat(6 * M, **(encoder if passages else {}))
    examples = []
    for length in (M + 5, M, 2 * M + 2):
        tokens = np.append(generator.integers(1, 90, length - 1), EOD)
        given = [generator.integers(1, 90, (K, R)), generator.random((K, R)) < 0.1]
        trained = np.arange(length) > 3
        examples.append(EncodedExample(tokens, trained, *(given if passages else [])))
    model = build_model().double().train()

    def learn(*chosen, packed):
        row = _lay_out(chosen, format, EOD, M if passages else 1, packed)
        batch = collate([{**row, "sample_id": 0}])
        losses = model(**batch.model_inputs(), labels=batch.labels)
        return losses.detach()[batch.loss_mask == 1], *gradients(model, batch)

    losses, loss, found = learn(*examples, packed=True)
    alone = [learn(each, packed=False) for each in examples]
    torch.testing.assert_close(losses, torch.cat([each for each, _, _ in alone]), **ROUNDING)
    torch.testing.assert_close(loss, sum(each for _, each, _ in alone), **ROUNDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for *_, each in alone), **ROUNDING)


@pytest.mark.parametrize("changed", ["a token", "neighbors of its chunk", "of the mixed chunk"])
def test_nothing_crosses_documents_that_begin_within_chunks(megatron, changed):
    """A packed sample: the second document begins in the middle of chunk 1."""
    model = build_model().double()
    generator = np.random.default_rng(6)
    made = document(4 * M, generator)
    tokens, begin = made["tokens"], M + M // 2
    tokens[tokens == EOD] = 1
    tokens[begin - 1] = EOD

    def logits():
        text = np.append(tokens, 1)
        items = Separation(EOD, None, **APART).items(text)
        neighbors = {key: made[key].copy() for key in ("neighbor_tokens", "neighbor_mask")}
        batch = collate([{"text": text, "sample_id": 0, **neighbors, **items}])
        with torch.no_grad():
            return model(**batch.model_inputs())[0]

    before = logits()
    if changed == "a token":
        tokens[2] = (tokens[2] + 1) % 90 + 1
    else:
        made["neighbor_tokens"][int(changed != "neighbors of its chunk")] += 1
    moved = (logits() - before).abs().amax(dim=-1).gt(0).nonzero().flatten().tolist()
    expected = {"a token": range(2, begin), "neighbors of its chunk": range(M - 1, begin),
                "of the mixed chunk": ()}  # fmt: skip
    assert moved == list(expected[changed])


def test_documents_of_cu_seqlens_are_computed_as_those_of_samples(megatron):
    """The way of docs/training.md for a caller's own batch."""
    model = build_model().double()
    generator = np.random.default_rng(7)
    documents = [document(length, generator) for length in LENGTHS]
    expected = batch_of(documents, **APART)
    cu_seqlens = torch.tensor([0, *np.cumsum([len(each["tokens"]) for each in documents])])
    neighbors = (expected.retrieved_tokens[None], expected.retrieved_mask[None])
    text = torch.cat((expected.tokens, torch.tensor([[EOD]])), dim=1)

    segments = torch.searchsorted(cu_seqlens, torch.arange(text.size(1) - 1), right=True) - 1
    batch = RetroBatch.from_text(text, neighbors, segments=segments[None])
    with torch.no_grad():
        found, wanted = (model(**each.model_inputs()) for each in (batch, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        inputs = {**batch.model_inputs(), "attention_mask": None}
        with pytest.raises(ConfigurationError, match="segments: given without attention_mask"):
            model(**inputs)
