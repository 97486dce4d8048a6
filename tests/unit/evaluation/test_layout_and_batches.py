"""Every score is the same for any batch size and any padding of the vocabulary.

Whoever compares two runs would meet it: the padding depends on the tensor parallel size that a
model was trained under, the batch on the machine that evaluates it.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.evaluation.loaded import VOCABULARY_SIZE, loaded_model, poison_padding
from tests.unit.evaluation.texts import RandomDatabase, RandomRows, random_documents
from tests.unit.inference.small import small_model

pytestmark = pytest.mark.usefixtures("megatron")

LENGTHS = [41, 2, 19, 66]
#: Sums in another order: single precision keeps six digits of a sum of some hundred terms.
CLOSE = {"rel": 1e-5}


class Samples:
    """Samples of 33 tokens below the vocabulary's size, with neighbors."""

    samples = property(lambda self: self)

    def __len__(self):
        return 5

    def tokens(self, index):
        return np.random.default_rng(index).integers(0, VOCABULARY_SIZE, 33)

    def text_item(self, index):
        return {"text": self.tokens(index)}

    def __getitem__(self, index):
        shape = (4, 2, 16)
        retrieved = np.random.default_rng(100 + index).integers(0, VOCABULARY_SIZE, shape)
        return {
            "text": self.tokens(index),
            "neighbor_tokens": retrieved,
            "neighbor_mask": np.zeros(shape, bool),
        }


def of_samples(model, batch_size):
    from retro_mcore.evaluation.perplexity import measure_perplexity

    size = {"num_samples": 5, "micro_batch_size": batch_size, "vocab_size": VOCABULARY_SIZE}
    return [measure_perplexity(model, Samples(), "valid", kind, **size).loss for kind in KINDS]


KINDS = ("real", "none")


def of_documents(model, batch_size):
    from retro_mcore.evaluation.chunk_losses import measure_chunk_losses
    from retro_mcore.evaluation.windows import WindowReader, plan_windows

    documents = random_documents(LENGTHS)
    losses = []
    for neighbors in (RandomRows(documents.num_chunks), None):
        reader = WindowReader(documents, neighbors, RandomDatabase(), 2, 2)
        bytes_C = np.ones(documents.num_chunks, np.int64)
        windows = plan_windows(LENGTHS, 32, 16)
        size = VOCABULARY_SIZE
        measured = measure_chunk_losses(model, reader, windows, bytes_C, batch_size, "", size)
        losses += measured.losses.tolist()
    return losses


def of_continuations(model, batch_size):
    from retro_mcore.evaluation.continuations import ContinuationScorer

    pairs = [(text[:7], text[7:]) for text in (random_documents(LENGTHS[2:]).tokens(0).tolist(),)]
    pairs += [(list(range(1, n)), list(range(n, 3 * n))) for n in (2, 5, 28)]
    scores = []
    for retrieval in (True, False):
        scorer = ContinuationScorer(loaded_model(retrieval, model), batch_size)
        scores += [likelihood for likelihood, _ in scorer.score(pairs, "")]
    return scores


def of_validation(model, batch_size):
    from retro_mcore.training.loop.sample_reader import (
        MicroBatchSampler,
        NumberedSamples,
        read_batches,
    )
    from retro_mcore.training.loop.scoring import total_loss

    sampler = MicroBatchSampler(0, 5, batch_size, 0, 1, keep_rest=True)
    batches = read_batches(NumberedSamples(Samples()), sampler, 0, torch.device("cpu"))
    loss, num_tokens = total_loss([model], batches, vocab_size=VOCABULARY_SIZE)
    return [loss / num_tokens]


SCORES = {
    "samples": of_samples,
    "documents": of_documents,
    "continuations": of_continuations,
    "validation": of_validation,
}


@pytest.mark.parametrize("scored", SCORES)
@pytest.mark.parametrize("tied", [True, False])
def test_no_score_depends_on_padding_or_batch(scored, tied):
    model = small_model(share_embeddings_and_output_weights=tied)
    expected = SCORES[scored](model, 1)
    assert SCORES[scored](model, 3) == pytest.approx(expected, **CLOSE)
    poison_padding(model)
    assert SCORES[scored](model, 2) == pytest.approx(expected, **CLOSE)


def test_the_probabilities_of_the_tokenizers_tokens_sum_to_one():
    from retro_mcore.evaluation.continuations import ContinuationScorer

    model = small_model()
    poison_padding(model)
    scorer = ContinuationScorer(loaded_model(False, model), 30)
    scores = scorer.score([([5, 6, 7], [token]) for token in range(VOCABULARY_SIZE)], "")
    assert sum(np.exp(likelihood) for likelihood, _ in scores) == pytest.approx(1)
    assert sum(greedy for _, greedy in scores) == 1


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.integers(1, 6))
def test_each_rank_masks_its_part_of_the_padding(vocab_size, num_ranks, divisor):
    from retro_mcore.model import vocabulary

    padded = -(-vocab_size // (num_ranks * divisor)) * num_ranks * divisor
    parts = torch.ones(2, padded).chunk(num_ranks, dim=-1)
    model = SimpleNamespace(parallel_output=True, pg_collection=SimpleNamespace(tp=None))
    masked = []
    with pytest.MonkeyPatch.context() as patch:
        for rank, part in enumerate(parts):
            patch.setattr(vocabulary.dist, "get_rank", lambda group, rank=rank: rank)
            masked.append(vocabulary.mask_padding_rows(part.clone(), vocab_size, model))
    whole = torch.cat(masked, dim=-1)
    assert (whole[:, :vocab_size] == 1).all()
    assert (whole[:, vocab_size:] == torch.finfo(whole.dtype).min).all()
